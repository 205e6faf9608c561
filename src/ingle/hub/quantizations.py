"""The GGUF files of a repository: which belong together, how each is quantized, and which of them to take."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ingle import cgroup, facts
from ingle.errors import ModelError
from ingle.hub.listing import RemoteFile
from ingle.hub.local import NOT_THE_MODEL
from ingle.hub.names import quote

_PART = re.compile(r"-(\d{5})-of-(\d{5})$")
_LABEL = re.compile(
    r"(?:^|[-._])((?:UD-)?(?:IQ\d_[A-Z]+|Q\d_K(?:_(?:S|M|L|XL))?|Q\d_[01]|TQ\d_0|MXFP4(?:_MOE)?|BF16|F16|FP16|F32)"
    r"(?:_XL|_L)?)(?=$|[-._])",
    re.IGNORECASE,
)
_BY_EXACTNESS = ("Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "MXFP4", "IQ4_XS", "IQ4_NL", "Q4_1", "Q4_0", "Q3_K",
                 "TQ2_0", "TQ1_0", "Q2_K", "BF16", "F16", "F32")  # fmt: skip
"""The types that ingle reads, the one to take first. Whole floats come last: they are twice as large as Q8_0, which is
as good."""
_SIZES = ("_XL", "_L", "_M", "", "_S")
_MOST_LISTED = 12
_OF_MEMORY = 0.7
"""The share of what is free that weights may take: keys, values and the rest of the system need some."""
_TIMEOUT_S = 5


@dataclass(frozen=True)
class Variant:
    """One model in a GGUF file, or in the parts of a split one."""

    label: str
    """Its quantization in capitals; its file's name where that says none."""
    files: tuple[RemoteFile, ...]
    num_parts: int = 1

    @property
    def size(self) -> int:
        return sum(file.size or 0 for file in self.files)

    @property
    def is_whole(self) -> bool:
        return len(self.files) == self.num_parts

    @property
    def kind(self) -> str | None:
        """The type that most of it is stored in; None for one that ingle does not read."""
        label = self.label.removeprefix("UD-").replace("FP16", "F16")
        return next((kind for kind in _BY_EXACTNESS if re.match(rf"{kind}(?![0-9])", label)), None)

    @property
    def refusal(self) -> str | None:
        """Why ingle does not take it; None where it may."""
        if not self.is_whole:
            return f"{len(self.files)} of its {self.num_parts} parts"
        return "not read by ingle" if self.kind is None and _LABEL.fullmatch(f"-{self.label}") else None

    @property
    def rank(self) -> tuple[int, int]:
        """The lowest is the most exact."""
        assert self.kind is not None
        rest = self.label.removeprefix("UD-").removeprefix(self.kind)
        return _BY_EXACTNESS.index(self.kind), _SIZES.index(rest) if rest in _SIZES else len(_SIZES)


def variants(files: Iterable[RemoteFile]) -> list[Variant]:
    """Those of a repository, the smallest first."""
    groups: dict[str, list[RemoteFile]] = {}
    for file in files:
        if file.path.lower().endswith(".gguf") and not NOT_THE_MODEL.search(file.name):
            groups.setdefault(_PART.sub("", file.path[: -len(".gguf")]), []).append(file)
    found = []
    for stem, parts in groups.items():
        parts.sort(key=lambda file: file.path)
        match = _PART.search(parts[0].path[: -len(".gguf")])
        labels = _LABEL.findall(stem.rpartition("/")[2]) or _LABEL.findall(stem.replace("/", "-"))
        label = labels[-1].upper() if labels else stem.rpartition("/")[2]
        found.append(Variant(label, tuple(parts), int(match[2]) if match else 1))
    return sorted(found, key=lambda variant: variant.size)


def labelled(found: Iterable[Variant]) -> dict[str, Variant]:
    """By what follows the colon: the quantization, or the file's name or path where several files have the same."""
    names: dict[str, Variant] = {}
    for variant in found:
        file = variant.files[0]
        names[next(name for name in (variant.label, file.name, file.path) if name not in names)] = variant
    return names


@dataclass(frozen=True)
class Taken:
    variant: Variant
    why: str = ""
    """For people, where nobody asked for it by name."""


def take(where: str, found: Sequence[Variant], choice: str | None, free: int | None = None) -> Taken:
    """The variant that `choice` names, or without one the best that fits into `free` bytes of memory.

    `where` is the repository. Raises `ModelError`, which names those that there are.
    """
    if choice is not None:
        variant = named(found, choice)
        if variant is None:
            raise ModelError(f"{where} has no {quote(choice)}: {_listed(found)}")
        return Taken(_checked(where, variant, found))
    usable = [variant for variant in found if variant.is_whole and variant.kind is not None]
    if not usable:
        if len(found) == 1 and found[0].is_whole and not _LABEL.fullmatch(f"-{found[0].label}"):
            return Taken(found[0])  # its name does not say how it is stored; the file will
        raise ModelError(f"{where} has no GGUF file that ingle reads: {_listed(found)}", alternative=_ANOTHER)
    best = sorted(usable, key=lambda variant: variant.rank)
    if len(best) == 1:
        return Taken(best[0])
    where_free = "free here" if free is None else "planned for"
    if free is None:
        free = free_memory()
    fitting = [variant for variant in best if free is None or variant.size <= _OF_MEMORY * free]
    memory = "" if free is None else f" that fits into the {free / 2**30:.1f} GiB of memory that are {where_free}"
    if fitting:
        return Taken(fitting[0], f"the best of {len(best)}{memory}; another by its name: {_listed(best)}")
    least = min(best, key=lambda variant: variant.size)
    return Taken(least, f"the smallest of {len(best)}: none is one{memory}")


_ANOTHER = "take a repository with a file such as Q4_K_M or Q8_0"


def named(found: Sequence[Variant], choice: str) -> Variant | None:
    """The one that people call so: by its quantization, or by the name of one of its files."""
    wanted = choice.upper()
    for variant in found:
        if any(choice in (file.path, file.name) for file in variant.files):
            return variant
    matching = [variant for variant in found if wanted in (variant.label.upper(), f"UD-{variant.label.upper()}")]
    if not matching:  # Q4_K is Q4_K_M, as llama.cpp's users say it
        matching = [variant for variant in found if variant.label.upper() == f"{wanted}_M"]
    return matching[0] if matching else None


def _checked(where: str, variant: Variant, found: Sequence[Variant]) -> Variant:
    if not variant.is_whole:
        raise ModelError(f"{where} has {len(variant.files)} of the {variant.num_parts} parts of {variant.label}")
    if variant.kind is None and _LABEL.fullmatch(f"-{variant.label}"):
        others = [other for other in found if other.kind is not None and other.is_whole]
        instead = f"take one of those that it reads: {_listed(others)}" if others else _ANOTHER
        raise ModelError(f"{where}: ingle does not read {variant.label}", alternative=instead)
    return variant


def _listed(found: Sequence[Variant]) -> str:
    shown = [f"{variant.label} ({facts.decimal_size(variant.size)})" for variant in found[:_MOST_LISTED]]
    more = f" and {len(found) - _MOST_LISTED} more" if len(found) > _MOST_LISTED else ""
    return f"there are {', '.join(shown)}{more}" if shown else "there is no .gguf file"


def free_memory() -> int | None:
    """Bytes: of the largest GPU where there is one, else of the machine; None where the system does not say."""
    on_gpus = _on_gpus()
    if on_gpus:
        return max(on_gpus)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        lines = []
    free = [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")]
    granted = cgroup.free_memory_bytes()
    return min([*free, *([] if granted is None else [granted])], default=None)


def _on_gpus() -> list[int]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):  # a driver that does not answer has no memory to offer
        return []
    return [int(line) << 20 for line in asked.stdout.split("\n") if line.strip().isdecimal()]
