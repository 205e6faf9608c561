"""What the hubs' own caches hold on this machine, whoever has downloaded it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ingle.errors import ModelError
from ingle.hub.download import PART
from ingle.hub.listing import RemoteFile
from ingle.hub.names import Hub, RepoRef
from ingle.hub.origins import modelscope_cache
from ingle.hub.quantizations import take, variants
from ingle.hub.selection import is_whole
from ingle.hub.source import ModelSource
from ingle.hub.store import delete

_COMMIT = re.compile(r"[0-9a-f]{40}")
_STORAGE = re.compile(r"models--([^/]+?)(?:--([^/]+))?")
_MAX_REF_BYTES = 200


def cached(ref: RepoRef) -> ModelSource | None:
    """The model that a reference names, if all of it is here; no hub is asked. Raises `ModelError` where files of it
    are here that ingle cannot take."""
    for folder in _folders(ref):
        if (found := _in(folder, ref)) is not None:
            return found
    return None


def _in(folder: Path, ref: RepoRef) -> ModelSource | None:
    if ref.choice is None and is_whole(folder):
        return ModelSource(ref.name, folder, "folder")
    found = variants(_files(folder))
    whole = [variant for variant in found if variant.is_whole]
    if not whole or (ref.choice is None and (folder / "config.json").is_file() and _has_parts(folder)):
        return None
    try:
        taken = take(ref.repo, whole, ref.choice)
    except ModelError:  # the hub may have what is not here
        return None
    return ModelSource(ref.name, folder / taken.variant.files[0].path, "gguf")


def _has_parts(folder: Path) -> bool:
    """Whether weights of a folder are there, though not all."""
    return any(folder.glob("model*.safetensors")) or any(folder.glob("pytorch_model*.bin"))


def _files(folder: Path) -> Iterator[RemoteFile]:
    """Those that are there, with those that links lead to."""
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            if name.lower().endswith(".gguf") and path.is_file():
                yield RemoteFile(path.relative_to(folder).as_posix(), path.stat().st_size)


def _folders(ref: RepoRef) -> Iterator[Path]:
    """Where a revision of a repository may lie."""
    if ref.hub == "modelscope":
        yield from modelscope_cache.model_folders(modelscope_cache.cache_folder(), ref.repo, ref.revision)
        return
    from ingle.hub.origins import huggingface

    cache = huggingface.cache_folder()
    storage = cache / huggingface.storage_name(ref.repo)
    if not storage.is_dir():
        same = huggingface.storage_name(ref.repo).lower()
        storage = next((each for each in _listed(cache) if each.name.lower() == same), storage)
    snapshots = storage / "snapshots"
    revision = ref.revision or "main"
    commit = _commit(storage / "refs" / revision)
    if commit is not None:
        yield snapshots / commit
    elif ref.revision is None:
        yield from sorted(_listed(snapshots), key=lambda each: -each.stat().st_mtime)
    elif re.fullmatch(r"[0-9a-f]{7,40}", revision):
        yield from (each for each in _listed(snapshots) if each.name.startswith(revision))


def _commit(ref: Path) -> str | None:
    try:
        with ref.open() as file:
            text = file.read(_MAX_REF_BYTES).strip()
    except (OSError, UnicodeDecodeError):
        return None
    return text if _COMMIT.fullmatch(text) else None


def _listed(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if path.is_dir()]
    except OSError:
        return []


@dataclass(frozen=True)
class CachedModel:
    """A model that ingle can serve, or a part of one that a download left."""

    hub: Hub
    name: str
    """As it is typed: org/name, or org/name:Q4_K_M of GGUF."""
    size: int
    """Bytes on the disk."""
    format: str
    used_s: float
    """When it was last read, or else written; seconds since 1970."""
    files: tuple[Path, ...]
    """Of GGUF its own, else empty: all of the repository's are the model's."""
    repo_folder: Path


def cached_models() -> Iterator[CachedModel]:
    """Of all hubs' caches, by name."""
    from ingle.hub.origins import huggingface

    for storage in sorted(_listed(huggingface.cache_folder())):
        match = _STORAGE.fullmatch(storage.name)
        if match is not None:
            repo = "/".join(part for part in match.groups() if part)
            snapshots = sorted(_listed(storage / "snapshots"), key=lambda each: -each.stat().st_mtime)
            yield from _models(repo, "huggingface", storage, snapshots)
    for repo, storage, folders in modelscope_cache.repositories(modelscope_cache.cache_folder()):
        yield from _models(f"modelscope:{repo}", "modelscope", storage, folders)


def _models(name: str, hub: Hub, storage: Path, snapshots: list[Path]) -> Iterator[CachedModel]:
    """Those of one repository: its folder, each quantization of GGUF, or what a cut download left."""
    seen = set[str]()
    for folder in snapshots:
        if is_whole(folder) and "" not in seen:
            seen.add("")
            weights = [*folder.glob("*.safetensors")] or [*folder.glob("pytorch_model*.bin")]
            kind = "safetensors" if weights[0].suffix == ".safetensors" else "PyTorch"
            yield CachedModel(hub, name, _bytes_in(storage), kind, _used_s(weights), (), storage)
        for variant in variants(_files(folder)):
            paths = tuple(folder / file.path for file in variant.files)
            if variant.is_whole and variant.label not in seen:
                seen.add(variant.label)
                label = f"{name}:{variant.label}"
                yield CachedModel(hub, label, variant.size, "GGUF", _used_s(paths), paths, storage)
    left = [path for path in storage.rglob(f"*{PART}") if path.is_file()]
    if left and not seen:
        size = sum(path.stat().st_size for path in left)
        yield CachedModel(hub, name, size, "interrupted", _used_s(left), (), storage)


def _bytes_in(storage: Path) -> int:
    return sum(path.stat().st_size for path in storage.rglob("*") if path.is_file() and not path.is_symlink())


def _used_s(paths: tuple[Path, ...] | list[Path]) -> float:
    stats = [path.stat() for path in paths]
    return max((max(stat.st_atime, stat.st_mtime) for stat in stats), default=0.0)


def remove_cached(model: CachedModel) -> None:
    """From the disk. Of a repository with several GGUF files the others stay. Raises `OSError`."""
    others = [other for other in cached_models() if other.repo_folder == model.repo_folder and other.name != model.name]
    if not model.files or not others:
        delete(model.repo_folder)
        delete(model.repo_folder.parent / ".locks" / model.repo_folder.name)
        return
    for path in model.files:
        target = path.resolve()
        delete(path)
        if target.is_relative_to(model.repo_folder.resolve()):
            delete(target)
