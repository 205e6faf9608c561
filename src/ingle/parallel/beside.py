"""What may never end is called in threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable


def call_beside(calls: Iterable[Callable[[], object]], within_s: float = threading.TIMEOUT_MAX) -> None:
    """All at once, each in a thread of its own, of which none is waited for for longer than that.

    While an interpreter of Python 3.12 ends it starts no thread: then they are called one after the other.
    """
    until_s = time.monotonic() + within_s
    begun = []
    for call in calls:
        thread = threading.Thread(target=call, name="ending ranks", daemon=True)
        try:
            thread.start()
        except RuntimeError:
            call()
        else:
            begun.append(thread)
    for thread in begun:
        thread.join(min(max(until_s - time.monotonic(), 0), threading.TIMEOUT_MAX))
