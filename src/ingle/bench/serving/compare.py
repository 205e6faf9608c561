"""`ingle bench compare`: several runs in one picture, and their ratios to the first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ingle.bench.serving import results
from ingle.bench.serving.options import CompareOptions
from ingle.bench.serving.pictures import page, png
from ingle.bench.serving.pictures.figure import Runs
from ingle.bench.serving.ratios import shared_levels, table
from ingle.bench.serving.results import Report
from ingle.cli.table import print_table
from ingle.errors import ConfigError, printable

_MUST_AGREE = (
    *("input_len", "output_len", "range_ratio", "prefix_len", "num_prefixes", "turns", "dataset_path"),
    "temperature",
)


def compare(options: CompareOptions) -> None:
    """Raises `ConfigError`."""
    output = options.output or Path("bench-compare.html")
    if output.suffix != ".html":
        raise ConfigError(f"--output {output}: give an .html file; the picture goes beside it")
    runs = _runs(options)
    for line in differences(runs):
        print("notice:", printable(line))
    for level in shared_levels(runs):
        head, rows = table(runs, level)
        print(f"\n{level.title} {'at once' if level.rate is None else ''}".rstrip())
        print_table(head, rows, right=range(1, len(head)))
    written = [page.write(output, runs)]
    picture = png.write(output.with_suffix(".png"), runs)
    if picture is None:
        print(png.MISSING)
    else:
        written.append(picture)
    print(f"written: {', '.join(map(str, written))}")


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
    if not shared_levels(list(zip(names, reports, strict=True))):
        raise ConfigError("these runs have no level in common: measure both at the same --concurrency or --rate")
    return list(zip(names, reports, strict=True))


def _names(files: Sequence[Path]) -> list[str]:
    """The files' own, with the folder where that is the same."""
    often = Counter(file.stem for file in files)
    return [file.stem if often[file.stem] == 1 else str(file.with_suffix("")) for file in files]
