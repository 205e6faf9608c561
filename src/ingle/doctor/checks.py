"""The checks, in the order in which their findings are told, and their run: all at once, each with a time limit."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from ingle.doctor import gpus, machine, model, network, software
from ingle.doctor.finding import Finding, Reporter
from ingle.doctor.here import Here

_POLL_S = 0.1
_GRACE_S = 5.0
"""For what a check does beside its probe."""


class Check(NamedTuple):
    name: str
    function: Callable[[Here, Reporter], None]
    patience: int = 1
    """How many times `--timeout` it may take."""


CHECKS = (
    Check("Python", software.check_python),
    Check("packages", software.check_packages),
    Check("extras", software.check_extras),
    Check("PyTorch", software.check_torch),
    Check("GPUs", gpus.check_gpus),
    Check("Triton", gpus.check_triton, gpus.TRITON_PATIENCE),
    Check("links", gpus.check_links),
    Check("NCCL", gpus.check_nccl, gpus.NCCL_PATIENCE),
    Check("compiler", software.check_compiler),
    Check("kernels", software.check_kernels),
    Check("memory", machine.check_memory),
    Check("limits", machine.check_limits),
    Check("disk", machine.check_disk),
    Check("hubs", network.check_hubs),
    Check("clock", network.check_clock),
    Check("port", network.check_port),
    Check("model", model.check_model, model.PATIENCE),
)


def run(here: Here, waiting: Callable[[str], None] = lambda names: None) -> Iterator[Finding]:
    """Findings in the order of `CHECKS`, each as soon as it and those before it are there.

    `waiting` hears, many times a second, what is still looked at. When the iteration ends, or is closed, nothing that
    was started runs on.
    """
    started = [_Started(check, here) for check in CHECKS]
    try:
        for each in started:
            while not each.ended.wait(_POLL_S) and time.monotonic() < each.deadline:
                waiting(", ".join(other.check.name for other in started if not other.ended.is_set()))
            yield from each.findings()
    finally:
        here.children.end()


class _Started:
    """A check in a thread that is left behind where it hangs, as on a disk that does not answer."""

    def __init__(self, check: Check, here: Here) -> None:
        self.check = check
        self.ended = threading.Event()
        # Some wait for another's probe, of nvidia-smi or PyTorch.
        self.deadline = time.monotonic() + (check.patience + 1) * here.question.timeout_s + _GRACE_S
        self._here = here
        self._report = Reporter(check.name)
        threading.Thread(target=self._look, name=check.name, daemon=True).start()

    def _look(self) -> None:
        try:
            self.check.function(self._here, self._report)
        except Exception as error:  # of a check too: what it looks at may be broken in ways that nobody thought of
            words = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            self._report.fail(f"cannot be looked at: {words}", "this is a mistake of ingle's, or a broken package")
        finally:
            self.ended.set()

    def findings(self) -> list[Finding]:
        if not self.ended.is_set():
            return [Finding(self.check.name, "fail", "looking at it does not come to an end", "a disk or driver hangs")]
        return self._report.findings
