# ruff: noqa: E501 (styles stand as they are written)
"""One HTML file with all of a run, or of several beside each other: it loads nothing, and needs no script."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path

from ingle.bench.serving.pictures.figure import Panel, Runs, panels
from ingle.bench.serving.pictures.png import COLOURS
from ingle.bench.serving.pictures.svg import key, svg
from ingle.bench.serving.ratios import shared_levels, table
from ingle.bench.serving.remarks import done, remarks, shown
from ingle.bench.serving.results import LevelResult, Report, Spread
from ingle.errors import ConfigError

_DARK_COLOURS = ("#6cb2f5", "#f0a35c", "#6fce8c", "#f08493", "#b79bf0", "#c9a77c", "#ef97d2", "#a3b8c2")
_STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1d2329; --faint: #5b6670; --rule: #dfe4e8; --box: #f6f8f9; LIGHT }
@media (prefers-color-scheme: dark) {
  :root { --page: #14181c; --ink: #e4e9ed; --faint: #9aa7b1; --rule: #2e363d; --box: #1b2126; DARK }
}
body { background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1160px;
  padding: 24px 18px 48px; }
h1 { font-size: 22px; margin: 0 0 2px; } h2 { font-size: 17px; margin: 30px 0 8px; }
p { margin: 4px 0; } .faint, figcaption, dt { color: var(--faint); }
.note { border-left: 3px solid var(--c1); padding-left: 10px; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(400px, 100%), 1fr)); gap: 18px; margin-top: 18px; }
figure { margin: 0; background: var(--box); border: 1px solid var(--rule); border-radius: 8px; padding: 12px 12px 6px; }
figure h2 { font-size: 15px; margin: 0; }
figcaption { font-size: 12.5px; min-height: 20px; display: flex; flex-wrap: wrap; gap: 2px 14px; }
figcaption span { white-space: nowrap; }
svg { width: 100%; height: auto; display: block; } svg.key { width: 26px; height: 8px; display: inline; margin-right: 5px; }
svg text { font-size: 11px; fill: var(--faint); } .grid { stroke: var(--rule); } .axis { stroke: var(--faint); fill: none; }
.line { fill: none; stroke: var(--c); stroke-width: 2; stroke-linejoin: round; } circle { fill: var(--c); }
circle.unseen { opacity: 0; } circle:hover { opacity: 1; stroke: var(--ink); stroke-width: 2; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; }
th, td { text-align: right; padding: 4px 7px; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th { font-weight: 600; color: var(--faint); } th[colspan] { text-align: center; border-left: 1px solid var(--rule); } th:first-child, td:first-child { text-align: left; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; font-size: 13.5px; margin: 0; }
dd { margin: 0; overflow-wrap: anywhere; }
"""
_MEANS = """
<dl>
<dt>tok/s of one</dt><dd>output tokens of a request by its whole time, the wait for the first included; the mean of all
 requests</dd>
<dt>tok/s in all</dt><dd>output tokens of all requests by the time from the first request to the last token</dd>
<dt>TTFT</dt><dd>from sending a request to its first token</dd>
<dt>TPOT</dt><dd>of a request, the time behind its first event by the tokens that came in it</dd>
<dt>ITL</dt><dd>between two tokens; an event with several tokens shares its time among them</dd>
<dt>client</dt><dd>processor time of what measured, of one processor; with ! it was a limit of its own</dd>
</dl>"""


def write(path: Path, runs: Runs) -> Path:
    """Raises `ConfigError` for a place that cannot be written."""
    try:
        path.write_text(page(runs), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from None
    return path


def page(runs: Runs) -> str:
    title = " · ".join(name for name, _ in runs)
    drawn = "".join(map(_figure, panels(runs)))
    tables = "".join(_run(name, run) for name, run in runs)
    colours = "".join(f".c{index} {{ --c: var(--c{index}); }}" for index in range(len(COLOURS)))
    style = _STYLE.replace("LIGHT", _variables(COLOURS)).replace("DARK", _variables(_DARK_COLOURS)) + colours
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{escape(title)} – ingle bench serve</title><style>{style}</style></head><body>"
        f"<h1>{escape(title)}</h1><p class=faint>measured by ingle bench serve</p>"
        f'<div class="panels">{drawn}</div>{_ratios(runs)}{tables}<h2>What the figures mean</h2>{_MEANS}</body></html>\n'
    )


def _figure(panel: Panel) -> str:
    keys = "".join(map(key, panel.lines)) if len(panel.lines) > 1 else ""
    return f"<figure><h2>{escape(panel.title)}</h2><figcaption>{keys}</figcaption>{svg(panel)}</figure>"


def _ratios(runs: Runs) -> str:
    if len(runs) < 2:
        return ""
    parts = ["<h2>Beside each other</h2>"]
    for level in shared_levels(runs):
        head, rows = table(runs, level)
        names = "".join(f"<th>{escape(name)}</th>" for name in head[1:])
        title = level.title if level.rate is not None else f"{level.title} at once"
        cells = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
        parts.append(f'<div class="scroll"><table><tr><th>{escape(title)}</th>{names}</tr>{cells}</table></div>')
    return "".join(parts)


def _variables(colours: Sequence[str]) -> str:
    return " ".join(f"--c{index}: {colour};" for index, colour in enumerate(colours))


def _run(name: str, run: Report) -> str:
    remarks_shown = [*run.notices, *remarks(run.levels)]
    if run.stopped is not None:
        remarks_shown.insert(0, f"cut short: {run.stopped}; {done(run)}")
    notes = "".join(f"<p class=note>{escape(line)}</p>" for line in remarks_shown)
    card = run.server.get("card", {}).get("meta") or {}
    about = {
        "server": " ".join(str(run.server[key]) for key in ("base_url", "software", "version") if run.server.get(key)),
        "model": " ".join([run.model, *(f"{key} {value}" for key, value in card.items())]),
        "asked": run.data.get("described"),
        "client": ", ".join(f"{key} {value}" for key, value in run.client.items()),
        "begun": run.started,
        "command": " ".join(run.command),
        "settings": json.dumps(run.settings, ensure_ascii=False),
    }
    facts = "".join(f"<dt>{escape(key)}</dt><dd>{escape(str(value))}</dd>" for key, value in about.items() if value)
    return f"<h2>{escape(name)}</h2>{notes}{_table(run.levels)}<h2>How it was measured</h2><dl>{facts}</dl>"


def _table(levels: Sequence[LevelResult]) -> str:
    first = "at rate" if any(level.rate is not None for level in levels) else "at once"
    heads = [first, "tok/s of one", "tok/s in all", "requests/s", "errors", "client"]
    groups = "".join(f'<th colspan="4">{name}, ms</th>' for name in ("TTFT", "TPOT", "ITL"))
    names = "".join(f"<th>{name}</th>" for name in ("mean", "p50", "p90", "p99")) * 3
    head = "".join(f'<th rowspan="2">{escape(name)}</th>' for name in heads)
    rows = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in _cells(level))}</tr>" for level in levels)
    return f'<div class="scroll"><table><tr>{head}{groups}</tr><tr>{names}</tr>{rows}</table></div>'


def _cells(level: LevelResult) -> list[str]:
    figures, client = level.figures, level.client
    speed = figures.request_tokens_per_s
    cells = [
        level.title + ("" if level.complete else " (cut short)"),
        "-" if speed is None else f"{speed.mean:,.1f}",
        f"{figures.output_tokens_per_s:,.1f}",
        f"{figures.requests_per_s:,.2f}",
        str(figures.num_errors),
        f"{client.cpu_share:.0%}{'!' * client.limited}",
    ]
    for spread in (figures.ttft_s, figures.tpot_s, figures.itl_s):
        cells += _milliseconds(spread)
    return cells


def _milliseconds(spread: Spread | None) -> list[str]:
    if spread is None:
        return ["-"] * 4
    return [shown(seconds * 1e3) for seconds in (spread.mean, spread.p50, spread.p90, spread.p99)]
