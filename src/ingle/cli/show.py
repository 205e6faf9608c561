"""`ingle show`: what a model is and whether it runs here, read from its files without loading it, or downloading it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ingle.cli.ending import in_order
from ingle.cli.flags import parse
from ingle.config import EngineConfig, TextConfig
from ingle.errors import ModelError, printable
from ingle.hub.names import RepoRef, UrlRef
from ingle.hub.resolve import ModelSource, resolve_model, resolve_or_locate

if TYPE_CHECKING:
    from ingle.description import Description
    from ingle.hub.pull import Known

_MAX_CHARS = 4096
"""Of a fact: a path is no longer."""


@dataclass(frozen=True)
class Show:
    """Show what a model is and whether it runs here, read from its files without loading it.

    Of a model that is not on this machine its hub is asked: no weights are downloaded, and nothing is kept.
    """

    model: str
    """A short name, org/name, org/name:Q4_K_M, the URL of a .gguf file, a model's folder, or a .gguf file."""
    hub: str | None = None
    """Where org/name lies: huggingface or modelscope. Default: $INGLE_HUB, else huggingface."""
    revision: str | None = None
    """Branch, tag or commit."""
    json: bool = False
    """Print all of it as one JSON object."""


def main(argv: Sequence[str]) -> None:
    flags = parse(Show, argv, command="show")
    logging.basicConfig(format="%(message)s", level=logging.ERROR)  # what it warns of is among the findings
    model = described(flags.model, flags.hub, flags.revision)
    print(as_json(model) if flags.json else as_text(model))


def described(name: str, hub: str | None = None, revision: str | None = None) -> Description:
    """Raises `ModelError` for what is no model, and for one whose configuration cannot be read."""
    from ingle.description import Finding
    from ingle.engine.describe import describe_adapter

    try:
        found = resolve_or_locate(name, hub, revision)
        if isinstance(found, ModelSource):
            return _of(found)
        reference = found.reference
        if not isinstance(reference, RepoRef | UrlRef):
            return _of(resolve_model(name))  # which says how it comes here
    except ModelError as error:
        adapter = describe_adapter(name, Path(name))
        if adapter is None:
            raise
        return replace(adapter, findings=(Finding(True, error.what, error.alternative),))
    return _remote(found, reference)


def _of(source: ModelSource) -> Description:
    from ingle.engine.describe import describe

    return describe(source.name, source.path, EngineConfig(source.name), TextConfig(), source.recommended)


def _remote(found: Known, reference: RepoRef | UrlRef) -> Description:
    from ingle.description import Description, Finding
    from ingle.hub.pull import as_known
    from ingle.hub.remote import looked_at

    def note(text: str) -> None:
        print(printable(text), file=sys.stderr)

    with in_order(), looked_at(found.name, reference, "show", note) as remote:
        if remote.refusal is not None:
            finding = Finding(True, remote.refusal.what, remote.refusal.alternative)
            formats = {"folder": "Hugging Face folder", "gguf": "GGUF"}
            return Description(
                remote.name, formats[remote.source.kind], license=remote.license, findings=(finding,),
                download=remote.download,
            )  # fmt: skip
        model = _of(as_known(remote.source, found))
        findings = (
            Finding(each.refused, remote.named(each.what), each.alternative and remote.named(each.alternative))
            for each in model.findings
        )
        return replace(
            model,
            model=remote.name,
            license=remote.license or model.license,
            findings=tuple(findings),
            path=None,
            download=remote.download,
        )


def as_text(model: Description) -> str:
    """A fact a line."""
    from ingle.description import rows

    facts = list(rows(model))
    width = max(len(name) for name, _ in facts)
    return "\n".join(f"{name:<{width}}  {printable(value[:_MAX_CHARS])}" for name, value in facts)


def as_json(model: Description) -> str:
    import json

    return json.dumps(asdict(model), ensure_ascii=False, indent=2)
