"""What of a model would fail here."""

from __future__ import annotations

import json
from dataclasses import asdict

from ingle.doctor.children import ProbeError, TookTooLong
from ingle.doctor.finding import Reporter
from ingle.doctor.here import Here

PATIENCE = 2


def check_model(here: Here, report: Reporter) -> None:
    """In a process of its own: on a GPU it takes PyTorch."""
    engine = here.question.engine
    if engine is None:
        return
    asked = {"model": engine.model, "options": engine.options(), "text": asdict(here.question.text)}
    try:
        found = here.children.ask("model", PATIENCE * here.question.timeout_s, json.dumps(asked))
    except TookTooLong as error:
        report.fail(f"{engine.model}: reading it: {error}", "a slow disk takes longer: `ingle doctor --timeout 90`")
        return
    except ProbeError as error:
        report.fail(f"{engine.model} cannot be looked at: {error}", "repair what fails above, and ask again")
        return
    refused = False
    for is_refused, what, alternative in found["findings"]:
        refused |= is_refused
        text = what if engine.model in what else f"{engine.model}: {what}"
        (report.fail if is_refused else report.warn)(text, alternative)
    if found["path"] is None or refused:
        return
    needs = f"it needs {found['need']}" if found["need"] else "what it needs is not known"
    if found["fits"]:
        report.ok(f"{engine.model} runs here; {needs}")
    else:
        report.warn(
            f"{engine.model} does not run here with all of its context: {needs}",
            f"a start cuts the context to what fits; `ingle plan {engine.model}` says how long that is",
        )
