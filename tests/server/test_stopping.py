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
