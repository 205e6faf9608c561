"""All ranks as one device: what rank 0 is told, the others are told first, and its report is that of all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ingle.device import Device, Launched, PageCopies, Report
from ingle.parallel.messages import Capture, Draw, Logits, Relieve
from ingle.parallel.pages import Progress, RankPages
from ingle.parallel.team import Team
from ingle.step import Masks, Step


@dataclass(frozen=True, slots=True)
class _Launched:
    """A step whose forward is queued on all ranks."""

    own: Launched
    step: Step
    team: Team

    def logits(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Of a step that is `masked`: the others have drawn for any other."""
        assert self.step.masked
        self.team.tell(Logits(start, stop))
        with self.team.in_step():
            return self.own.logits(start, stop)

    def sample(self, masks: Masks) -> None:
        if self.step.masked:
            self.team.tell(Draw(masks))
        with self.team.in_step():
            self.own.sample(masks)

    def report(self) -> Report:
        with self.team.in_step():
            report = self.own.report()
            self.team.check()  # what was computed without a rank that is gone is nothing
            return report


@dataclass(slots=True)
class _Later:
    """A step that the others compute, and this rank once its report is wanted."""

    own: Device
    step: Step
    team: Team
    progress: Progress
    masks: Masks = field(default_factory=Masks)
    launched: Launched | None = None

    def logits(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        assert self.step.masked
        self.team.tell(Logits(start, stop))
        with self.team.in_step():
            return self._begun().logits(start, stop)

    def sample(self, masks: Masks) -> None:
        self.masks = masks
        if self.step.masked:
            self.team.tell(Draw(masks))

    def _begun(self) -> Launched:
        if self.launched is None:
            self.own.apply(self.step)
            self.progress.num_applied += 1
            self.launched = self.own.forward(self.step)
        return self.launched

    def report(self) -> Report:
        with self.team.in_step():
            launched = self._begun()
            launched.sample(self.masks)
            report = launched.report()
            self.team.check()
            return report


class RanksDevice:
    """A `Device` of several ranks, of which `own` is this process's."""

    def __init__(self, own: Device, team: Team, page_bytes: Sequence[int], *, later: bool = False) -> None:
        """`page_bytes`: of each rank's part of a page. `later`: what this rank computes of a step it begins when its
        report is wanted, as it would wait for ranks that begin it before, and could tell them nothing meanwhile."""
        self.own, self.team, self._later = own, team, later
        self._page_bytes, self._progress = page_bytes, Progress()
        team.before_end(own.close)

    def pages(self) -> PageCopies:
        return RankPages(self.own.pages(), self.team, self._page_bytes, lambda: self._progress.wait(self.team.check))

    def apply(self, step: Step) -> None:
        self._progress.num_told += 1
        self.team.tell(step)
        if not self._later:
            with self.team.in_step():
                self.own.apply(step)
            self._progress.num_applied += 1

    def forward(self, step: Step) -> Launched:
        if self._later:
            return _Later(self.own, step, self.team, self._progress)
        with self.team.in_step():
            return _Launched(self.own.forward(step), step, self.team)

    def usable(self) -> bool:
        return self.team.lives and self.own.usable()

    def relieve(self) -> None:
        self.team.tell(Relieve())
        self.own.relieve()

    def progress(self) -> int:
        return self.own.progress()

    def if_stuck(self, last_resort: Callable[[str], None]) -> None:
        self.team.if_stuck(last_resort)

    def close(self) -> None:
        self.team.close()

    def capture_next(self) -> bool:
        self.team.tell(Capture())
        with self.team.in_step():
            return self.own.capture_next()
