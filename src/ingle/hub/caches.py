"""What the hubs' own caches hold on this machine, whoever has downloaded it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ingle.errors import ModelError
from ingle.hub.disk import delete, disk_errors, locked
from ingle.hub.download import PART
from ingle.hub.listing import RemoteFile
from ingle.hub.names import Hub, RepoRef
from ingle.hub.origins import modelscope_cache
from ingle.hub.quantizations import Variant, labelled, take, variants
from ingle.hub.selection import is_whole, refuse_config
from ingle.hub.source import ModelSource

_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHORT_COMMIT = re.compile(r"[0-9a-f]{7,40}")
_STORAGE = re.compile(r"models--([^/]+?)(?:--([^/]+))?")
_MAX_REF_BYTES = 200
_MAX_CONFIG_BYTES = 16 << 20


def cached(ref: RepoRef) -> ModelSource | None:
    """The model that a reference names, if all of it is here; no hub is asked. Raises `ModelError` where that cannot be
    looked up."""
    with disk_errors(f"look for {ref}", "MODELSCOPE_CACHE" if ref.hub == "modelscope" else "HF_HOME"):
        return next((found for folder in _folders(ref) if (found := _in(folder, ref)) is not None), None)


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
    if ref.revision is None:  # the branch may lead to one of which only the configuration was ever read
        yield from (each for each in _newest_first(snapshots) if each.name != commit)
    elif commit is None and _SHORT_COMMIT.fullmatch(revision):
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


def _newest_first(folder: Path) -> list[Path]:
    return sorted(_listed(folder), key=_changed_s, reverse=True)


def _changed_s(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # just deleted
        return 0.0


@dataclass(frozen=True)
class Repository:
    """What a cache has of one."""

    hub: Hub
    name: str
    folder: Path
    """Which holds all that there is of it and nothing else."""
    revisions: tuple[Path, ...]
    """The folder of each, the one to prefer first."""
    lock: Path
    """Of those who change it."""


@dataclass(frozen=True)
class CachedModel:
    """A model, or a part of one that a download left."""

    repository: Repository
    label: str
    """Which of the GGUF files of its repository; empty for a folder."""
    format: str
    files: tuple[Path, ...]
    """Its own, in all revisions."""
    weights: tuple[Path, ...]
    """Those that a start reads."""
    variant: Variant | None = None
    """Of GGUF."""
    is_served: bool = True
    trouble: str = ""
    """Why it cannot be read."""

    @property
    def name(self) -> str:
        """As it is typed: org/name, or org/name:Q4_K_M of GGUF."""
        prefix = "modelscope:" if self.repository.hub == "modelscope" else ""
        return f"{prefix}{self.repository.name}" + (f":{self.label}" if self.label else "")

    @property
    def size(self) -> int:
        """Bytes on the disk; what several revisions share counts once."""
        return sum(_bytes_of(path) for path in {path.resolve() for path in self.files})

    @property
    def used_s(self) -> float:
        """When it was last read, or else written; seconds since 1970."""
        stats = [path.stat() for path in self.weights if path.exists()]
        return max((max(stat.st_atime, stat.st_mtime) for stat in stats), default=0.0)


def _bytes_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # a link to nothing, or just deleted
        return 0


def cached_models() -> Iterator[CachedModel]:
    """Of all hubs' caches, by name; those that ingle cannot serve are left out."""
    for repository in _repositories():
        try:
            yield from [model for model in _models(repository) if model.is_served]
        except OSError as error:  # of another user, or just being deleted
            what = f"{error.filename or repository.folder} cannot be read: {error.strerror or error}"
            yield CachedModel(repository, "", "unreadable", (), (), trouble=what)


def _repositories() -> Iterator[Repository]:
    from ingle.hub.origins import huggingface

    cache = huggingface.cache_folder()
    for folder in sorted(_listed(cache)):
        if (match := _STORAGE.fullmatch(folder.name)) is not None:
            name = "/".join(part for part in match.groups() if part)
            lock = huggingface.lock_file(cache, folder.name)
            yield Repository("huggingface", name, folder, tuple(_newest_first(folder / "snapshots")), lock)
    cache = modelscope_cache.cache_folder()
    for name, folder, revisions in modelscope_cache.repositories(cache):
        yield Repository("modelscope", name, folder, tuple(revisions), modelscope_cache.lock_file(cache, name))


def _models(repository: Repository) -> Iterator[CachedModel]:
    """Those of one repository: its folder, each quantization of GGUF, and what a cut download left."""
    quantized: dict[str, list[Path]] = {}
    kinds: dict[str, Variant] = {}
    for revision in repository.revisions:
        for label, variant in labelled(variants(_files(revision))).items():
            kinds.setdefault(label, variant)
            quantized.setdefault(label, []).extend(revision / file.path for file in variant.files)
    left = _left(repository)
    rest = [path for each in repository.revisions for path in _below(each) if path.suffix.lower() != ".gguf"]
    whole = [folder for folder in repository.revisions if is_whole(folder)]
    if whole:
        served = next(filter(_is_served, whole), None)
        weights = [*(served or whole[0]).glob("*.safetensors")]
        kind = "safetensors" if weights else "PyTorch"
        weights = weights or [*(served or whole[0]).glob("pytorch_model*.bin")]
        files = tuple({*rest, *left})
        yield CachedModel(repository, "", kind, files, tuple(weights), is_served=served is not None)
    for label, paths in quantized.items():
        is_served = kinds[label].refusal is None
        yield CachedModel(repository, label, "GGUF", tuple(paths), tuple(paths), kinds[label], is_served=is_served)
    if left and not whole:
        yield CachedModel(repository, "", "interrupted", tuple({*rest, *left}), tuple(left))


def _left(repository: Repository) -> list[Path]:
    """What a cut download of ingle's left: beginnings of files, and whole ones that no revision leads to yet."""
    parts = [path for path in _below(repository.folder) if path.name.endswith(PART)]
    if not parts:
        return []
    linked = {path.resolve() for folder in repository.revisions for path in _below(folder)}
    blobs = [path for path in _below(repository.folder / "blobs") if "." not in path.name]
    return [*parts, *(path for path in blobs if path.resolve() not in linked)]


def _below(folder: Path) -> Iterator[Path]:
    for parent, _, names in os.walk(folder):
        yield from (Path(parent, name) for name in names)


def _is_served(folder: Path) -> bool:
    """By its configuration; one that cannot be read is told of by whoever loads the model."""
    try:
        with (folder / "config.json").open("rb") as file:
            config = json.loads(file.read(_MAX_CONFIG_BYTES))
        if isinstance(config, dict):
            refuse_config(folder, config)
    except (ValueError, RecursionError):
        return True
    except ModelError:
        return False
    return True


def remove_cached(model: CachedModel) -> None:
    """From the disk, and nothing that other models need, or that lies elsewhere and is but linked to.

    Raises `OSError`, and `ModelError` where it is just being pulled, or all of it lies elsewhere.
    """
    repository = model.repository
    if repository.folder.is_symlink():
        raise ModelError(
            f"{model.name} lies in {repository.folder.resolve()}, to which {repository.folder} is but a link",
            alternative="delete both yourself",
        )

    def in_use() -> None:
        raise ModelError(f"{model.name} is just being pulled", alternative="end that first")

    with locked(repository.lock, in_use):
        found = [each for each in _repositories() if each.folder == repository.folder]  # as it is now
        models = [other for each in found for other in _models(each)]
        if models and all(other.name == model.name for other in models):
            _delete_all(repository)
        for now in [other for other in models if other.name == model.name and len(models) > 1]:
            _delete_apart(now, {path for other in models if other is not now for path in other.files})


def _delete_apart(model: CachedModel, kept: set[Path]) -> None:
    """Its files, but those that are `kept`, and what they alone lead to."""
    root = model.repository.folder.resolve()
    gone = [path for path in model.files if path not in kept and path.parent.resolve().is_relative_to(root)]
    blobs = {path.resolve() for path in gone if path.is_symlink()}
    for path in gone:
        delete(path)
    needed = {path.resolve() for folder in model.repository.revisions for path in _below(folder)}
    for blob in blobs - needed:
        if blob.parent == root / "blobs":
            delete(blob)


def _delete_all(repository: Repository) -> None:
    folder = repository.folder
    if repository.hub == "modelscope":
        for link in folder.parent.iterdir():  # ModelScope's package links NAME to NA___ME
            if link.is_symlink() and link.resolve() == folder.resolve():
                delete(link)
    delete(folder)
