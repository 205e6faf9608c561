"""One writer and several readers, each at its pace."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Iterator

import pytest

from ingle.parallel.ring import Reader, Writer, shared_memory


@pytest.fixture
def file() -> Iterator[int]:
    file = shared_memory(3, 1 << 14)
    yield file
    os.close(file)


def test_every_reader_gets_every_message(file: int) -> None:
    """Also those that are larger than the ring."""
    chosen = random.Random(1)
    messages = [chosen.randbytes(chosen.choice((0, 1, 7, 100, 5_000, 50_000))) for _ in range(200)]
    got: list[list[bytes]] = [[], [], []]

    def read(index: int) -> None:
        reader = Reader(file, 3, index)
        while len(got[index]) < len(messages):
            if (message := reader.receive(1.0)) is not None:
                got[index].append(message)

    threads = [threading.Thread(target=read, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    writer = Writer(file, 3)
    for message in messages:
        writer.send(message)
    for thread in threads:
        thread.join()
    assert got == [messages] * 3


def test_nothing_comes_of_nothing(file: int) -> None:
    begun = time.monotonic()
    assert Reader(file, 3, 0).receive(0.05) is None
    assert time.monotonic() - begun >= 0.05


def test_a_writer_does_not_wait_for_readers_that_are_gone(file: int) -> None:
    writer, asked = Writer(file, 3), []

    def alive() -> None:
        asked.append(1)
        if len(asked) == 3:
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        writer.send(bytes(1 << 15), alive)


def test_damage_is_seen(file: int) -> None:
    writer, reader = Writer(file, 3), Reader(file, 3, 0)
    writer.send(b"one")
    os.pwrite(file, b"\xff\xff", 4096 + 4)
    with pytest.raises(ValueError, match="piece 65535 of the ring stands where piece 1 should"):
        reader.receive(1.0)
