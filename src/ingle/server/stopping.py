"""How a server is told to end, and that it does so in time."""

from __future__ import annotations

import logging
import os
import signal
import threading
from types import FrameType

from ingle.server.engine_process import EngineProcess

GRACE_S = 5.0
"""Until answers are given up."""
LAST_WORDS_S = 1.0
"""For what is said of that to leave. What then still runs is cut off."""
_SERVING_END_S = 8.5
"""A supervisor such as `docker stop` kills after 10 s, and then nobody tidies up."""
_LOADING_END_S = 3.0
INTERRUPTED = 130
STOPPED = "the server is being stopped"
logger = logging.getLogger("ingle")


class Deadline:
    """Ends this process and the engine's by force, whatever their threads do, if they have not ended in time."""

    def __init__(self, process: EngineProcess) -> None:
        self._process = process
        self._running = False

    def start(self, *, serving: bool, code: int) -> None:
        """From now on there are some seconds left. A second call changes nothing."""
        if self._running:
            return
        self._running = True
        timer = threading.Timer(_SERVING_END_S if serving else _LOADING_END_S, self._end, (code,))
        timer.daemon = True
        timer.start()

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
