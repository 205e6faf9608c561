"""What can be said of a model before it runs, as a value, and as rows for people: whoever finds out fills in what it
knows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from ingle import facts


@dataclass(frozen=True)
class Finding:
    refused: bool
    """The model does not run; otherwise it does, and there is something to know."""
    what: str
    """And which value caused it."""
    alternative: str | None = None
    """What to do instead, where `what` does not say so itself."""

    def __str__(self) -> str:
        return self.what if self.alternative is None else f"{self.what}; {self.alternative}"


@dataclass(frozen=True)
class Need:
    """Memory, in bytes."""

    device: Literal["cpu", "cuda"]
    weights: int
    kv_cache: int
    """Of one sequence as long as the context."""
    context: int
    """Tokens: what is asked for, or else the model's own; 0 where only its code knows."""
    free: int | None
    """None where the system does not say."""

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache

    def __str__(self) -> str:
        parts = [f"{facts.size(self.weights)} of weights"]
        if self.context:
            parts.append(f"{facts.size(self.kv_cache)} of KV cache for {self.context} tokens")
        where = "the GPU" if self.device == "cuda" else "this machine"
        has = "" if self.free is None else f"; {where} has {facts.size(self.free)} free"
        return f"{facts.size(self.total)} of memory ({', '.join(parts)}){has}"


@dataclass(frozen=True)
class Template:
    """A chat template."""

    source: str
    """Where it stands."""
    system_role: bool | None = None
    """Whether it takes a system message; None where that was not tried."""
    tools: bool | None = None


@dataclass(frozen=True)
class Description:
    """None, or nothing, is what is not known."""

    model: str
    format: str
    architecture: str | None = None
    family: str | None = None
    num_parameters: int | None = None
    stored_types: dict[str, int] = field(default_factory=dict)
    """Numbers stored in each type."""
    quantization: str | None = None
    context: int | None = None
    """Tokens."""
    num_bytes: int | None = None
    """Of the files that hold its weights."""
    license: str | None = None
    template: Template | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    """What its makers recommend."""
    sampling_source: str = ""
    runs: bool | None = None
    """Whether it runs here."""
    findings: tuple[Finding, ...] = ()
    need: Need | None = None
    path: str | None = None


def rows(model: Description) -> Iterator[tuple[str, str]]:
    """A fact each, by name."""
    stored = ", ".join(filter(None, (facts.types(model.stored_types), model.quantization)))
    yield "model", model.model
    yield "format", model.format
    yield "architecture", model.architecture or "unknown"
    yield "family", model.family or "unknown"
    yield "parameters", "unknown" if model.num_parameters is None else facts.count(model.num_parameters)
    yield "stored as", stored or "unknown"
    yield "context", "unknown" if model.context is None else f"{model.context} tokens"
    yield "chat template", _template(model.template)
    yield "sampling", facts.sampling_defaults(model.sampling, model.sampling_source)
    yield "license", model.license or "unknown: its files do not say"
    yield "size", "unknown" if model.num_bytes is None else f"{model.num_bytes / 1e6:.1f} MB"
    if model.runs is not None:
        yield "runs here", "yes" if model.runs else "no"
    for finding in model.findings:
        yield "" if finding.refused else "notice", str(finding)
    if model.need is not None:
        yield "needs", str(model.need)
    if model.path is not None:
        yield "path", model.path


def _template(template: Template | None) -> str:
    if template is None:
        return "no"
    tried = {"system messages": template.system_role, "tools": template.tools}
    said = ", ".join(f"{what}: {'yes' if does else 'no'}" for what, does in tried.items() if does is not None)
    return "; ".join(filter(None, (template.source, said)))
