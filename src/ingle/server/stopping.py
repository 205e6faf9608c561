"""How a server is told to end, and that it does so in time."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import queue
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ingle.server.engine_process import EngineProcess
    from ingle.server.fleet import Fleet

LAST_WORDS_S = 1.0
"""For what is said of answers that are given up to leave. What then still runs is cut off."""
_TIDY_S = 2.5
"""For the engine to end, and all else. With the default of --shutdown-timeout it is over 8.5 s after the signal: a
supervisor such as `docker stop` kills after 10 s, and then nobody tidies up."""
_AT_ONCE_S = 3.0
_LAST_RESORT_S = 1.0
"""After the time is up, for a thread of Python's to end the process before the C library's does."""
INTERRUPTED = 130
STOPPED = "the server is being stopped"
logger = logging.getLogger("ingle")


class Deadline:
    """Ends this process and its engines' by force, whatever their threads do, if they have not ended in time.

    Its thread is there from the start, and is told through a queue that a signal's handler may use: to start a thread
    takes locks, which the code that the signal interrupts may hold. Once Python itself ends, its threads run no more:
    what holds up that, faulthandler's timer ends, which needs no Python.
    """

    def __init__(self, process: EngineProcess | Fleet, grace_s: float = 5.0) -> None:
        """`grace_s`: until answers are given up."""
        self._process = process
        self.grace_s = grace_s
        self._serving_end_s = grace_s + LAST_WORDS_S + _TIDY_S
        self._told: queue.SimpleQueue[tuple[float, int]] = queue.SimpleQueue()
        threading.Thread(target=self._watch, name="deadline", daemon=True).start()

    def start(self, *, serving: bool, code: int) -> None:
        """From now on there are some seconds left, in which answers may end if it is `serving`. A second call can only
        make them fewer."""
        self._told.put((time.monotonic() + (self._serving_end_s if serving else _AT_ONCE_S), code))

    def _watch(self) -> None:
        end_s, code = self._told.get()
        with Path(os.devnull).open("w") as nowhere:
            while (left_s := end_s - time.monotonic()) > 0:
                faulthandler.dump_traceback_later(left_s + _LAST_RESORT_S, exit=True, file=nowhere)
                with contextlib.suppress(queue.Empty):
                    end_s = min(end_s, self._told.get(timeout=left_s)[0])
            self._end(code)

    def _end(self, code: int) -> None:
        self._process.kill()
        logger.warning("the server is ended by force: a thread of it does not end")
        logging.shutdown()
        os._exit(code)


def stop_while_loading(deadline: Deadline) -> None:
    """Until the server has handlers of its own, SIGTERM and SIGHUP end it at once.

    Whoever stops a server this way (`docker stop`, systemd) takes any code but 0 for a failure.
    """

    def stop(signum: int, frame: FrameType | None) -> None:
        deadline.start(serving=False, code=0)
        raise SystemExit(0)

    signal.signal(signal.SIGTERM, stop)
    if hears_hangup():
        signal.signal(signal.SIGHUP, stop)


def hears_hangup() -> bool:
    """False where whoever started the server wants it to outlive the terminal, as nohup does."""
    return signal.getsignal(signal.SIGHUP) != signal.SIG_IGN
