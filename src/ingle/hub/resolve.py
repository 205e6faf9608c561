"""From what the user calls a model to the files on this machine's disk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

from ingle.errors import ConfigError, ModelError
from ingle.hub.catalog import find_entry, near_names
from ingle.hub.disk import NotAllowed
from ingle.hub.http import HubError, Unreachable
from ingle.hub.local import is_gguf, near_paths, refuse_file, refuse_folder, refuse_missing
from ingle.hub.names import FILE_SUFFIXES, RepoRef, ShortName, is_hub_name, parse_name, quote
from ingle.hub.progress import Progress, show_progress
from ingle.hub.pull import Known, here, pull
from ingle.hub.source import ModelSource, Wanted
from ingle.hub.store import Store, check_name

__all__ = ["ModelSource", "ensure_model", "pull_model", "resolve_model"]


def resolve_model(name: str, store: Store | None = None) -> ModelSource:
    """Find a model on this machine: the path of a Hugging Face folder or of a .gguf file, the short name of a stored
    model, or one that a hub's cache holds.

    A path that exists wins over a name. Raises `ModelError` that says what to do when there is no such model.
    """
    if (source := _from_path(name)) is not None:
        return source
    store = store or Store()
    found = _known(name, store)
    if (source := here(found, store)) is not None:
        return source
    raise ModelError(f"model {found} is not on this machine yet: run `ingle pull {found}`", alternative=_nearby(name))


def ensure_model(name: str, progress: Progress | None = None, store: Store | None = None) -> ModelSource:
    """`resolve_model`, but a model that is not on this machine yet is pulled first.

    Progress is shown on stderr unless `progress` is given.
    """
    if (source := _from_path(name)) is not None:
        return source
    store = store or Store()
    found = _known(name, store)
    if (source := here(found, store)) is not None:
        return source
    shown = show_progress() if progress is None else nullcontext(progress)
    with shown as progress:
        progress.note(f"{found} is not on this machine yet: pulling it")
        with _nearby_paths(name):
            return pull(found, progress, store)


def pull_model(
    name: str,
    progress: Progress,
    *,
    hub: str | None = None,
    revision: str | None = None,
    wanted: Wanted | None = None,
    store: Store | None = None,
) -> ModelSource:
    """The newest that the hub has of the model, downloaded as far as it is not here.

    `hub` is the one of a name that says none, `revision` a branch, tag or commit. Without the hub, or on a disk that
    can only be read, what is here of it will do. Raises `ModelError`, also for a path.
    """
    if (source := _from_path(name)) is not None:
        raise ModelError(f"{source.path} is on this machine: there is nothing to pull", alternative="give a name")
    store = store or Store()
    found = _at_revision(_known(name, store, hub), revision)
    with _nearby_paths(name):
        try:
            return pull(found, progress, store, wanted)
        except (Unreachable, NotAllowed) as error:
            if wanted is not None or (source := here(found, store)) is None:
                raise
            progress.note(f"{error}; what is here of {found} is whole")
            return source


@contextmanager
def _nearby_paths(name: str) -> Iterator[None]:
    """Adds to what a hub says of a name the path that may have been meant."""
    try:
        yield
    except HubError as error:
        if error.alternative is not None or (nearby := _nearby(name)) is None:
            raise
        raise ModelError(error.what, alternative=nearby) from error


def _nearby(name: str) -> str | None:
    """What a name of a hub may have been meant to be, if it was a path."""
    near = near_paths(Path(name)) if is_hub_name(name) else []
    return f"did you mean {' or '.join(near)}?" if near else None


def resolve_or_locate(name: str, hub: str | None = None, revision: str | None = None) -> ModelSource | Known:
    """The model on this machine, or what is known of one that is not; no hub is asked.

    `hub` is the one of a name that says none, `revision` a branch, tag or commit.
    """
    if (source := _from_path(name)) is not None:
        return source
    store = Store()
    found = _at_revision(_known(name, store, hub), revision)
    return here(found, store) or found


def _from_path(name: str) -> ModelSource | None:
    """The model at a path; None when `name` can only be a name."""
    if name.lower().startswith(("http://", "https://")):
        return None
    try:
        path = Path(name).expanduser() if name.startswith("~") else Path(name)
        is_file, is_folder = path.is_file(), path.is_dir()
        if is_folder and (path / "config.json").is_file():
            return ModelSource(name, path.absolute(), "folder")
    except PermissionError as error:
        raise ModelError(
            f"{quote(name)} cannot be looked into: {error.strerror}",
            alternative="give the user who runs ingle the right to read it",
        ) from error
    except OSError as error:
        raise ModelError(f"{quote(name)} cannot be looked up: {error.strerror}") from error
    except RuntimeError as error:  # "~" of a user that does not exist
        raise ModelError(f"{quote(name)} cannot be looked up: {error}") from error
    if is_file and is_gguf(path):
        return ModelSource(name, path.absolute(), "gguf")
    if not _looks_like_path(name, path, is_there=is_file or is_folder or path.is_symlink()):
        return None
    if is_folder:
        refuse_folder(name, path)
    if is_file:
        refuse_file(name, path)
    refuse_missing(name, path)


def _looks_like_path(name: str, path: Path, *, is_there: bool) -> bool:
    """Whether it is no name: names of a hub have one slash too, and their own prefixes more."""
    if name.startswith(("~", ".", os.sep)):
        return True
    if os.sep not in name:
        return path.suffix.lower() in FILE_SUFFIXES
    begins_here = name.count(os.sep) > 1 and name.lower().endswith(".gguf") and Path(path.parts[0]).is_dir()
    return is_there or begins_here or not is_hub_name(name)


def _known(name: str, store: Store, hub: str | None = None) -> Known:
    reference = parse_name(name, hub)
    if not isinstance(reference, ShortName):
        return Known(str(reference), reference)
    entry = find_entry(name)
    if entry is not None:
        known = [Known(entry.name, each, entry) for each in entry.references(hub) or (entry,)]
        if hub is None:  # one that is here already is as good as that of the hub that is set
            return next((each for each in known if here(each, store) is not None), known[0])
        return known[0]
    short, stored = check_name(name), store.names()
    if short in stored:
        return Known(short, reference)
    raise ModelError(_unknown(short, stored))


def _at_revision(found: Known, revision: str | None) -> Known:
    if revision is None:
        return found
    if not isinstance(found.reference, RepoRef) or found.reference.revision not in (None, revision):
        raise ConfigError(f"--revision {revision}: {found} has no other revision")
    reference = replace(found.reference, revision=revision)
    return Known(str(reference), reference)


def _unknown(short: str, stored: list[str]) -> str:
    if near := near_names(short, stored):
        return f"there is no model {short}; did you mean {' or '.join(near)}? (`ingle pull NAME` fetches a model)"
    return (
        f"there is no model {short}: `ingle catalog` lists the short names; or give a model of a hub by its whole "
        "name, org/name, or a folder or .gguf file"
    )
