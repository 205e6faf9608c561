"""What a check finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    check: str
    state: State
    text: str
    """A line for people."""
    advice: str | None = None
    """What to do about it."""


class Reporter:
    """Collects what one check finds."""

    def __init__(self, check: str) -> None:
        self.check = check
        self.findings: list[Finding] = []

    def ok(self, text: str) -> None:
        self.findings.append(Finding(self.check, "ok", text))

    def warn(self, text: str, advice: str | None = None) -> None:
        self.findings.append(Finding(self.check, "warn", text, advice))

    def fail(self, text: str, advice: str | None = None) -> None:
        self.findings.append(Finding(self.check, "fail", text, advice))
