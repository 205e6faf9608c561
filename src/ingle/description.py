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
class Offer:
    """A format in which a hub has a model."""

    name: str
    """safetensors, PyTorch (.bin), or the quantization of a GGUF file."""
    num_bytes: int
    taken: bool = False
    """Whether it is what a pull takes."""
    refusal: str | None = None
    """Why ingle does not take it."""

    def __str__(self) -> str:
        said = "what a pull takes" if self.taken else self.refusal
        return f"{self.name} {facts.decimal_size(self.num_bytes)}{f' ({said})' if said else ''}"


@dataclass(frozen=True)
class Download:
    """What a pull would bring of a model that is not, or not wholly, on this machine."""

    page: str
    """Where people read about it and accept its terms."""
    revision: str | None
    """The commit, where its hub has such."""
    num_files: int
    num_bytes: int
    num_bytes_here: int
    """Of these, what an interrupted pull or another model has brought already."""
    destination: str
    offers: tuple[Offer, ...] = ()
    choice: str | None = None
    """Which of the offers was taken and why, where nobody asked for one."""
    gated: bool | None = None
    """Whether its terms have to be accepted first."""
    terms: str | None = None
    """Where they stand."""


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
    download: Download | None = None
    """Of a model that is not here."""


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
    if model.download is not None:
        yield from _download_rows(model.model, model.download)


def _download_rows(name: str, download: Download) -> Iterator[tuple[str, str]]:
    here = f"; {facts.decimal_size(download.num_bytes_here)} of it is here" if download.num_bytes_here else ""
    many = f"{download.num_files} files" if download.num_files > 1 else "1 file"
    yield "page", download.page
    if download.revision is not None:
        yield "revision", download.revision
    if download.gated is not None:
        accept = f"yes: accept its terms at {download.page}, and set HF_TOKEN"
        yield "gated", accept if download.gated else "no"
    if download.terms is not None:
        yield "terms", download.terms
    if download.offers:
        yield "on offer", ", ".join(map(str, download.offers))
    if download.choice is not None:
        yield "choice", download.choice
    yield "to download", f"{facts.decimal_size(download.num_bytes)} in {many}{here}"
    yield "goes to", download.destination
    yield "here", f"no: `ingle pull {name}` brings it" if not here else f"in part: `ingle pull {name}` brings the rest"


def _template(template: Template | None) -> str:
    if template is None:
        return "no"
    tried = {"system messages": template.system_role, "tools": template.tools}
    said = ", ".join(f"{what}: {'yes' if does else 'no'}" for what, does in tried.items() if does is not None)
    return "; ".join(filter(None, (template.source, said)))
