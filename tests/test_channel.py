"""Messages between the processes: whatever way the bytes arrive, they come out whole and in order."""

from __future__ import annotations

import socket

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingle.channel import Abort, Channel, ChannelClosed, Progress, Start, message_encoder
from ingle.config import EngineConfig
from ingle.request import EngineRequest, Sampling

MESSAGES = [
    Start(EngineConfig.of("tiny", max_model_len=7), "/somewhere"),
    EngineRequest("a", [1, 2, 3], Sampling(temperature=0.5, stop_token_ids=(4,), logit_bias={3: 1.5}), (2,)),
    Abort("a"),
]


def frame(message: msgspec.Struct) -> bytes:
    body = message_encoder().encode(message)
    return len(body).to_bytes(4, "little") + body


@given(st.lists(st.integers(0, 300), max_size=6))
def test_frames_survive_any_split(cuts: list[int]) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        channel, data = Channel(ours), b"".join(map(frame, MESSAGES))
        received = []
        for start, end in zip([0, *sorted(cuts)], [*sorted(cuts), len(data)], strict=True):
            theirs.sendall(data[start:end])
            received += channel.receive(wait=False)
        assert received == MESSAGES


def test_a_peer_that_has_gone_is_noticed() -> None:
    ours, theirs = socket.socketpair()
    with ours:
        theirs.close()
        with pytest.raises(ChannelClosed):
            Channel(ours).receive(wait=True)
        with pytest.raises(ChannelClosed):
            Channel(ours).send(Progress("loading"))


def test_only_known_messages_are_read() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(frame(Progress("not for the engine")))
        with pytest.raises(msgspec.ValidationError):
            Channel(ours).receive(wait=False)
