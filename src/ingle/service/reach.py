"""What a service may see of the disk: home directories and /tmp are hidden from it, but for what it needs of them."""

from __future__ import annotations

import glob
import re
import stat
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ingle.errors import ConfigError

HIDDEN = tuple(map(Path, ("/home", "/root", "/run/user", "/tmp", "/var/tmp")))
"""By `ProtectHome=tmpfs` and `PrivateTmp=`."""


@dataclass(frozen=True)
class Reader:
    """Who runs the service."""

    name: str
    """For people."""
    uid: int | None = None
    """None is a user that nothing belongs to."""
    groups: frozenset[int] = frozenset()

    def may(self, path: Path, bits: int) -> bool:
        """Whether the mode of `path` grants all of `bits`, some of 4 (read) and 1 (search)."""
        if self.uid == 0:
            return True
        found = path.stat()
        mode = stat.S_IMODE(found.st_mode)
        if self.uid is not None and found.st_uid == self.uid:
            mode >>= 6
        elif found.st_gid in self.groups:
            mode >>= 3
        return mode & bits == bits


def package() -> Path:
    """The folder that ingle is imported from."""
    import ingle

    return Path(ingle.__file__).absolute().parents[1]


def of_python() -> set[Path]:
    """The environment that runs this, the Python that it was made from, and where ingle lies."""
    places = [Path(sys.prefix), Path(sys.base_prefix), package()]
    return {Path(sys.executable).resolve().parents[1], *places, *(place.resolve() for place in places)}


def of_model(path: Path) -> set[Path]:
    """A folder, or the file with its other parts; and where links of it lead, as they do in a hub's cache."""
    if path.is_dir():
        return {path, path.resolve(), *(file.resolve().parent for file in path.iterdir() if file.is_symlink())}
    parts = re.sub(r"-\d{5}-of-", "-*-of-", glob.escape(path.name))  # …-00001-of-00003.gguf
    files = {path, *path.parent.glob(parts)}
    return files | {file.resolve() for file in files}


def hidden(places: Iterable[Path]) -> tuple[Path, ...]:
    """Those that a service does not see by itself, without what lies below others.

    Raises `ConfigError` for a whole home directory or more: it is not for a service to read.
    """
    found = {place for place in places if any(root == place or root in place.parents for root in HIDDEN)}
    for place in found:
        if place in HIDDEN or place.parent == Path("/home"):
            raise ConfigError(f"the service would see all of {place}: put what it needs of it into a folder of its own")
    return tuple(sorted(place for place in found if not any(parent in found for parent in place.parents)))


def first_unreadable(path: Path, reader: Reader, visible: Sequence[Path]) -> Path | None:
    """What keeps the reader from a file, or from a folder and its entries; None where nothing does.

    The modes of folders above a `visible` place do not matter: systemd makes that place appear by itself. What cannot
    be looked at is taken for readable: whoever asks may not know.
    """
    shown = [place for place in visible if path.is_relative_to(place)]
    above = [folder for folder in reversed(path.parents) if not any(folder in place.parents for place in shown)]
    try:
        wanted = [(folder, 1) for folder in above] + [(path, 5 if path.is_dir() else 4)]
        if (found := next((each for each, bits in wanted if not reader.may(each, bits)), None)) is not None:
            return found
        entries = [each for each in path.iterdir() if each.exists()] if path.is_dir() else []
        return next((each for each in entries if not reader.may(each, 5 if each.is_dir() else 4)), None)
    except OSError:
        return None
