"""What a check finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ingle.config import EngineConfig

State = Literal["ok", "warn", "fail"]
MARKS: dict[State, str] = {"ok": "✓", "warn": "!", "fail": "✗"}


@dataclass(frozen=True)
class Finding:
    check: str
    state: State
    text: str
    advice: str | None = None
    """What to do about it."""


@dataclass(frozen=True)
class Question:
    """What the checks are about."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0 for any, of which one is always free."""
    engine: EngineConfig | None = None
    """A model that is to be served, and how."""


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
