"""A server that is told to end does, although a thread of it is busy."""

from __future__ import annotations

import subprocess
import sys
import time

CODE = """
import threading, time
from ingle.server import stopping

class Process:
    def kill(self):
        print("killed", flush=True)

stopping.LAST_WORDS_S = stopping._TIDY_S = 0.1
deadline = stopping.Deadline(Process(), 0.1)
deadline.start(serving=True, code=7)
deadline.start(serving=True, code=8)  # a second signal
threading.Thread(target=time.sleep, args=(60,)).start()  # which Python waits for as it exits
"""


def test_the_deadline_holds_although_a_thread_is_busy() -> None:
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (7, "killed\n")
    assert time.monotonic() - started < 10


LAST = """
import sys, time
from ingle.server import stopping

class Process:
    def kill(self):
        print("killed", flush=True)

stopping._AT_ONCE_S = stopping._LAST_RESORT_S = 0.5
late = eval("lambda self: sleep(60)", {"sleep": time.sleep})
sys.late = type("Late", (), {"__del__": late})()  # ends when Python's threads no longer run
stopping.Deadline(Process()).start(serving=False, code=7)
time.sleep(0.1)
"""


def test_the_deadline_holds_although_python_itself_does_not_end() -> None:
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", LAST], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (1, "")
    assert time.monotonic() - started < 10


SHORTER = CODE.replace("deadline.start(serving=True, code=8)", "deadline.start(serving=False, code=8)").replace(
    "stopping._TIDY_S = 0.1", "60.0; stopping._AT_ONCE_S = 0.3"
)


def test_a_second_signal_shortens_the_time() -> None:
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", SHORTER], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (7, "killed\n")
    assert time.monotonic() - started < 10
