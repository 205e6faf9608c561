"""Signs of life of the engine's process."""

from __future__ import annotations

import socket
import subprocess
import sys
import time

from ingle.channel import Beat
from ingle.engine.beats import Beats
from ingle.server.pulse import Pulse

BUSY = """
import re, socket, sys
from ingle.channel import Channel
from ingle.engine.beats import Beats
channel = Channel(socket.socket(fileno=int(sys.argv[1])))
beats = Beats(channel)
beats.start()
beats.doing("stepping")
sys.stdin.readline()
re.match(r"(a+)+$", "a" * 60 + "b")  # for ages, in C, with Python's lock
"""


def test_a_beat_tells_for_how_long_nothing_came_of_a_stage() -> None:
    beats, done = Beats(None), 0  # type: ignore[arg-type]
    beats.progress = lambda: done
    assert beats.beat(10.0) == Beat("loading", 0.0)
    assert beats.beat(13.0) == Beat("loading", 3.0)
    beats.doing("stepping")
    assert beats.beat(14.0) == Beat("stepping", 0.0)
    assert beats.beat(15.0) == Beat("stepping", 1.0)
    done = 1
    assert beats.beat(16.0) == Beat("stepping", 0.0), "a part of a step is something"
    beats.doing("stepping")
    assert beats.beat(18.0) == Beat("stepping", 0.0), "and so is the end of one"


def test_code_that_keeps_pythons_lock_shows_signs_of_life() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-c", BUSY, str(theirs.fileno())], pass_fds=[theirs.fileno()], stdin=subprocess.PIPE
        )
    try:
        assert ours.recv(1 << 16), "it beats"
        assert process.stdin is not None
        process.stdin.write(b"\n")
        process.stdin.flush()
        ours.settimeout(1.5)
        while True:  # until it is silent, which is three beats
            try:
                assert ours.recv(1 << 16)
            except TimeoutError:
                break
        pulse = Pulse(process.pid, 300.0)
        pulse.heard(Beat("stepping", 0.0))
        for _ in range(20):
            time.sleep(0.1)
            pulse.tick(pending=True)
        assert pulse._lifeless_s < 1.0 < pulse._silent_s and pulse.unwell() is None
    finally:
        process.kill()
        process.wait()
        ours.close()


def test_a_process_whose_parent_has_gone_ends_in_the_middle_of_a_step() -> None:
    """Where Linux's signal does not: the loop here does not look at its channel."""
    code = BUSY.replace('re.match(r"(a+)+$", "a" * 60 + "b")', "import time, ingle.engine.beats\ntime.sleep(600)")
    code = code.replace("beats.start()", "import ingle.engine.beats as b, signal; b._UNWIND_S = 0.1; signal.signal("
                        "signal.SIGTERM, signal.SIG_IGN); beats.start()")  # fmt: skip
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(theirs.fileno())], pass_fds=[theirs.fileno()], stdin=subprocess.PIPE
        )
    assert ours.recv(1 << 16)
    assert process.stdin is not None
    process.stdin.write(b"\n")
    process.stdin.flush()
    ours.close()
    try:
        assert process.wait(timeout=20) == 1
    finally:
        process.kill()
