"""A panel as SVG, in colours of the page that it stands in."""

from __future__ import annotations

import math
from collections.abc import Callable
from html import escape

from ingle.bench.serving.pictures.axis import label, linear_ticks, log_ticks
from ingle.bench.serving.pictures.figure import Line, Panel

_WIDTH, _HEIGHT = 480, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 10, 42
NUM_COLOURS = 8
DASHES = ("", "6 4", "2 3")

_Scale = Callable[[float], float]


def svg(panel: Panel) -> str:
    """With no script and no size of its own: it is as wide as its place."""
    xs = [point.x for line in panel.lines for point in line.points]
    ys = [point.y for line in panel.lines for point in line.points]
    y_ticks = linear_ticks(0.0 if panel.from_zero else min(ys), max(ys))
    y = _linear(y_ticks[0], y_ticks[-1], _HEIGHT - _BOTTOM, _TOP)
    x, x_ticks = _x_axis(panel, min(xs), max(xs))
    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(panel.title)}: {escape(panel.y_title)} '
        f'by {escape(panel.x_title)}">'
    ]
    for tick in y_ticks:
        parts.append(f'<path class="grid" d="M{_LEFT} {y(tick):.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y(tick) + 3.5:.1f}" text-anchor="end">{label(tick)}</text>')
    for place, name in x_ticks:
        parts.append(f'<path class="grid" d="M{x(place):.1f} {_TOP}V{_HEIGHT - _BOTTOM}"/>')
        parts.append(
            f'<text x="{x(place):.1f}" y="{_HEIGHT - _BOTTOM + 15}" text-anchor="middle">{escape(name)}</text>'
        )
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    parts += [
        f'<path class="axis" d="M{_LEFT} {_TOP}V{_HEIGHT - _BOTTOM}H{_WIDTH - _RIGHT}"/>',
        f'<text class="title" x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 6}" text-anchor="middle">'
        f"{escape(panel.x_title)}</text>",
        f'<text class="title" transform="translate(12 {middle}) rotate(-90)" text-anchor="middle">'
        f"{escape(panel.y_title)}</text>",
        *(_drawn(line, x, y, panel) for line in panel.lines),
        "</svg>",
    ]
    return "".join(parts)


def key(line: Line) -> str:
    """The line's entry below the title."""
    dash = f' stroke-dasharray="{DASHES[line.dash % 3]}"' if line.dash else ""
    return (
        f'<span><svg class="key c{line.colour % NUM_COLOURS}" viewBox="0 0 26 8" aria-hidden="true">'
        f'<path class="line" d="M1 4H25"{dash}/></svg>{escape(line.label)}</span>'
    )


def _drawn(line: Line, x: _Scale, y: _Scale, panel: Panel) -> str:
    places = [(x(point.x), y(point.y)) for point in line.points]
    path = "M" + "L".join(f"{across:.1f} {down:.1f}" for across, down in places)
    dash = f' stroke-dasharray="{DASHES[line.dash % 3]}"' if line.dash else ""
    drawn = [f'<g class="c{line.colour % NUM_COLOURS}"><path class="line" d="{path}"{dash}/>']
    for point, (across, down) in zip(line.points, places, strict=True):
        told = f"{line.label}: {label_of(point.y)} {panel.y_title} at {label_of(point.x)} {panel.x_title}"
        kind = 'r="3.2"' if panel.x_ticks else 'r="4" class="unseen"'
        drawn.append(f'<circle cx="{across:.1f}" cy="{down:.1f}" {kind}><title>{escape(told)}</title></circle>')
    return "".join([*drawn, "</g>"])


def label_of(number: float) -> str:
    return f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.3g}"


def _x_axis(panel: Panel, low: float, high: float) -> tuple[_Scale, list[tuple[float, str]]]:
    left, right = _LEFT + (12 if panel.x_ticks else 4), _WIDTH - _RIGHT - (12 if panel.x_ticks else 4)
    if not panel.log_x:
        ticks = linear_ticks(low, high)
        return _linear(ticks[0], ticks[-1], left, right), [(tick, label(tick)) for tick in ticks]
    if low == high:
        low, high = low / 1.5, high * 1.5
    scale = _linear(math.log(low), math.log(high), left, right)

    def x(value: float) -> float:
        return scale(math.log(value))

    ticks_shown = list(panel.x_ticks) or [(tick, label(tick)) for tick in log_ticks(low, high)]
    return x, _apart(ticks_shown, x)


def _apart(ticks: list[tuple[float, str]], x: _Scale) -> list[tuple[float, str]]:
    """Without those whose names would run into the one before."""
    kept: list[tuple[float, str]] = []
    for place, name in ticks:
        if not kept or x(place) - x(kept[-1][0]) > 4 + 3.2 * (len(name) + len(kept[-1][1])):
            kept.append((place, name))
    return kept


def _linear(low: float, high: float, start: float, end: float) -> _Scale:
    slope = (end - start) / (high - low or 1.0)
    return lambda value: start + (value - low) * slope
