"""The API process's end of the channel. The engine's is `ingle.channel.Channel`, which needs no event loop."""

from __future__ import annotations

import asyncio
import socket

import msgspec

from ingle.channel import LENGTH, ChannelClosed, FromEngine, ToEngine, frame, message_encoder


class AsyncChannel:
    """Messages to and from the engine, on an event loop."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._decoder: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)
        self._encoder = message_encoder()

    @classmethod
    async def open(cls, sock: socket.socket) -> AsyncChannel:
        return cls(*await asyncio.open_connection(sock=sock))

    def send(self, message: ToEngine) -> None:
        """Queues a message; the event loop writes it."""
        self._writer.write(frame(self._encoder, message))

    async def receive(self) -> FromEngine:
        """The next message. Raises `ChannelClosed` when the engine has gone."""
        try:
            (length,) = LENGTH.unpack(await self._reader.readexactly(LENGTH.size))
            return self._decoder.decode(await self._reader.readexactly(length))
        except (asyncio.IncompleteReadError, OSError) as error:
            raise ChannelClosed from error

    def close(self) -> None:
        self._writer.close()
