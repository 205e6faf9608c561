"""A .gguf file by its URL, or all parts of a split one, into `downloads` in ingle's home."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote as quote_url
from urllib.parse import unquote, urlsplit, urlunsplit

from ingle import facts
from ingle.errors import ModelError
from ingle.hub.disk import delete, disk_errors, locked
from ingle.hub.download import PART, Job, download
from ingle.hub.http import Http, shown_url
from ingle.hub.local import GGUF_MAGIC
from ingle.hub.names import UrlRef
from ingle.hub.progress import Progress
from ingle.hub.source import ModelSource
from ingle.hub.store import Store

_PART_OF = re.compile(r"-00001-of-(\d{5})\.gguf$", re.IGNORECASE)
_FILE = re.compile(r"[\w.+ -]{1,200}\.gguf", re.IGNORECASE)
_MAX_PARTS = 1000
_URL = "url"
"""The file beside the model that says where it came from."""


def stored_url(ref: UrlRef, store: Store) -> ModelSource | None:
    """The model if all of it is here."""
    files = [path for path, _ in url_files(ref, store)]
    return _source(files) if all(path.is_file() for path in files) else None


def fetch_url(ref: UrlRef, progress: Progress, store: Store) -> ModelSource:
    """The model; what is missing of it is downloaded, from where an earlier call was cut. Raises `ModelError`."""
    files = list(url_files(ref, store))
    folder = files[0][0].parent

    def waiting() -> None:
        progress.note(f"another process is downloading {ref.file}: waiting for it")

    with (
        Http(on_wait=progress.note) as http,
        disk_errors(f"download {ref.file}"),
        locked(_lock(folder), waiting),
    ):
        jobs = [_probed(http, path, url) for path, url in files if not path.is_file()]
        if jobs:
            folder.mkdir(exist_ok=True)
            (folder / _URL).write_text(shown_url(ref.url))
            size = sum(job.size or 0 for job in jobs)
            told = facts.decimal_size(size) if size else "it does not say how much"
            progress.note(f"{ref.file}: {told} to download from {urlsplit(ref.url).hostname}")
        download(http, jobs, f"downloading {ref.file}", progress)
    return _source([path for path, _ in files])


@dataclass(frozen=True)
class StoredUrl:
    """What was downloaded by a URL, or a part of it."""

    url: str
    folder: Path
    files: tuple[Path, ...]
    is_whole: bool


def stored_urls(store: Store) -> Iterator[StoredUrl]:
    """Raises `OSError`."""
    for folder in sorted((store.root / "downloads").glob("*/")):
        try:
            url = (folder / _URL).read_text()[:2048]
            wanted = [path for path, _ in url_files(UrlRef(url), store)]
        except (OSError, ValueError, ModelError):  # not ingle's
            continue
        files = tuple(sorted(path for path in folder.iterdir() if path.suffix.lower() == ".gguf" or _is_part(path)))
        if files and wanted[0].parent == folder:
            yield StoredUrl(url, folder, files, all(path.is_file() for path in wanted))


def _is_part(path: Path) -> bool:
    return path.name.endswith(PART)


def remove_url(stored: StoredUrl) -> None:
    """Raises `OSError`, and `ModelError` where it is just being downloaded."""

    def in_use() -> None:
        raise ModelError(f"{stored.url} is just being downloaded", alternative="end that first")

    with locked(_lock(stored.folder), in_use):
        delete(stored.folder)


def _lock(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


def url_folder(url: str, store: Store) -> Path:
    """Named by host and URL, without what signs it, which differs from day to day."""
    bare = shown_url(url)
    host = re.sub(r"[^\w.-]", "_", urlsplit(bare).hostname or "host")[:60]
    return store.root / "downloads" / f"{host}-{hashlib.sha256(bare.encode()).hexdigest()[:12]}"


def url_files(ref: UrlRef, store: Store) -> Iterator[tuple[Path, str]]:
    """Place and URL of the file, or of each part."""
    folder, name = url_folder(ref.url, store), ref.file
    if _FILE.fullmatch(name) is None:
        raise ModelError(f"{shown_url(ref.url)}: {name!r:.100} is no name that a file may have here")
    match = _PART_OF.search(name)
    if match is None:
        yield folder / name, ref.url
        return
    count = int(match[1])
    if not 0 < count <= _MAX_PARTS:
        raise ModelError(f"{shown_url(ref.url)} is one of {count} parts, which is more than the {_MAX_PARTS} taken")
    for number in range(1, count + 1):
        part = f"{name[: match.start()]}-{number:05}-of-{count:05}{name[-len('.gguf') :]}"
        yield folder / part, _sibling(ref.url, part)


def _sibling(url: str, name: str) -> str:
    parts = urlsplit(url)
    folder = unquote(parts.path).rpartition("/")[0]
    return urlunsplit(parts._replace(path=quote_url(f"{folder}/{name}")))


def _probed(http: Http, path: Path, url: str) -> Job:
    """Size and beginning, before anything is downloaded."""
    with http.open(url) as body:
        head = bytearray()
        for chunk in body.chunks():
            head += chunk
            if len(head) >= len(GGUF_MAGIC):
                break
        if not head.startswith(GGUF_MAGIC):
            raise ModelError(
                f"{shown_url(url)} sends what is no GGUF file: it begins with {bytes(head[:16])!r}",
                alternative="give the address of the file itself",
            )
        return Job(url, path, path.name, body.total)


def _source(files: list[Path]) -> ModelSource:
    return ModelSource(files[0].stem, files[0], "gguf")
