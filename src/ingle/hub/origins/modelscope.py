"""ModelScope, by the HTTP interface that its own package speaks (read in 1.19, 1.31 and 1.40).

The package is not needed: it resumes nothing that failed a check, asks (in 1.31) in which region of a cloud it runs,
unpickles what lies in its folders, and has its own bars and errors. Files land where it keeps them, so that each finds
what the other has downloaded.
"""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit
from urllib.parse import quote as quote_url

import msgspec

from ingle.hub.disk import sha256_of
from ingle.hub.http import Answer, Http, HubError, Refused, Unreachable
from ingle.hub.listing import MAX_FILES, Digest, Found, License, Listing, RemoteFile, safe_path
from ingle.hub.names import Hub, RepoRef
from ingle.hub.origins import modelscope_cache, modelscope_login
from ingle.hub.origins.modelscope_cache import MASTER

ENDPOINT = "https://modelscope.cn"
_OTHER_SITE = "https://www.modelscope.ai"
_LISTING_LIMIT = 3000
"""The hub cuts a listing at so many entries, and says nothing."""
_MAX_LISTINGS = 200
"""Folders of a repository with more files than that which are listed one by one, from the top."""
_PAGE = 50
_MAX_SHOWN = 10
_COMMIT = re.compile(r"[0-9a-f]{7,40}")
_OVERLOADED = re.compile(r"\bError \d+|time(d )?out|too many", re.IGNORECASE)
"""What the hub says under 404 when its database is in trouble."""
_ABSENT = re.compile(r"not found|not exist|不存在", re.IGNORECASE)
_NOT_THE_HUB = "answers otherwise than ModelScope does: is MODELSCOPE_ENDPOINT right?"
_TASKS = {
    "sentence-embedding": "sentence-similarity",
    "auto-speech-recognition": "automatic-speech-recognition",
    "text-to-image-synthesis": "text-to-image",
    "text-to-video-synthesis": "text-to-video",
}
"""What Hugging Face calls them."""


class _File(msgspec.Struct):
    Path: str
    Type: str = "blob"
    Size: int | None = None
    Sha256: str | None = None
    CommittedDate: int | None = None
    """Of the commit that changed it last; seconds since 1970."""


class _Files(msgspec.Struct):
    Files: list[_File] | None = None


class _Revision(msgspec.Struct):
    Revision: str


class _RevisionMap(msgspec.Struct):
    Branches: list[_Revision] | None = None
    Tags: list[_Revision] | None = None


class _Revisions(msgspec.Struct):
    RevisionMap: _RevisionMap


class _Model(msgspec.Struct):
    id: str = ""
    license: str | None = None
    tags: list[str] | None = None
    tasks: list[str] | None = None
    gated: bool | None = None
    downloads: int | None = None
    likes: int | None = None


class _Page(msgspec.Struct):
    models: list[_Model] | None = None


class ModelScope:
    hub: Hub = "modelscope"
    cache_setting = "MODELSCOPE_CACHE"

    def __init__(self, endpoint: str | None = None, on_wait: Callable[[str], None] = lambda text: None) -> None:
        """Raises `HubError` when the user wants no network, `ConfigError` for a token that cannot be one."""
        given = endpoint or os.environ.get("MODELSCOPE_ENDPOINT") or os.environ.get("MODELSCOPE_DOMAIN") or ENDPOINT
        self.endpoint = (given if "://" in given else f"https://{given}").rstrip("/")
        self.cache = modelscope_cache.cache_folder()
        self._ref: RepoRef | None = None
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
            raise Unreachable(f"{self.endpoint} is not asked because HF_HUB_OFFLINE is set")
        self.http = Http(
            headers=modelscope_login.headers(),
            trusted=frozenset({"modelscope.cn", "www.modelscope.cn", urlsplit(self.endpoint).hostname or ""}),
            explain=self._explain,
            on_wait=on_wait,
            setting="MODELSCOPE_ENDPOINT",
        )

    def listing(self, ref: RepoRef) -> Listing:
        self._ref = ref
        revision = ref.revision or MASTER
        if ref.revision is not None:
            self._check_revision(ref.repo, ref.revision)
        files = self._files(ref.repo, revision)
        if len(files) > MAX_FILES:
            raise HubError(f"{ref.repo} has {len(files)} files, more than the {MAX_FILES} that are taken")
        model = self._describe(ref.repo)
        tags = [*(tag.partition(":")[2] or tag for tag in model.tags or ()), *(model.tasks or ())]
        return Listing(
            ref=ref,
            repo=ref.repo,
            commit=revision,
            files=tuple(_file(file, ref.repo) for file in files),
            license=License((model.license or "")[:100]),
            page=f"{self.endpoint}/models/{ref.repo}",
            gated=bool(model.gated),
            tags=frozenset(_TASKS.get(tag, tag) for tag in tags),
        )

    def _describe(self, repo: str) -> _Model:
        """What its page says; nothing where a mirror has the files alone."""
        url = f"{self.endpoint}/openapi/v1/models/{repo}"
        try:
            model: _Model = self._unpacked(url, "data", _Model)
        except Refused:
            return _Model()
        return model

    def _check_revision(self, repo: str, revision: str) -> None:
        """The hub's own answer to a revision that it has not got does not say which it has."""
        url = f"{self.endpoint}/api/v1/models/{repo}/revisions"
        known = self._unpacked(url, "Data", _Revisions).RevisionMap
        names = [each.Revision for each in (*(known.Branches or ()), *(known.Tags or ()))]
        if revision in names or _COMMIT.fullmatch(revision):
            return
        more = f" and {len(names) - _MAX_SHOWN} more" if len(names) > _MAX_SHOWN else ""
        raise HubError(f"{repo} has no revision {revision}: there are {', '.join(names[:_MAX_SHOWN])}{more}")

    def _files(self, repo: str, revision: str) -> list[_File]:
        """All files: of the whole repository at once, or folder by folder where that is more than the hub lists.

        Of a folder below the top that has more by itself the hub shows no more to anybody.
        """
        found = dict[str, _File]()
        waiting, asked = deque([""]), 0
        while waiting and asked < _MAX_LISTINGS:
            root = waiting.popleft()
            entries, asked = self._page(repo, revision, root, recursive=True), asked + 1
            if len(entries) >= _LISTING_LIMIT:
                own = self._page(repo, revision, root, recursive=False)
                waiting.extend(entry.Path for entry in own if entry.Type == "tree")
                if len(own) >= _LISTING_LIMIT and not root:
                    raise HubError(
                        f"{repo} has {_LISTING_LIMIT} files or more beside each other: ModelScope lists no more"
                    )
                entries, asked = [*own, *entries], asked + 1
            found |= {entry.Path: entry for entry in entries if entry.Type == "blob"}
        return list(found.values())

    def _page(self, repo: str, revision: str, root: str, *, recursive: bool) -> list[_File]:
        url = f"{self.endpoint}/api/v1/models/{repo}/repo/files"
        params = {"Revision": revision, "Recursive": str(recursive), **({"Root": root} if root else {})}
        files: _Files = self._unpacked(url, "Data", _Files, params)
        return files.Files or []

    def url(self, listing: Listing, file: RemoteFile) -> str:
        query = urlencode({"Revision": listing.commit, "FilePath": file.path}, quote_via=quote_url)
        return f"{self.endpoint}/api/v1/models/{listing.repo}/repo?{query}"

    def folder(self, listing: Listing) -> Path:
        return modelscope_cache.download_folder(self.cache, listing.repo, listing.commit)

    def blob(self, listing: Listing, file: RemoteFile) -> Path:
        return self.folder(listing) / file.path

    def has(self, listing: Listing, file: RemoteFile) -> bool:
        """A folder of the package's is that of a branch, and may hold files of an older state of it."""
        path = self.blob(listing, file)
        try:
            stat = path.stat()
        except OSError:
            return False
        if file.size is not None and stat.st_size != file.size:
            return False
        if file.digest is None or (file.changed_s is not None and stat.st_mtime > file.changed_s):
            return True  # it came after the last change
        return sha256_of(path) == file.digest.value

    def lock(self, listing: Listing) -> Path:
        return modelscope_cache.lock_file(self.cache, listing.repo)

    def finish(self, listing: Listing, files: Sequence[RemoteFile]) -> None:
        """The bytes lie where the files are to be found."""

    def complete(self, listing: Listing) -> None:
        """A revision is its folder's name."""

    def search(self, words: str, limit: int) -> list[Found]:
        return self._found({"search": words}, limit)

    def by(self, author: str) -> list[Found]:
        return self._found({"owner": author}, 2 * _PAGE)

    def _found(self, asked: dict[str, str], limit: int) -> list[Found]:
        url = f"{self.endpoint}/openapi/v1/models"
        models = list[_Model]()
        for page in range(1, -(-limit // _PAGE) + 1):
            params = {**asked, "sort": "downloads", "page_number": str(page), "page_size": str(min(limit, _PAGE))}
            more = self._unpacked(url, "data", _Page, params).models or []
            models += more
            if len(more) < _PAGE:
                break
        return [
            Found(each.id, each.downloads, each.likes, next(iter(each.tasks or ()), ""), bool(each.gated))
            for each in models[:limit]
            if each.id
        ]

    def _unpacked(self, url: str, key: str, kind: type[Any], params: Mapping[str, str] | None = None) -> Any:
        """What the hub wraps. It answers some failures with 200, and says so in a code."""
        answer = self.http.json(url, params)
        if not isinstance(answer, dict):
            raise HubError(f"{url} {_NOT_THE_HUB}")
        said = {name.lower(): value for name, value in answer.items()}
        if said.get("success") is False or said.get("code", 200) not in (200, "200", "", None):
            code, message = said.get("code"), str(said.get("message") or said.get("code"))[:300]
            status = 404 if _ABSENT.search(message) else code if code in (401, 403, 404) else 200
            words = self._explain(Answer(status, "", message, url, self.http.sends_token))
            raise Refused(words or f"{url} answers: {message}", status)
        if key not in answer:
            raise HubError(f"{url} {_NOT_THE_HUB}")
        try:
            return msgspec.convert(answer[key] or {}, kind)
        except msgspec.ValidationError as error:
            raise HubError(f"{url} {_NOT_THE_HUB} ({error})") from error

    def _explain(self, answer: Answer) -> str | None:
        ref = self._ref
        if ref is None:
            return None
        if answer.status == 401 and answer.sent_token:
            return (
                f"{self.endpoint} does not take your token (MODELSCOPE_API_TOKEN or `modelscope login`): make one at "
                f"{modelscope_login.TOKENS_PAGE}"
            )
        if answer.status in (401, 403):
            page = f"{self.endpoint}/models/{ref.repo}"
            if answer.sent_token:
                return f"the account of your token may not read {ref.repo}: ask for access at {page}"
            return (
                f"{ref.repo} is private, or its terms are to be accepted at {page}: do so, and set "
                f"MODELSCOPE_API_TOKEN to a token from {modelscope_login.TOKENS_PAGE}"
            )
        if answer.status == 404:
            return self._missing(ref, answer)
        return None

    def _missing(self, ref: RepoRef, answer: Answer) -> str:
        if _OVERLOADED.search(answer.message):
            raise Unreachable(f"{self.endpoint} is overloaded: {answer.message}")
        if "FilePath=" in answer.url:
            return f"{ref.repo} has no file {_asked_file(answer.url)}: it changed meanwhile; try again"
        secret = "" if answer.sent_token else "; for a private one set MODELSCOPE_API_TOKEN"
        other = f", or it is on the other site: MODELSCOPE_ENDPOINT={_OTHER_SITE}" if self.endpoint == ENDPOINT else ""
        return f"{self.endpoint} has no public model {ref.repo}: check the name{secret}{other}"


def _asked_file(url: str) -> str:
    return dict(parse_qsl(urlsplit(url).query)).get("FilePath", "")


def _file(file: _File, repo: str) -> RemoteFile:
    sha256 = (file.Sha256 or "").lower()
    digest = Digest("sha256", sha256) if re.fullmatch(r"[0-9a-f]{64}", sha256) else None
    return RemoteFile(safe_path(file.Path, repo), file.Size, digest, file.CommittedDate)
