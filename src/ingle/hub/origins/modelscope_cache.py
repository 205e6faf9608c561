"""Where ModelScope's package keeps models, in all the ways that its versions have had.

Since 1.38 `models/ORG--NAME/snapshots/REVISION/`, which is what ingle writes; before, one folder for whatever revision
came last, with its dots as `___`: `models/ORG/NA___ME` from 1.20 (under `hub/` where no MODELSCOPE_CACHE was set),
`hub/ORG/NA___ME` and `ORG/NAME` before that.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

MASTER = "master"
_MAX_MARKER_BYTES = 1000
_PARENTS = ("models", "hub/models", "hub", "")
_NO_OWNERS = {"models", "hub", "datasets", "ast_indexer"}


def cache_folder() -> Path:
    """ModelScope's own, by MODELSCOPE_CACHE."""
    return Path(os.environ.get("MODELSCOPE_CACHE") or "~/.cache/modelscope").expanduser().absolute()


def model_folders(cache: Path, repo: str, revision: str | None) -> list[Path]:
    """Where a revision of a model may lie, the place to look first first. They need not exist.

    An old folder stands for the revision that its `.mv` names; without a revision any will do, since the package took
    the latest tag for that.
    """
    owner, _, name = repo.rpartition("/")
    old = [cache / parent / owner / each for parent in _PARENTS for each in dict.fromkeys((_escaped(name), name))]
    found = [folder for each in old if (folder := _as_written(cache, each)) is not None]
    found = [folder for folder in found if revision is None or revision_of(folder) == revision]
    return [*found, _as_written(cache, _snapshot(cache, repo, revision)) or _snapshot(cache, repo, revision)]


def download_folder(cache: Path, repo: str, revision: str) -> Path:
    """Where a revision is to lie: in an old folder that there is for it, as the package has it, else in a new one."""
    folders = model_folders(cache, repo, revision)
    return next((folder for folder in folders if _has_entries(folder)), folders[-1])


def lock_file(cache: Path, repo: str) -> Path:
    """ingle's own, of those who change a repository."""
    return cache / ".locks" / f"ingle-{repo.replace('/', '--')}.lock"


def repositories(cache: Path) -> Iterator[tuple[str, Path, list[Path]]]:
    """Name of each repository that lies in the cache, all that it has on the disk, and the folders of its revisions."""
    for storage in _listed(cache / "models"):
        if snapshots := _listed(storage / "snapshots"):
            yield storage.name.replace("--", "/", 1), storage, snapshots
    seen = set[Path]()
    for parent in _PARENTS:
        for owner in _listed(cache / parent):
            for folder in sorted(_listed(owner), key=Path.is_symlink):  # the package links NAME to NA___ME
                real = folder.resolve()
                if owner.name not in _NO_OWNERS and folder.name != "snapshots" and real not in seen and _is_model(real):
                    seen.add(real)
                    yield f"{owner.name}/{folder.name.replace('___', '.')}", folder, [folder]


def revision_of(folder: Path) -> str:
    """Of what an old folder holds."""
    try:
        with (folder / ".mv").open() as file:
            match = re.match(r"Revision:([^,\n]+)", file.read(_MAX_MARKER_BYTES))
    except (OSError, UnicodeDecodeError):
        return MASTER
    return match[1] if match else MASTER


def _snapshot(cache: Path, repo: str, revision: str | None) -> Path:
    return cache / "models" / repo.replace("/", "--") / "snapshots" / (revision or MASTER)


def _escaped(name: str) -> str:
    return name.replace(".", "___")


def _as_written(cache: Path, folder: Path) -> Path | None:
    """The folder that is there by this name, in capitals or not: the hub takes qwen/ for Qwen/."""
    if folder.is_dir():
        return folder
    at = cache
    for part in folder.relative_to(cache).parts:
        same = at / part
        found = same if same.is_dir() else next((e for e in _listed(at) if e.name.lower() == part.lower()), None)
        if found is None:
            return None
        at = found
    return at


def _is_model(folder: Path) -> bool:
    """Whether it holds a model or the beginning of one."""
    if (folder / "config.json").is_file():
        return True
    return any(True for pattern in ("*.gguf*", "*/*.gguf*") for _ in folder.glob(pattern))


def _has_entries(folder: Path) -> bool:
    try:
        return any(True for _ in folder.iterdir())
    except OSError:
        return False


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError:
        return []
