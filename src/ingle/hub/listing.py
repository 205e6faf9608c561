"""What a hub says of a model before anything of it is downloaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from ingle.errors import ModelError
from ingle.hub.http import Http
from ingle.hub.names import Hub, RepoRef, quote

MAX_FILES = 100_000
_MAX_PATH_CHARS = 500


@dataclass(frozen=True)
class Digest:
    kind: Literal["sha256", "git"]
    """`git` is the SHA-1 of a git blob: of "blob", the size and the bytes."""
    value: str


@dataclass(frozen=True)
class RemoteFile:
    path: str
    """In the repository, with `/`; checked to stay within it."""
    size: int | None
    """Bytes, where the hub says."""
    digest: Digest | None = None
    changed_s: float | None = None
    """When it was changed last, where the hub says; seconds since 1970."""

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]


@dataclass(frozen=True)
class License:
    name: str
    """As the hub writes it, such as apache-2.0; empty where it says none."""
    url: str | None = None


@dataclass(frozen=True)
class Listing:
    """A repository at one commit."""

    ref: RepoRef
    repo: str
    """Its name by the hub, which is another than asked for where it was renamed."""
    commit: str
    files: tuple[RemoteFile, ...]
    license: License
    page: str
    """Where people read about it and accept its terms."""
    gated: bool = False
    """Whether its terms have to be accepted before it can be downloaded."""
    tags: frozenset[str] = frozenset()
    base_model: str | None = None
    gguf: Mapping[str, Any] = field(default_factory=dict)
    """What the hub read out of a GGUF file: architecture, context_length, total, chat_template."""

    def find(self, path: str) -> RemoteFile | None:
        return next((file for file in self.files if file.path == path), None)


@dataclass(frozen=True)
class Found:
    """A line of a search."""

    name: str
    downloads: int | None = None
    likes: int | None = None
    task: str = ""
    gated: bool = False


class Origin(Protocol):
    """A hub, or what else hands out repositories."""

    hub: Hub
    http: Http
    cache_setting: str
    """The environment variable that says where its cache is."""

    def listing(self, ref: RepoRef) -> Listing:
        """Raises `HubError`."""
        ...

    def url(self, listing: Listing, file: RemoteFile) -> str: ...

    def folder(self, listing: Listing) -> Path:
        """Where the files of this commit are found on this machine, by their paths."""
        ...

    def blob(self, listing: Listing, file: RemoteFile) -> Path:
        """Where a file's bytes are to lie."""
        ...

    def has(self, listing: Listing, file: RemoteFile) -> bool:
        """Whether its bytes lie there already, and are those of this commit."""
        ...

    def lock(self, listing: Listing) -> Path:
        """Of those who download this repository."""
        ...

    def finish(self, listing: Listing, files: Sequence[RemoteFile]) -> None:
        """Once their bytes lie there, several having the same ones maybe: makes the files be found in `folder`."""
        ...

    def complete(self, listing: Listing) -> None:
        """Once all files that were wanted are here: makes the revision lead to this commit."""
        ...

    def search(self, words: str, limit: int) -> list[Found]: ...

    def by(self, author: str) -> list[Found]:
        """The models of a person or organization that are downloaded most; none where the hub does not list them."""
        ...


def safe_path(path: str, where: str) -> str:
    """`path` as a hub names a file. Raises `ModelError` for one that leads out of its repository's folder."""
    parts = path.split("/")
    bad = not path or len(path) > _MAX_PATH_CHARS or "\\" in path or not path.isprintable()
    if bad or any(part in ("", ".", "..") for part in parts):
        raise ModelError(f"{where} lists a file {quote(path)}, which is no path within it: nothing of it is taken")
    return path
