"""`ingle doctor`: what is wrong on this machine, and what to do about it."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from ingle.cli.flags import parse
from ingle.cli.main import EXIT_ERROR
from ingle.config import EngineConfig, ServerConfig, TextConfig
from ingle.errors import ConfigError, printable

if TYPE_CHECKING:
    from ingle.doctor.finding import Finding

_NO_MODEL = ""
_UNICODE = {"ok": "✓", "warn": "!", "fail": "✗", "do": "→"}
_ASCII = {"ok": "ok", "warn": "!", "fail": "X", "do": "->"}
_MAX_CHARS = 1000
"""Of a line."""


@dataclass(frozen=True)
class Doctor:
    """Say what is wrong on this machine and what to do: Python, PyTorch, GPUs, compiler, memory, disk, hubs, port.

    With MODEL, which may be left out, also what of it would fail here: the flags are those of `ingle serve`.

    Each line begins with a tick, ! for what may do, or a cross for what fails. The exit code is 1 if something fails.

    Nothing is downloaded or changed.
    """

    engine: EngineConfig
    text: TextConfig
    server: ServerConfig
    timeout: float = 20.0
    """Seconds that importing PyTorch, or another thing that is tried, may take."""
    json: bool = False
    """Print JSON."""

    def __post_init__(self) -> None:
        if not 0.0 < self.timeout < math.inf:
            raise ConfigError(f"--timeout {self.timeout} is not a time: give seconds above 0")


def main(argv: Sequence[str]) -> None:
    flags = parse(Doctor, argv, command="doctor", default_model=_NO_MODEL)
    from ingle.cli.loading import Status
    from ingle.doctor.checks import run
    from ingle.doctor.here import Here, Question

    engine = flags.engine if flags.engine.model != _NO_MODEL else None
    server = flags.server
    here = Here(Question(server.host, server.port, engine, flags.text, server, flags.timeout))
    found, status = [], Status()
    looking = ""

    def waiting(names: str) -> None:
        nonlocal looking
        if names != looking and not flags.json:
            looking = names
            status.report(f"looking at {names}")

    try:
        for finding in run(here, waiting):
            found.append(finding)
            if not flags.json:
                for line in lines(finding, sys.stdout.encoding):
                    status.line(line, sys.stdout)
    finally:
        status.end()
    fails = any(finding.state == "fail" for finding in found)
    if flags.json:
        print(json.dumps({"ok": not fails, "findings": [asdict(each) for each in found]}, ensure_ascii=False, indent=1))
    else:
        print(summary(found))
    if fails:
        raise SystemExit(EXIT_ERROR)


def lines(finding: Finding, encoding: str) -> list[str]:
    """As people read it, in characters that their terminal has."""
    marks = _UNICODE
    try:
        "".join(_UNICODE.values()).encode(encoding)
    except (UnicodeEncodeError, LookupError):
        marks = _ASCII
    width = max(len(mark) for mark in marks.values() if mark != marks["do"])
    said = [f"{marks[finding.state]:<{width}} {finding.check:<9} {printable(finding.text)[:_MAX_CHARS]}"]
    if finding.advice is not None:
        said.append(f"{'':<{width + 11}}{marks['do']} {printable(finding.advice)[:_MAX_CHARS]}")
    return said


def summary(found: Sequence[Finding]) -> str:
    fails, warnings = (sum(each.state == state for each in found) for state in ("fail", "warn"))
    if fails:
        return f"{fails} thing{'s' * (fails > 1)} to repair" + (f", {warnings} to know" if warnings else "")
    return f"nothing to repair, {warnings} thing{'s' * (warnings > 1)} to know" if warnings else "all is well"
