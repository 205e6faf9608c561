"""Work that waits for the network, several pieces at a time."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable

_POLL_S = 0.05
_LEAVE_S = 1.0


def side_by_side(
    work: Iterable[Callable[[], None]],
    at_once: int,
    stopped: threading.Event,
    *,
    watch: Callable[[], None],
    hang_up: Callable[[], None],
) -> None:
    """Does all of it, in so many threads; `watch` is called in this one, again and again, and once at the end.

    Raises the first error, whatever its kind. After one, and after Ctrl-C, `stopped` is set, which ends the others;
    after Ctrl-C `hang_up` ends what waits too.
    """
    waiting: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
    for each in work:
        waiting.put(each)
    errors = list[Exception]()

    def go() -> None:
        while not stopped.is_set():
            try:
                job = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                job()
            except Exception as error:  # of whatever kind: it is raised in the thread that waits
                errors.append(error)
                stopped.set()

    threads = [threading.Thread(target=go, name="hub", daemon=True) for _ in range(min(at_once, waiting.qsize()))]
    for thread in threads:
        thread.start()
    try:
        while alive := [thread for thread in threads if thread.is_alive()]:
            alive[0].join(_POLL_S)
            watch()
    except BaseException:  # Ctrl-C
        stopped.set()
        hang_up()
        for thread in threads:  # none of them shall write once the lock is another's
            thread.join(_LEAVE_S / len(threads))
        raise
    if errors:
        raise errors[0]
    watch()
