"""What is to be said of the figures, in words."""

from __future__ import annotations

from collections.abc import Sequence

from ingle.bench.serving.cost import BUSY
from ingle.bench.serving.results import LevelResult, Report


def remarks(levels: Sequence[LevelResult]) -> list[str]:
    """What a reader of the figures has to know."""
    lines = []
    for level in levels:
        figures, client = level.figures, level.client
        where = f"at {level.title}"
        for message, count in list(figures.errors.items())[:3]:
            lines.append(f"{where}: {count} failed: {message}")
        if client.limited and client.cpu_share > BUSY:
            lines.append(
                f"{where}: the client was a limit of its own, with {client.cpu_share:.0%} of a processor: start "
                "several of fewer requests, or run it on a faster machine"
            )
        elif client.limited:
            lines.append(
                f"{where}: the client's machine is busy: it saw events up to {client.lag_p99_s * 1e3:,.1f} ms late "
                "(p99), which the latencies hold; run it on another machine"
            )
        if figures.goodput_share is not None:
            rate = figures.goodput_requests_per_s or 0.0
            lines.append(f"{where}: {rate:,.2f} requests/s keep the targets, {figures.goodput_share:.0%}")
        if level.rate is not None and figures.requests_per_s < 0.9 * level.rate and level.complete:
            lines.append(f"{where}: {figures.requests_per_s:,.2f} requests/s were answered, fewer than were sent")
        if figures.short_answers:
            lines.append(f"{where}: {figures.short_answers} answers are shorter than was asked for")
        if figures.counted_by == "events":
            lines.append(f"{where}: the server tells no usage: an event counts as a token; see --tokenizer")
        if figures.tokens_per_event > 1.05:
            lines.append(f"{where}: {figures.tokens_per_event:.2f} tokens an event, in the mean")
    return lines


def done(report: Report) -> str:
    """What there is of a run."""
    whole = sum(level.complete for level in report.levels)
    cut = [level for level in report.levels if not level.complete]
    told = f"{whole} level{'s' * (whole != 1)} done"
    for level in cut:
        figures = level.figures
        told += f", and {figures.num_ok} answers at {level.title} of {level.num_sessions} ({figures.num_errors} failed)"
    return told


def shown(number: float | None) -> str:
    """With as many digits as tables have room for."""
    if number is None:
        return "-"
    return f"{number:,.1f}" if abs(number) >= 100 else f"{number:,.2f}"
