"""What is drawn of runs, apart from how: panels of lines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ingle.bench.serving.results import LevelResult, Report, Spread

Runs = Sequence[tuple[str, Report]]
"""With the name of each."""
_SHOWN_CURVES = 6


class Point(NamedTuple):
    x: float
    y: float


@dataclass(frozen=True)
class Line:
    label: str
    points: tuple[Point, ...]
    colour: int
    """Lines of one colour belong together."""
    dash: int = 0
    """0 is whole, higher numbers are more broken."""


@dataclass(frozen=True)
class Panel:
    title: str
    x_title: str
    y_title: str
    lines: tuple[Line, ...]
    x_ticks: tuple[tuple[float, str], ...] = ()
    """Where the axis is of levels; else it has round numbers."""
    log_x: bool = False
    from_zero: bool = True


def panels(runs: Runs) -> list[Panel]:
    """Throughput, speed of one request and latencies by level, and how the latencies of levels are spread."""
    levels = sorted({_place(level) for _, run in runs for level in run.levels})
    at_rate = any(level.rate is not None for _, run in runs for level in run.levels)
    x_title = "requests a second, sent" if at_rate else "requests at once"
    ticks = tuple((place, f"{place:g}") for place in levels)

    def by_level(title: str, y_title: str, lines: list[Line]) -> Panel:
        lines = [line for line in lines if line.points]
        return Panel(title, x_title, y_title, tuple(lines), x_ticks=ticks, log_x=True)

    def of_runs(value: Callable[[LevelResult], float | None]) -> list[Line]:
        return [_line(name, run, index, value) for index, (name, run) in enumerate(runs)]

    found = [
        by_level("Throughput", "output tokens/s", of_runs(lambda one: one.figures.output_tokens_per_s)),
        by_level("Speed of one request", "tokens/s", of_runs(lambda one: _mean(one.figures.request_tokens_per_s))),
    ]
    for title, field in (("Time to first token", "ttft_s"), ("Time between tokens", "itl_s")):
        each = (_percentiles(name, run, index, field, len(runs)) for index, (name, run) in enumerate(runs))
        found.append(by_level(title, "ms", [line for lines in each for line in lines]))
    for title, field in (("Time to first token, spread", "ttft_s"), ("Time between tokens, spread", "itl_s")):
        found.append(Panel(title, "ms", "% of them are faster", tuple(_curves(runs, field)), log_x=True))
    return [panel for panel in found if panel.lines]


def _place(level: LevelResult) -> float:
    return float(level.rate if level.rate is not None else level.concurrency or 0)


def _mean(spread: Spread | None) -> float | None:
    return None if spread is None else spread.mean


def _line(name: str, run: Report, colour: int, value: Callable[[LevelResult], float | None], dash: int = 0) -> Line:
    points = [Point(_place(level), y) for level in run.levels if (y := value(level)) is not None]
    return Line(name, tuple(sorted(points)), colour, dash)


def _percentiles(name: str, run: Report, index: int, field: str, num_runs: int) -> list[Line]:
    """p50, p90 and p99 of one run in three colours; of several, p50 and p99 of each in its own."""
    chosen = ("p50", "p90", "p99") if num_runs == 1 else ("p50", "p99")
    lines = []
    for number, percentile in enumerate(chosen):

        def value(level: LevelResult, percentile: str = percentile) -> float | None:
            spread = getattr(level.figures, field)
            return None if spread is None else getattr(spread, percentile) * 1e3

        label = percentile if num_runs == 1 else f"{name}, {percentile}"
        lines.append(_line(label, run, number if num_runs == 1 else index, value, 0 if num_runs == 1 else number))
    return lines


def _curves(runs: Runs, field: str) -> list[Line]:
    """Of one run a curve for each level, of several one for each run at the highest level that all have."""
    if len(runs) == 1:
        levels = [level for level in runs[0][1].levels if getattr(level.figures, field) is not None]
        step = max(-(-len(levels) // _SHOWN_CURVES), 1)
        chosen = levels[::-1][::step][::-1]
        return [_curve(f"at {level.title}", runs[0][1], level, field, index) for index, level in enumerate(chosen)]
    shared = set.intersection(*({_place(level) for level in run.levels} for _, run in runs))
    lines = []
    for index, (name, run) in enumerate(runs):
        for level in run.levels:
            if shared and _place(level) == max(shared) and getattr(level.figures, field) is not None:
                lines.append(_curve(f"{name}, at {level.title}", run, level, field, index))
    return lines


def _curve(label: str, run: Report, level: LevelResult, field: str, colour: int) -> Line:
    quantiles = getattr(level.figures, field).quantiles
    # What one read of the socket brought has no time between: on an axis of logarithms that is nowhere.
    least = max(getattr(level.figures, field).p50 / 20, 1e-6)
    points = [
        Point(max(second, least) * 1e3, percent) for percent, second in zip(run.percents, quantiles, strict=False)
    ]
    return Line(label, tuple(points), colour)
