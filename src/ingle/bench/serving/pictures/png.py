"""The panels as one PNG, where matplotlib is installed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ingle.bench.serving.pictures.axis import label, log_ticks
from ingle.bench.serving.pictures.figure import Panel, Runs, panels
from ingle.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MISSING = "no PNG is drawn, as matplotlib is not installed: pip install 'ingle[bench]'; the page has the same pictures"
COLOURS = ("#2a6fbb", "#d1711b", "#2f8f4e", "#b83a4b", "#7a55b5", "#8a6a45", "#c2579f", "#5f7681")
_DASHES = ("-", (0, (5, 3)), (0, (1.5, 2)))
_COLUMNS = 2


def write(path: Path, runs: Runs) -> Path | None:
    """None without matplotlib. Raises `ConfigError` for a place that cannot be written."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    drawn = panels(runs)
    rows = -(-len(drawn) // _COLUMNS)
    figure = Figure(figsize=(11, 3.5 * rows), layout="constrained")
    axes: list[Axes] = list(figure.subplots(rows, _COLUMNS, squeeze=False).flat)
    for panel, place in zip(drawn, axes, strict=False):
        _draw(place, panel)
    for place in axes[len(drawn) :]:
        place.set_axis_off()
    figure.suptitle(" · ".join(name for name, _ in runs), parse_math=False)
    try:
        figure.savefig(path, dpi=130)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from None
    return path


def _draw(axes: Axes, panel: Panel) -> None:
    for line in panel.lines:
        axes.plot(
            [point.x for point in line.points], [point.y for point in line.points], label=line.label,
            color=COLOURS[line.colour % len(COLOURS)], linestyle=_DASHES[line.dash % len(_DASHES)], linewidth=1.6,
            marker="o" if panel.x_ticks else None, markersize=4,
        )  # fmt: skip
    axes.set_title(panel.title, fontsize=11)
    axes.set_xlabel(panel.x_title)
    axes.set_ylabel(panel.y_title)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if panel.log_x:
        axes.set_xscale("log")
        xs = [point.x for line in panel.lines for point in line.points]
        ticks = list(panel.x_ticks) or [(tick, label(tick)) for tick in log_ticks(min(xs), max(xs))]
        axes.set_xticks([place for place, _ in ticks], [name for _, name in ticks])
        axes.minorticks_off()
    if panel.from_zero:
        axes.set_ylim(bottom=0)
    if len(panel.lines) > 1:
        for text in axes.legend(fontsize=8, frameon=False).get_texts():
            text.set_parse_math(False)
