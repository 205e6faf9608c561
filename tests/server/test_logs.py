"""The log is written by a thread of its own, to a pipe that may be full, shared or gone."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from ingle.server import logs
from ingle.server.logs import BackgroundLog, formatter

Pipe = tuple[int, int]


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    ends = os.pipe()
    yield ends
    for end in ends:
        with contextlib.suppress(OSError):
            os.close(end)


def logger_of(handler: logging.Handler) -> logging.Logger:
    logger = logging.Logger("test")
    logger.addHandler(handler)
    return logger


def read(pipe: Pipe, until: bytes) -> bytes:
    data = b""
    while until not in data:
        data += os.read(pipe[0], 1 << 16)
    return data


@pytest.mark.parametrize("blocking", [True, False])
def test_lines_come_in_order_and_whole(pipe: Pipe, blocking: bool) -> None:
    os.set_blocking(pipe[1], blocking)
    logger = logger_of(BackgroundLog(pipe[1]))
    for number in range(5000):
        logger.warning("line %d 你好 \ud83d", number)
    lines = read(pipe, b"line 4999").decode(errors="replace").splitlines()
    assert [line.split()[1] for line in lines] == [str(number) for number in range(5000)]


def test_a_full_pipe_drops_lines_counts_them_and_holds_nobody_up(pipe: Pipe) -> None:
    handler = BackgroundLog(pipe[1], max_lines=100)
    logger = logger_of(handler)
    started = time.monotonic()
    for number in range(3000):
        logger.warning("line %d %s", number, "x" * 200)
    assert time.monotonic() - started < 1.0
    handler.flush()
    assert time.monotonic() - started < 3.0, "flushing waits a second at most"
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read, pipe, b"the end")
        while handler._lines:  # else the last line may be dropped, too
            time.sleep(0.01)
        logger.warning("the end")
        lines = reading.result().decode().splitlines()
    dropped = [int(line.split()[0]) for line in lines if "lines were dropped here" in line]
    assert sum(dropped) == 3000 - sum(line.startswith("line ") for line in lines) > 0


def test_a_pipe_that_is_gone_is_no_error(pipe: Pipe, capsys: pytest.CaptureFixture[str]) -> None:
    os.close(pipe[0])
    handler = BackgroundLog(pipe[1])
    logger_of(handler).warning("to nobody")
    handler.flush()
    assert capsys.readouterr() == ("", "")


def test_what_was_logged_is_written_when_it_is_flushed(pipe: Pipe) -> None:
    handler = BackgroundLog(pipe[1])
    logger_of(handler).warning("last words")
    handler.flush()
    os.set_blocking(pipe[0], False)
    assert os.read(pipe[0], 100) == b"last words\n"


def test_a_disk_that_has_room_again_goes_on_where_a_line_begins(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    room = [12]
    write = os.write

    def limited(fd: int, data: memoryview) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        count = write(fd, data[: room[0]])
        room[0] -= count
        return count

    monkeypatch.setattr(logs.os, "write", limited)
    handler = BackgroundLog(pipe[1])
    logger = logger_of(handler)
    for text in ("whole", "this one is torn", "lost"):
        logger.warning(text)
        handler.flush()
    room[0] = 1 << 20
    logger.warning("again")
    handler.flush()
    lines = read(pipe, b"again").decode().splitlines()
    assert lines == ["whole", "this o", "2 lines are missing here: they could not be written", "again"]


def test_what_the_log_says_of_itself_is_json_too(pipe: Pipe) -> None:
    handler = BackgroundLog(pipe[1], max_lines=10)
    handler.setFormatter(formatter("json"))
    logger = logger_of(handler)
    for number in range(5000):
        logger.warning("line %d %s", number, "x" * 2000)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read, pipe, b"the end")
        while handler._lines:
            time.sleep(0.01)
        logger.warning("the end")
        messages = [json.loads(line)["message"] for line in reading.result().decode().splitlines()]
    assert any("lines were dropped here" in message for message in messages)


def test_a_line_that_cannot_be_made_is_told(pipe: Pipe, capsys: pytest.CaptureFixture[str]) -> None:
    handler = BackgroundLog(pipe[1])
    logger_of(handler).warning("%d", "no number")
    assert b"could not be written: TypeError" in read(pipe, b"\n")
    assert capsys.readouterr() == ("", "")
