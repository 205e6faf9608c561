"""What rank 0 tells the others, by way of the ring or of a connection, and what each says to it, through a socket."""

from __future__ import annotations

import socket
from typing import Generic, Literal, TypeVar

import msgspec

from ingle.channel import LENGTH, frame, message_encoder
from ingle.config import EngineConfig
from ingle.request import decode_token_ids
from ingle.step import Masks, Step

Backend = Literal["nccl", "gloo"]
Said = TypeVar("Said")
_MAX_WORDS_BYTES = 16 << 20
"""Of what a rank says, which is little."""

# ---- to all ranks


class Join(msgspec.Struct, frozen=True, tag="join"):
    """The first message: with whom they compute."""

    tensor: int
    pipeline: int
    devices: list[str]
    """Of each rank, such as cuda:1."""
    backend: Backend
    own_kernels: bool
    """Whether these add up what is small enough for that to pay, where GPUs reach each other."""
    hosts: list[str] = []
    """The address of each rank's, where they are on several."""
    port: int = 0
    """Of the first, at which they find each other then."""


class Load(msgspec.Struct, frozen=True, tag="load"):
    """A model, in place of whatever was there."""

    config: EngineConfig
    path: str
    """Where rank 0 has it."""
    digest: str = ""
    """By which a rank on another host knows that its files are of the same model."""


class Draw(msgspec.Struct, frozen=True, tag="draw"):
    """The draw of the step before this message, where that is `masked`."""

    masks: Masks


class Logits(msgspec.Struct, frozen=True, tag="logits"):
    """`Launched.logits` of the step before this message."""

    start: int
    stop: int


class Capture(msgspec.Struct, frozen=True, tag="capture"):
    """`Device.capture_next`"""


class Relieve(msgspec.Struct, frozen=True, tag="relieve"):
    """`Device.relieve`"""


class SharePages(msgspec.Struct, frozen=True, tag="share pages"):
    """Memory through which pages are copied: each has a row, with all ranks' parts of it."""

    path: str
    """Of rank 0's descriptor."""
    buffer: int
    """Its number."""
    offset: int
    num_pages: int
    starts: list[int]
    """Of each rank's part of a row, and the end of all."""


class CopyPages(msgspec.Struct, frozen=True, tag="copy pages"):
    """Between the device and the first rows of a buffer, behind the steps that were told before."""

    number: int
    buffer: int
    page_ids: list[int]
    to_device: bool


ToRanks = Join | Load | Step | Draw | Logits | Capture | Relieve | SharePages | CopyPages

# ---- from a rank


class Imported(msgspec.Struct, frozen=True, tag="imported"):
    """What takes longest until it can join."""


class Joined(msgspec.Struct, frozen=True, tag="joined"):
    pass


class Loaded(msgspec.Struct, frozen=True, tag="loaded"):
    """Its share is there."""

    weight_bytes: int
    head_bytes: int
    looked_up_bytes: int
    expert_bytes: int
    page_bytes: int
    """Its part of a page of the KV cache."""


class Copied(msgspec.Struct, frozen=True, tag="copied"):
    """`CopyPages` has ended."""

    number: int
    failure: str
    """Empty where it went well."""


class Alive(msgspec.Struct, frozen=True, tag="alive"):
    """Twice a second, from a thread of its own."""


class RankFailed(msgspec.Struct, frozen=True, tag="failed"):
    """Why it ends. `expected` errors are for the user as they stand; others bring a traceback."""

    message: str
    expected: bool


FromRank = Imported | Joined | Loaded | Copied | Alive | RankFailed


def to_ranks_encoder() -> msgspec.msgpack.Encoder:
    return message_encoder()


def to_ranks_decoder() -> msgspec.msgpack.Decoder[ToRanks]:
    return msgspec.msgpack.Decoder(ToRanks, dec_hook=decode_token_ids)


def from_rank_decoder() -> msgspec.msgpack.Decoder[FromRank]:
    return msgspec.msgpack.Decoder(FromRank)


class FrameReader(Generic[Said]):
    """What the other end of a socket says, as it comes."""

    def __init__(self, sock: socket.socket, decoder: msgspec.msgpack.Decoder[Said]) -> None:
        self.socket = sock
        self._buffer = bytearray()
        self._decoder = decoder

    def read(self) -> list[Said] | None:
        """The messages that have arrived, where something has; None at the end.

        Raises `ValueError` and `msgspec.MsgspecError` for what is none.
        """
        try:
            data = self.socket.recv(1 << 16)
        except OSError:
            return None
        if not data:
            return None
        self._buffer += data
        messages, start = list[Said](), 0
        while len(self._buffer) - start >= LENGTH.size:
            (length,) = LENGTH.unpack_from(self._buffer, start)
            if length > _MAX_WORDS_BYTES:
                raise ValueError(f"{length} bytes are announced, over the limit of {_MAX_WORDS_BYTES}")
            end = start + LENGTH.size + length
            if len(self._buffer) < end:
                break
            messages.append(self._decoder.decode(memoryview(self._buffer)[start + LENGTH.size : end].tobytes()))
            start = end
        del self._buffer[:start]
        return messages


def said(message: object) -> bytes:
    """As it goes through the socket."""
    return frame(msgspec.msgpack.Encoder(), message)
