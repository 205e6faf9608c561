"""`ingle bench compare`: several runs in one picture, and their ratios to the first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from ingle.bench.serving import results
from ingle.bench.serving.options import CompareOptions
from ingle.bench.serving.pictures import page, png
from ingle.bench.serving.pictures.figure import Runs
from ingle.bench.serving.results import Figures, LevelResult, Report, Spread
from ingle.cli.table import print_table
from ingle.errors import ConfigError, printable

_MEASURES: tuple[tuple[str, float, Callable[[Figures], float | None]], ...] = (
    ("tok/s in all", 1, lambda figures: figures.output_tokens_per_s),
    ("tok/s of one", 1, lambda figures: _mean(figures.request_tokens_per_s)),
    ("TTFT ms", 1e3, lambda figures: _mean(figures.ttft_s)),
    ("TTFT p99 ms", 1e3, lambda figures: _p99(figures.ttft_s)),
    ("TPOT ms", 1e3, lambda figures: _mean(figures.tpot_s)),
    ("ITL p99 ms", 1e3, lambda figures: _p99(figures.itl_s)),
)
_MUST_AGREE = (
    *("input_len", "output_len", "range_ratio", "prefix_len", "num_prefixes", "turns", "dataset_path"),
    "temperature",
)


def compare(options: CompareOptions) -> None:
    """Raises `ConfigError`."""
    runs = _runs(options)
    for line in differences(runs):
        print("notice:", printable(line))
    for level in _shared(runs):
        where = "requests/s" if level[1] is not None else "at once"
        print(f"\n{level[1] if level[1] is not None else level[0]:g} {where}")
        print_table(*table(runs, level), right=range(1, 1 + len(_MEASURES)))
    output = options.output or Path("bench-compare.html")
    written = [page.write(output, runs)]
    picture = png.write(output.with_suffix(".png"), runs)
    if picture is None:
        print(png.MISSING)
    else:
        written.append(picture)
    print(f"written: {', '.join(map(str, written))}")


def table(runs: Runs, level: tuple[int | None, float | None]) -> tuple[list[str], list[list[str]]]:
    """Of one level: each figure, and how many times the first run's it is."""
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


def differences(runs: Runs) -> list[str]:
    """What makes runs hard to compare."""
    told = []
    first_name, first = runs[0]
    for name, run in runs[1:]:
        was, now = first.settings.get("data", {}), run.settings.get("data", {})
        apart = [key for key in _MUST_AGREE if was.get(key) != now.get(key)]
        if apart:
            told.append(f"{name} asked otherwise than {first_name}: {', '.join(apart)}")
        if run.server.get("endpoint") != first.server.get("endpoint"):
            told.append(
                f"{name} used /v1/{run.server.get('endpoint')}, {first_name} /v1/{first.server.get('endpoint')}"
            )
    for name, run in runs:
        if run.status != "complete":
            told.append(f"{name} was cut short: {run.stopped}")
        if limited := [level.title for level in run.levels if level.client.limited]:
            told.append(f"{name}: at {', '.join(limited)} the client was a limit of its own")
    return told


def _mean(spread: Spread | None) -> float | None:
    return None if spread is None else spread.mean


def _p99(spread: Spread | None) -> float | None:
    return None if spread is None else spread.p99


def _runs(options: CompareOptions) -> list[tuple[str, Report]]:
    if len(options.files) < 2:
        raise ConfigError("ingle bench compare needs two files or more, as `ingle bench serve` writes them")
    reports = [results.read(Path(file)) for file in options.files]
    if options.labels and len(options.labels) != len(reports):
        raise ConfigError(f"--labels names {len(options.labels)} runs of {len(reports)}")
    names = options.labels or _names([Path(file) for file in options.files])
    for name, report in zip(names, reports, strict=True):
        if not report.levels:
            raise ConfigError(f"{name}: no level of it was measured")
    if not _shared(list(zip(names, reports, strict=True))):
        raise ConfigError("these runs have no level in common: measure both at the same --concurrency or --rate")
    return list(zip(names, reports, strict=True))


def _names(files: Sequence[Path]) -> list[str]:
    """The files' own, with the folder where that is the same."""
    often = Counter(file.stem for file in files)
    return [file.stem if often[file.stem] == 1 else str(file.with_suffix("")) for file in files]


def _shared(runs: Runs) -> list[tuple[int | None, float | None]]:
    """The levels that all have, in the order of the first."""
    each = [[(level.concurrency, level.rate) for level in run.levels] for _, run in runs]
    return [level for level in each[0] if all(level in other for other in each[1:])]


def _at(run: Report, level: tuple[int | None, float | None]) -> LevelResult:
    return next(one for one in run.levels if (one.concurrency, one.rate) == level)
