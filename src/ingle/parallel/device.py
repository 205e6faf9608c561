"""All ranks as one device: what rank 0 is told, the others are told first, and its report is that of all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ingle.device import Device, Launched, PageCopies, Report
from ingle.errors import ConfigError
from ingle.parallel.messages import Capture, Draw, Relieve
from ingle.parallel.team import Team
from ingle.step import Masks, Step


def _of_one_device(what: str) -> ConfigError:
    return ConfigError(
        f"{what} of models on one device alone",
        alternative="leave --tensor-parallel-size and --pipeline-parallel-size out",
    )


@dataclass(frozen=True, slots=True)
class _Launched:
    """A step whose forward is queued on all ranks."""

    own: Launched
    step: Step
    team: Team

    def logits(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        raise _of_one_device("logits are compared")

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
    masks: Masks = field(default_factory=Masks)

    def logits(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        raise _of_one_device("logits are compared")

    def sample(self, masks: Masks) -> None:
        self.masks = masks
        if self.step.masked:
            self.team.tell(Draw(masks))

    def report(self) -> Report:
        with self.team.in_step():
            self.own.apply(self.step)
            launched = self.own.forward(self.step)
            launched.sample(self.masks)
            report = launched.report()
            self.team.check()
            return report


class RanksDevice:
    """A `Device` of several ranks, of which `own` is this process's."""

    def __init__(self, own: Device, team: Team, *, later: bool = False) -> None:
        """`later`: what this rank computes of a step it begins when its report is wanted, as it would wait for ranks
        that begin it before, and could tell them nothing meanwhile."""
        self.own, self.team, self._later = own, team, later
        team.before_end(own.close)

    def pages(self) -> PageCopies:
        raise _of_one_device("pages are kept elsewhere")

    def apply(self, step: Step) -> None:
        self.team.tell(step)
        if not self._later:
            with self.team.in_step():
                self.own.apply(step)

    def forward(self, step: Step) -> Launched:
        if self._later:
            return _Later(self.own, step, self.team)
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
