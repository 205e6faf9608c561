"""How a command ends that is told to."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_TOLD = (signal.SIGTERM, signal.SIGHUP)


@contextmanager
def in_order() -> Iterator[None]:
    """A signal that would end the process at once ends it as Ctrl-C does: what is temporary is deleted, the terminal's
    cursor comes back, children are ended."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.getsignal(number) for number in _TOLD}
    own = [number for number, handler in before.items() if handler is signal.SIG_DFL]  # not what nohup ignores
    for number in own:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in own:
            signal.signal(number, signal.SIG_DFL)
