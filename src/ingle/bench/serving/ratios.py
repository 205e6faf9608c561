"""Several runs beside each other, in numbers: each figure, and how many times the first run's it is."""

from __future__ import annotations

from collections.abc import Callable

from ingle.bench.serving.options import Level
from ingle.bench.serving.pictures.figure import Runs
from ingle.bench.serving.results import Figures, LevelResult, Report, Spread

_MEASURES: tuple[tuple[str, float, Callable[[Figures], float | None]], ...] = (
    ("tok/s in all", 1, lambda figures: figures.output_tokens_per_s),
    ("tok/s of one", 1, lambda figures: _mean(figures.request_tokens_per_s)),
    ("TTFT ms", 1e3, lambda figures: _mean(figures.ttft_s)),
    ("TTFT p99 ms", 1e3, lambda figures: _p99(figures.ttft_s)),
    ("TPOT ms", 1e3, lambda figures: _mean(figures.tpot_s)),
    ("ITL p99 ms", 1e3, lambda figures: _p99(figures.itl_s)),
)


def table(runs: Runs, level: Level) -> tuple[list[str], list[list[str]]]:
    """Of one level: a head, and a row for each run."""
    head = ["", *(name for name, _, _ in _MEASURES)]
    found = [(name, _at(run, level)) for name, run in runs]
    base = found[0][1].figures
    rows = []
    for index, (name, one) in enumerate(found):
        cells = [name]
        for _, scale, measure in _MEASURES:
            value, first = measure(one.figures), measure(base)
            ratio = f" ({value / first:.2f}x)" if index and value is not None and first else ""
            cells.append("-" if value is None else f"{value * scale:,.2f}{ratio}")
        rows.append(cells)
    return head, rows


def _mean(spread: Spread | None) -> float | None:
    return None if spread is None else spread.mean


def _p99(spread: Spread | None) -> float | None:
    return None if spread is None else spread.p99


def shared_levels(runs: Runs) -> list[Level]:
    """The levels that all have, in the order of the first."""
    each = [[Level(level.concurrency, level.rate) for level in run.levels] for _, run in runs]
    return [level for level in each[0] if all(level in other for other in each[1:])]


def _at(run: Report, level: Level) -> LevelResult:
    return next(one for one in run.levels if (one.concurrency, one.rate) == level)
