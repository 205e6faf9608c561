"""Typed messages between two processes over a socket pair that only they hold.

A frame is a 4-byte little-endian length and a msgpack body of one of the message types below; nothing is unpickled.
The socket has no name, so no third process can connect to it, and it reads end-of-file when the peer dies.
"""

from __future__ import annotations

import select
import socket
import struct
import threading
from pathlib import Path
from typing import Any, Literal

import msgspec

from ingle.config import EngineConfig
from ingle.request import EngineOutput, EngineRequest, decode_token_ids, encode_token_ids

MAX_FRAME_BYTES = 1 << 30
LENGTH = struct.Struct("<I")


class EngineInfo(msgspec.Struct, frozen=True, tag="ready"):
    """The engine is loaded and takes requests."""

    max_model_len: int
    vocab_size: int
    max_num_seqs: int
    num_pages: int
    page_size: int
    device: str
    dtype: str
    """In which activations are computed, or what is not held otherwise is."""
    kv_dtype: str
    """Of keys and values."""
    product_dtype: str
    """The coarsest type to which factors of matrix products may be rounded: results are at least as exact."""
    factors: list[str]
    """The types that factors of matrix products have."""
    kernels: str
    """What multiplies and attends."""
    family: str
    writes_text: bool
    """False for a model that only makes vectors of texts."""
    hidden_size: int
    """Numbers in a vector that it makes of a text."""
    num_parameters: int
    stored_types: dict[str, int]
    """Numbers that the checkpoint stores in each type, such as Q4_K or BF16, the most first."""
    expanded_types: list[str]
    """Those of the types that are quantized, and that are decoded at load."""
    kept_types: list[str]
    """Those that are quantized, and that are held, and multiplied, as they are stored."""
    weight_bytes: int
    kv_cache_bytes: int
    notices: list[str]
    """What the user should know: limits that were cut to fit, types that were changed."""
    timings_s: dict[str, float]
    """Start-up phases and their seconds, in order."""
    prompt_cache: list[str] = []
    """The tiers below the device in which prefixes are kept, for people."""


STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
"""Bounds of the histogram of tokens in a step."""


class TierStats(msgspec.Struct, frozen=True):
    """A place below the device where pages are kept."""

    name: str
    """host or disk."""
    num_bytes: int
    """That it holds now."""
    num_pages_read: int
    num_pages_written: int
    num_pages_damaged: int
    """Found, and not whole."""


class EngineStats(msgspec.Struct, frozen=True, tag="stats"):
    """How it stands with the engine, and what it has done since its start: never less than before.

    Comes with the first step, twice a second at most while others follow, and with the last.
    """

    num_running: int = 0
    """Requests that have a slot."""
    num_waiting: int = 0
    """Requests that wait for a slot, for pages or for their grammar."""
    num_compiling: int = 0
    """Of those that wait, the ones whose grammar is being compiled."""
    num_pages: int = 0
    """Pages of the KV cache that requests can hold."""
    num_used_pages: int = 0
    """Of these, the ones that requests hold."""
    num_cached_pages: int = 0
    """Of the others, the ones that the prefix cache could hand out again."""
    num_steps: int = 0
    num_failed_steps: int = 0
    """Steps that raised an exception."""
    num_prompt_tokens: int = 0
    """Prompt tokens computed; those read from the prefix cache are not among them, and those computed again are."""
    num_step_tokens: int = 0
    """Tokens of all steps, those of prompts and those drawn."""
    step_tokens: tuple[int, ...] = (0,) * (len(STEP_TOKENS) + 1)
    """Steps by their tokens: up to each of `STEP_TOKENS`, and beyond the last."""
    num_queried_tokens: int = 0
    """Prompt tokens looked for in the prefix cache, as their request got its slot."""
    num_hit_tokens: int = 0
    """Of these, the ones that the device had."""
    num_preemptions: int = 0
    """Requests that lost their slot, to be computed again."""
    num_lower_queried_tokens: int = 0
    """Prompt tokens looked for in the tiers below the device, where there are any."""
    num_lower_hit_tokens: int = 0
    """Of these, the ones that were read from there."""
    num_dropped_pages: int = 0
    """Pages that were evicted before they could be kept in a tier."""
    tiers: tuple[TierStats, ...] = ()


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    """What the engine does while it starts."""

    stage: str


class NothingRefused(msgspec.Struct, frozen=True, tag="checked"):
    """Nothing is left that could be refused before kernels and weights are touched."""


Stage = Literal["loading", "waiting", "stepping", "capturing"]


class Beat(msgspec.Struct, frozen=True, tag="beat"):
    """A sign of life, twice a second whatever the engine's loop does; a thread of its own sends it."""

    stage: Stage
    """What the loop does."""
    seconds: float
    """For which nothing has come of that: no step ended, and no part of one."""


class Begun(msgspec.Struct, frozen=True, tag="begun"):
    """Requests that are computed from now on. Told before that is tried: they may be what an engine dies of."""

    ids: list[str]


class StepMessage(msgspec.Struct, frozen=True, tag="step"):
    """What one step brought. It comes with every step, so that a busy engine that falls silent is a stalled one."""

    outputs: list[EngineOutput]


class Refused(msgspec.Struct, frozen=True):
    """A `ModelError` or `ConfigError`."""

    what: str
    alternative: str | None
    of_flags: bool


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The engine stops. `expected` errors are for the user as they stand; others bring a traceback."""

    message: str
    expected: bool
    errors: list[Refused] = []
    """What is wrong with the model or with the flags, where that is why."""


class Share(msgspec.Struct, frozen=True):
    """What one of several engines on a machine has of it; None is as much as is there."""

    gpus: str | None = None
    """As CUDA_VISIBLE_DEVICES names them."""
    host_bytes: int | None = None
    """Of memory, that it may plan with."""
    cpus: tuple[int, ...] | None = None
    """On which its threads run."""


class Start(msgspec.Struct, frozen=True, tag="start"):
    """The first message: what to load, and with which part of the machine."""

    config: EngineConfig
    path: str
    share: Share = Share()
    digest: str = ""
    """Of the model's files, where the server's host is another."""


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    id: str


ToEngine = Start | EngineRequest | Abort
FromEngine = EngineInfo | Progress | NothingRefused | Beat | Begun | StepMessage | EngineStats | Failed


class ChannelClosed(Exception):
    """The peer closed its end or died."""


class Channel:
    """The engine's end: blocking writes, from any thread, and reads that wait only when asked to."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._sending = threading.Lock()
        self._buffer = bytearray()
        self.num_bytes_received = 0
        self._decoder: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine, dec_hook=decode_token_ids)
        self._encoder = message_encoder()

    def send(self, message: FromEngine) -> None:
        """Raises `ChannelClosed` when nobody reads any more."""
        try:
            with self._sending:
                self._socket.sendall(frame(self._encoder, message))
        except OSError as error:
            raise ChannelClosed from error

    def receive(self, *, wait: bool) -> list[ToEngine]:
        """All messages that have arrived whole; with `wait`, blocks until there is one. Raises `ChannelClosed`."""
        messages = self._parse()
        while True:
            ready, _, _ = select.select([self._socket], [], [], None if wait and not messages else 0)
            if not ready:
                return messages
            try:
                data = self._socket.recv(1 << 18)
            except ConnectionError as error:  # the peer has gone, and left unread what we sent last
                raise ChannelClosed from error
            if not data:
                raise ChannelClosed
            self._buffer += data
            self.num_bytes_received += len(data)
            messages += self._parse()

    def _parse(self) -> list[ToEngine]:
        messages, start = [], 0
        while len(self._buffer) - start >= LENGTH.size:
            (length,) = LENGTH.unpack_from(self._buffer, start)
            end = start + LENGTH.size + length
            if len(self._buffer) < end:
                break
            messages.append(self._decoder.decode(memoryview(self._buffer)[start + LENGTH.size : end].tobytes()))
            start = end
        del self._buffer[:start]
        return messages


def start_frame(
    config: EngineConfig,
    path: Path,
    share: Share = Share(),  # noqa: B008 (frozen)
    digest: str = "",
) -> bytes:
    """The first message, for whoever writes it to the socket before there is a channel."""
    return frame(message_encoder(), Start(config, str(path), share, digest))


def message_encoder() -> msgspec.msgpack.Encoder:
    return msgspec.msgpack.Encoder(enc_hook=encode_token_ids)


def frame(encoder: msgspec.msgpack.Encoder, message: Any) -> bytes:
    """A message as it goes through the socket."""
    body = encoder.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise ValueError(f"a message of {len(body)} bytes is over the limit of {MAX_FRAME_BYTES}")
    return LENGTH.pack(len(body)) + body
