"""What a service may see of the disk: home directories and /tmp are hidden from it, but for what it needs of them."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ingle.errors import ConfigError

HIDDEN = tuple(map(Path, ("/home", "/root", "/run/user", "/tmp", "/var/tmp")))
"""By `ProtectHome=tmpfs` and `PrivateTmp=`."""
_MAX_LINKS = 40
_MAX_FILES = 10_000


@dataclass(frozen=True)
class Reader:
    """Who runs the service."""

    name: str
    """For people."""
    uid: int | None = None
    """None is a user that nothing belongs to."""
    groups: frozenset[int] = frozenset()

    def may(self, path: Path, bits: int) -> bool:
        """Whether the mode of `path` grants all of `bits`, some of 4 (read), 2 (write) and 1 (search or run)."""
        if self.uid == 0:
            return True
        found = path.stat()
        mode = stat.S_IMODE(found.st_mode)
        if self.uid is not None and found.st_uid == self.uid:
            mode >>= 6
        elif found.st_gid in self.groups:
            mode >>= 3
        return mode & bits == bits


def hops(path: Path) -> Iterator[Path]:
    """`path`, and what it becomes as one link after the other is followed."""
    current = Path(os.path.normpath(path)) if ".." not in path.parts else path
    for _ in range(_MAX_LINKS):
        yield current
        for part in (*reversed(current.parents), current):
            if part.is_symlink():
                target = part.parent / part.readlink()
                current = Path(os.path.normpath(target / current.relative_to(part)))
                break
        else:
            return


def places_of_model(path: Path) -> list[Path]:
    """The folder or file itself, and where the links in it lead to, as those of hub caches do."""
    found = dict.fromkeys(hops(path))
    files = sorted(path.rglob("*"))[:_MAX_FILES] if path.is_dir() else _parts(path)
    for file in files:
        if file.is_symlink() or not path.is_dir():
            beyond = list(hops(file))[1:]
            found.update(dict.fromkeys(hop.parent for hop in beyond if path not in hop.parents))
            if not path.is_dir():
                found[file] = None
    return list(found)


def _parts(file: Path) -> list[Path]:
    """All of a model that is split into `…-00001-of-00003.gguf`."""
    stem, of, last = file.stem.rpartition("-of-")
    if not of or not last.isdecimal() or not stem[-5:].isdecimal():
        return [file]
    prefix = stem[:-5]
    return sorted(each for each in file.parent.iterdir() if each.name.startswith(prefix) and each.suffix == file.suffix)


def places_of_python(executable: Path, prefixes: Sequence[Path]) -> list[Path]:
    """Of an interpreter, with the environments that it belongs to."""
    found = [hop.parent.parent for hop in hops(executable)]  # python stands in a folder bin
    for prefix in prefixes:
        found += hops(prefix)
    return list(dict.fromkeys(found))


def hidden(places: Sequence[Path], roots: Sequence[Path] = HIDDEN) -> tuple[Path, ...]:
    """Those that a service does not see by itself, without what lies below others.

    Raises `ConfigError` for a whole home directory or more: it is not for a service to read.
    """
    found = {place for place in places if any(root == place or root in place.parents for root in roots)}
    for place in found:
        if place in roots or (place.parent == Path("/home") and place.is_dir()):
            raise ConfigError(f"the service would see all of {place}: put what it needs of it into a folder of its own")
    return tuple(sorted(place for place in found if not any(parent in found for parent in place.parents)))


def first_unreadable(path: Path, reader: Reader, bound: Sequence[Path]) -> Path | None:
    """What of `path`, a file or a folder with its files, the reader may not read; None when it may read all.

    Folders above one that is `bound` into the service's view do not matter. What cannot be looked at is taken for
    readable: whoever asks may not know.
    """
    try:
        for parent in path.parents:
            is_made = any(place.is_relative_to(parent) and path.is_relative_to(place) for place in bound)
            if not (is_made and parent not in bound) and not reader.may(parent, 1):
                return parent
        if path.is_dir():
            if not reader.may(path, 5):
                return path
            entries = sorted(path.rglob("*"))[:_MAX_FILES]
            return next(
                (each for each in entries if each.exists() and not reader.may(each, 5 if each.is_dir() else 4)), None
            )
        return None if reader.may(path, 4) else path
    except OSError:
        return None
