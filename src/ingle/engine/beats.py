"""Signs of life of the engine's process: a thread says what its loop does, and for how long nothing came of that.

A process that is stopped or dead says nothing. One whose loop hangs goes on saying so, and the figure grows.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable

from ingle.channel import Beat, Channel, ChannelClosed, Stage

BEAT_S = 0.5
_UNWIND_S = 5.0
"""For the loop to end with its channel, before the process is ended whatever the loop does."""


class Beats:
    """Says what `doing` was told last."""

    def __init__(self, channel: Channel) -> None:
        self.progress: Callable[[], int] = lambda: 0
        """A number that changes while a long stage gets on. Asked from a thread."""
        self._channel = channel
        self._stage: Stage = "loading"
        self._num_stages = 0
        self._seen = (-1, -1)
        self._since_s = 0.0

    def start(self) -> None:
        threading.Thread(target=self._beat, name="beats", daemon=True).start()

    def doing(self, stage: Stage) -> None:
        """Also when it is the same again: something came of it."""
        self._stage = stage
        self._num_stages += 1

    def beat(self, now_s: float) -> Beat:
        stage, seen = self._stage, (self._num_stages, self.progress())
        if seen != self._seen:
            self._seen, self._since_s = seen, now_s
        return Beat(stage, now_s - self._since_s)

    def _beat(self) -> None:
        try:
            while True:
                self._channel.send(self.beat(time.monotonic()))
                time.sleep(BEAT_S)
        except ChannelClosed:  # whoever started this process has gone
            os.kill(os.getpid(), signal.SIGTERM)  # unwinds what the loop does, where it can be
            time.sleep(_UNWIND_S)
            os._exit(1)
