"""The local store of pulled models.

    <root>/models/<directory>/<file>           the model's one file
    <root>/models/<directory>/manifest.json    what it is; see `Manifest`
    <root>/partial/<directory>/                work in progress, only touched by the holder of the lock
    <root>/partial/<directory>.lock

A model's directory is made under `partial` and renamed into `models` when it is complete, so whatever stands under
`models` is whole, whenever the process that put it there was killed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import msgspec

from ingle.errors import ModelError
from ingle.home import home
from ingle.hub.catalog import CatalogEntry
from ingle.hub.disk import delete, disk_errors, locked, sync
from ingle.hub.names import SHORT_NAME, quote

MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 65536

_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,199}")


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What `manifest.json` says of a stored model."""

    name: str
    file: str
    sha256: str
    size: int
    """Bytes of the file."""
    source: str
    """Where the file came from, for people to read."""
    pulled_at: datetime


@dataclass(frozen=True)
class StoredModel:
    manifest: Manifest
    path: Path
    """The model's file."""


def check_name(name: str) -> str:
    """`name` in lower case. Raises `ModelError` unless it is a short name: letters, digits, `.`, `_`, `-`, one `:`."""
    lowered = name.lower()
    if SHORT_NAME.fullmatch(lowered) is None:
        raise ModelError(
            f"{quote(name)} is neither a path that exists nor a model's short name, such as smollm2:135m "
            "(up to 64 letters, digits, '.', '_' and '-', with one ':' before the tag)"
        )
    return lowered


class Store:
    """Models on this machine's disk. Every method raises `ModelError` when the disk refuses."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or home()

    def names(self) -> list[str]:
        """Names of the stored models, damaged ones included, sorted."""
        with disk_errors("read the model store"):
            if not (models := self.root / "models").is_dir():
                return []
            found = [path for path in models.iterdir() if path.is_dir() or path.is_symlink()]  # maybe to nothing
            names = [path.name.replace("@", ":", 1) for path in found]
        return sorted(name for name in names if SHORT_NAME.fullmatch(name))

    def get(self, name: str) -> StoredModel:
        """The stored model of that name. Raises `ModelError` when there is none or it is damaged."""
        name = check_name(name)
        directory = self._directory(name)
        with disk_errors(f"read model {name}"):
            if not directory.is_dir() and not directory.is_symlink():
                raise ModelError(f"model {name} is not in the local store {self.root}")
            manifest = _read_manifest(name, directory / MANIFEST)
            path = directory / manifest.file
            size = path.stat().st_size if path.is_file() else None
        if size is None:
            raise _damaged(name, f"{path} is missing")
        if size != manifest.size:
            raise _damaged(name, f"{path} has {size} bytes, its manifest says {manifest.size}")
        return StoredModel(manifest, path)

    def remove(self, name: str) -> None:
        """Delete a model, damaged or not. Raises `ModelError` when there is none of that name."""
        name = check_name(name)
        if name not in self.names():
            raise ModelError(f"model {name} is not in the local store {self.root}")
        with self.lock(name), disk_errors(f"remove model {name}"):
            trash = self.partial(name)
            delete(trash)
            self._directory(name).rename(trash)
            delete(trash)

    def install(self, entry: CatalogEntry, file: Path) -> StoredModel:
        """Move the complete and checked `file` from `partial` into the store, in place of an older copy.

        The caller holds the model's lock.
        """
        manifest = Manifest(
            name=entry.name,
            file=entry.file,
            sha256=entry.sha256,
            size=entry.size,
            source=entry.origin,
            pulled_at=datetime.now(timezone.utc).replace(microsecond=0),
        )
        target, partial = self._directory(entry.name), self.partial(entry.name)
        staged = partial / "staged"
        with disk_errors(f"put model {entry.name} into the store"):
            staged.mkdir()
            file.rename(staged / entry.file)
            (staged / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest)) + b"\n")
            for path in (staged / MANIFEST, staged):
                sync(path)
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.exists() or target.is_symlink():  # maybe to nothing
                target.rename(partial / "replaced")
            staged.rename(target)
            sync(target.parent)
            delete(partial)
        return StoredModel(manifest, target / entry.file)

    def partial(self, name: str) -> Path:
        """Directory for work in progress on a model; it may not exist. Only the holder of the lock may touch it."""
        return self.root / "partial" / check_name(name).replace(":", "@")

    @contextmanager
    def lock(self, name: str, on_wait: Callable[[], None] = lambda: None) -> Iterator[int]:
        """Hold the right to change a model, as `disk.locked` has it. Raises `ModelError` when the disk refuses."""
        path = self.partial(name).with_name(self.partial(name).name + ".lock")
        with ExitStack() as held:
            with disk_errors(f"lock {path}"):
                descriptor = held.enter_context(locked(path, on_wait))
            yield descriptor

    def _directory(self, name: str) -> Path:
        # "@" is in no valid name, so no two names share a directory, and ":" is not allowed on every file system.
        return self.root / "models" / name.replace(":", "@")


def _read_manifest(name: str, path: Path) -> Manifest:
    if not path.is_file():
        raise _damaged(name, f"{path} is missing")
    with path.open("rb") as file:
        raw = file.read(MAX_MANIFEST_BYTES + 1)
    if len(raw) > MAX_MANIFEST_BYTES:
        raise _damaged(name, f"{path} is longer than {MAX_MANIFEST_BYTES} bytes")
    try:
        manifest = msgspec.json.decode(raw, type=Manifest)
    except msgspec.DecodeError as error:
        raise _damaged(name, f"{path}: {error}") from error
    if manifest.name != name or _FILE.fullmatch(manifest.file) is None or manifest.file == MANIFEST:
        raise _damaged(name, f"{path} speaks of model {manifest.name!r}, file {manifest.file!r}")
    return manifest


def _damaged(name: str, why: str) -> ModelError:
    return ModelError(f"model {name} in the local store is damaged: {why}; run `ingle pull {name}` to fetch it again")
