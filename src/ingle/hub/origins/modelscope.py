"""ModelScope, by its HTTP interface: https://modelscope.cn/docs/models/download.

Its own package is not needed: it brings a dozen others, asks third parties in which cloud it runs, and shows progress
in its own way. Files land where it keeps them ($MODELSCOPE_CACHE), so that each finds what the other has downloaded.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote as quote_url
from urllib.parse import urlencode, urlsplit

import msgspec

from ingle.hub.http import Answer, Http, HubError, Unreachable
from ingle.hub.listing import MAX_FILES, Digest, Found, License, Listing, RemoteFile, safe_path
from ingle.hub.names import Hub, RepoRef

ENDPOINT = "https://modelscope.cn"
_LISTING_LIMIT = 3000
"""The hub cuts a listing at so many entries, and says nothing."""
_TOKENS_PAGE = "https://modelscope.cn/my/myaccesstoken"


class _File(msgspec.Struct):
    Path: str
    Type: str = "blob"
    Size: int | None = None
    Sha256: str | None = None


class _Files(msgspec.Struct):
    Files: list[_File] | None = None
    LatestCommitter: dict[str, Any] | None = None


class _Detail(msgspec.Struct):
    License: str | None = None
    Revision: str | None = None
    BaseModel: list[str] | None = None
    Tags: list[Any] | None = None


class _Found(msgspec.Struct):
    id: str
    downloads: int | None = None
    likes: int | None = None
    tasks: list[str] | None = None


class ModelScope:
    hub: Hub = "modelscope"
    advice = "make room, or point MODELSCOPE_CACHE to another disk"

    def __init__(self, endpoint: str | None = None, on_wait: Callable[[str], None] = lambda text: None) -> None:
        """Raises `HubError` when the user wants no network."""
        given = endpoint or os.environ.get("MODELSCOPE_ENDPOINT") or os.environ.get("MODELSCOPE_DOMAIN") or ENDPOINT
        self.endpoint = (given if "://" in given else f"https://{given}").rstrip("/")
        self.cache = cache_folder()
        self._ref: RepoRef | None = None
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
            raise Unreachable(f"{self.endpoint} is not asked because HF_HUB_OFFLINE is set")
        token = os.environ.get("MODELSCOPE_API_TOKEN", "").strip()
        usable = token.isascii() and token.isprintable() and " " not in token
        headers = {"Authorization": f"Bearer {token}"} if token and usable else {}
        own = frozenset({"modelscope.cn", "www.modelscope.cn", urlsplit(self.endpoint).hostname or ""})
        self.http = Http(headers=headers, trusted=own, explain=self._explain, on_wait=on_wait)

    def listing(self, ref: RepoRef) -> Listing:
        self._ref = ref
        revision = ref.revision or "master"
        detail = _data(self.http.json(f"{self.endpoint}/api/v1/models/{ref.repo}"), _Detail, self.endpoint)
        files = self._files(ref, revision, "")
        if len(files) >= _LISTING_LIMIT:  # the files of the top are what a model needs
            files = self._files(ref, revision, None)
        if len(files) > MAX_FILES:
            raise HubError(f"{ref.repo} has {len(files)} files, more than the {MAX_FILES} that are taken")
        return Listing(
            ref=ref,
            repo=ref.repo,
            commit=revision,
            files=tuple(_file(file, ref.repo) for file in files if file.Type != "tree"),
            license=License(detail.License or ""),
            page=f"{self.endpoint}/models/{ref.repo}",
            tags=frozenset(tag for tag in detail.Tags or () if isinstance(tag, str)),
            base_model=next(iter(detail.BaseModel or ()), None),
        )

    def _files(self, ref: RepoRef, revision: str, root: str | None) -> list[_File]:
        """All files, or with None as `root` those of the top folder alone."""
        url = f"{self.endpoint}/api/v1/models/{ref.repo}/repo/files"
        params = {"Revision": revision, "Recursive": str(root is not None)}
        return _data(self.http.json(url, params), _Files, url).Files or []

    def url(self, listing: Listing, file: RemoteFile) -> str:
        query = urlencode({"Revision": listing.commit, "FilePath": file.path}, quote_via=quote_url)
        return f"{self.endpoint}/api/v1/models/{listing.repo}/repo?{query}"

    def folder(self, listing: Listing) -> Path:
        return model_folder(self.cache, listing.repo, listing.commit)

    def blob(self, listing: Listing, file: RemoteFile) -> Path:
        return self.folder(listing) / file.path

    def lock(self, listing: Listing) -> Path:
        return self.cache / ".locks" / f"ingle-{listing.repo.replace('/', '--')}.lock"

    def finish(self, listing: Listing, file: RemoteFile) -> None:
        """The bytes lie where the file is to be found."""

    def complete(self, listing: Listing) -> None:
        """A revision is its folder's name."""

    def search(self, words: str, limit: int) -> list[Found]:
        url = f"{self.endpoint}/openapi/v1/models"
        answer = self.http.json(url, {"search": words, "page_number": "1", "page_size": str(min(limit, 100))})
        data = answer.get("data", answer) if isinstance(answer, dict) else {}
        found = _convert(data.get("models", []) if isinstance(data, dict) else [], list[_Found], url)
        return [Found(each.id, each.downloads, each.likes, next(iter(each.tasks or ()), "")) for each in found]

    def by(self, author: str) -> list[Found]:
        return self.search(author, 100)

    def _explain(self, answer: Answer) -> str | None:
        ref = self._ref
        if ref is None:
            return None
        if answer.status in (401, 403):
            token = f"set MODELSCOPE_API_TOKEN to a token from {_TOKENS_PAGE}"
            return f"{ref.repo} on ModelScope is private, or its terms are to be accepted on its page: {token}"
        if answer.status == 404:
            revision = f" with a revision {ref.revision}" if ref.revision else ""
            return f"{self.endpoint} has no public model {ref.repo}{revision}: check the name"
        return None


def cache_folder() -> Path:
    """ModelScope's own, by MODELSCOPE_CACHE."""
    return Path(os.environ.get("MODELSCOPE_CACHE") or "~/.cache/modelscope").expanduser().absolute()


def model_folder(cache: Path, repo: str, revision: str) -> Path:
    """Where its package keeps a model; where older versions of it did, if one lies there."""
    owner, _, name = repo.rpartition("/")
    for parent in (cache / "models", cache / "hub" / "models", cache / "hub"):
        for old in (parent / owner / name.replace(".", "___"), parent / owner / name):
            if revision == "master" and (old / "config.json").is_file():
                return old
    return cache / "models" / repo.replace("/", "--") / "snapshots" / revision


def repositories(cache: Path) -> Iterator[tuple[str, Path, Path]]:
    """Name of each repository that lies in the cache, all that it has on the disk, and its files."""
    for storage in sorted((cache / "models").glob("*--*")):
        for folder in sorted((storage / "snapshots").glob("*")):
            yield storage.name.replace("--", "/", 1), storage, folder
    seen = set[str]()
    for parent in (cache / "models", cache / "hub" / "models", cache / "hub"):
        for config in sorted(parent.glob("*/*/config.json")):
            name = config.parent.name.replace("___", ".")
            repo = f"{config.parent.parent.name}/{name}"
            if repo not in seen and config.parent.parent.name != "models" and "--" not in repo:
                seen.add(repo)
                yield repo, config.parent, config.parent


def _file(file: _File, repo: str) -> RemoteFile:
    sha256 = (file.Sha256 or "").lower()
    known = len(sha256) == 64 and sha256.isalnum()
    return RemoteFile(safe_path(file.Path, repo), file.Size, Digest("sha256", sha256) if known else None)


def _data(answer: Any, kind: type[Any], url: str) -> Any:
    """What the hub wraps into its Data. It answers some failures with 200 and a code."""
    if not isinstance(answer, dict) or "Data" not in answer:
        raise HubError(f"{url} answers otherwise than ModelScope does: is MODELSCOPE_ENDPOINT right?")
    if answer.get("Success") is False or answer.get("Code", 200) != 200:
        raise HubError(f"{url} answers: {str(answer.get('Message'))[:200]}")
    return _convert(answer["Data"] or {}, kind, url)


def _convert(value: Any, kind: type[Any], url: str) -> Any:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise HubError(f"{url} answers otherwise than ModelScope does ({error})") from error
