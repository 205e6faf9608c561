"""Hugging Face's hub, and mirrors that speak its protocol.

huggingface_hub says where it is, which token is the user's and how its cache is laid out, so that what other tools have
downloaded is used and nothing lies twice. The bytes come by ingle's own downloader: that library throws away what an
interrupted download brought, and does not check digests.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote as quote_url
from urllib.parse import urlsplit

import msgspec

from ingle.errors import ConfigError
from ingle.hub.download import PART
from ingle.hub.http import Answer, Http, HubError, Unreachable
from ingle.hub.listing import MAX_FILES, Digest, Found, License, Listing, RemoteFile, safe_path
from ingle.hub.names import Hub, RepoRef

_TOKENS_PAGE = "https://huggingface.co/settings/tokens"


class _Lfs(msgspec.Struct):
    sha256: str | None = None
    oid: str | None = None
    """In a tree what `sha256` is in a model's description."""
    size: int | None = None


class _Sibling(msgspec.Struct):
    rfilename: str
    size: int | None = None
    blobId: str | None = None
    lfs: _Lfs | None = None


class _Entry(msgspec.Struct):
    path: str
    type: str = "file"
    oid: str | None = None
    size: int | None = None
    lfs: _Lfs | None = None


class _Model(msgspec.Struct):
    id: str
    sha: str | None = None
    siblings: list[_Sibling] = []
    gated: bool | str | None = False
    tags: list[str] = []
    cardData: dict[str, Any] | None = None
    gguf: dict[str, Any] | None = None
    library_name: str | None = None
    pipeline_tag: str | None = None
    downloads: int | None = None
    likes: int | None = None


class HuggingFace:
    hub: Hub = "huggingface"

    def __init__(self, endpoint: str | None = None, on_wait: Callable[[str], None] = lambda text: None) -> None:
        """Raises `HubError` when the user wants no network, `ConfigError` for a token that cannot be one."""
        from huggingface_hub import constants

        self.endpoint = (endpoint or constants.ENDPOINT).rstrip("/")
        self.cache = cache_folder()
        self.cache_setting = "HF_HUB_CACHE" if os.environ.get("HF_HUB_CACHE") else "HF_HOME"
        self._ref: RepoRef | None = None
        if constants.is_offline_mode():
            raise Unreachable(f"{self.endpoint} is not asked because HF_HUB_OFFLINE is set")
        own_hosts = frozenset({"huggingface.co", "hf.co", urlsplit(constants.ENDPOINT).hostname or ""})
        host = urlsplit(self.endpoint).hostname
        token = _token() if host in own_hosts else None
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self.http = Http(
            headers=headers, trusted=own_hosts, explain=self._explain, on_wait=on_wait, setting="HF_ENDPOINT"
        )

    def listing(self, ref: RepoRef) -> Listing:
        self._ref = ref
        revision = "" if ref.revision is None else f"/revision/{quote_url(ref.revision, safe='')}"
        url = f"{self.endpoint}/api/models/{ref.repo}{revision}"
        model = _convert(self.http.json(url, {"blobs": "true"}), _Model, url)
        if not model.sha or not model.sha.isalnum():
            raise HubError(f"{url} says no commit of {ref.repo}: is it the address of a hub?")
        entries = [_Entry(s.rfilename, "file", s.blobId, s.size, s.lfs) for s in model.siblings]
        if any(entry.size is None for entry in entries):  # of a mirror without `blobs`
            tree = f"{self.endpoint}/api/models/{ref.repo}/tree/{model.sha}"
            entries = _convert(self.http.json(tree, {"recursive": "true"}), list[_Entry], tree)
        if len(entries) > MAX_FILES:
            raise HubError(f"{ref.repo} has {len(entries)} files, more than the {MAX_FILES} that are taken")
        base = (model.cardData or {}).get("base_model")
        return Listing(
            ref=ref,
            repo=model.id,
            commit=model.sha,
            files=tuple(_file(entry, ref.repo) for entry in entries if entry.type == "file"),
            license=_license(model),
            page=f"{'https://huggingface.co' if self._is_mirror() else self.endpoint}/{model.id}",
            gated=bool(model.gated),
            tags=frozenset([*model.tags, *filter(None, (model.library_name, model.pipeline_tag))]),
            base_model=base[0] if isinstance(base, list) and base else base if isinstance(base, str) else None,
            gguf=model.gguf or {},
        )

    def url(self, listing: Listing, file: RemoteFile) -> str:
        return f"{self.endpoint}/{listing.repo}/resolve/{listing.commit}/{quote_url(file.path)}"

    def folder(self, listing: Listing) -> Path:
        return self._storage(listing) / "snapshots" / listing.commit

    def blob(self, listing: Listing, file: RemoteFile) -> Path:
        if file.digest is None:  # nothing that its content could be called by
            return self.folder(listing) / file.path
        return self._storage(listing) / "blobs" / file.digest.value

    def has(self, listing: Listing, file: RemoteFile) -> bool:
        """Where a file system has no links, the bytes lie in the folder itself."""
        copy = self.folder(listing) / file.path
        return _is_whole(self.blob(listing, file), file) or (not copy.is_symlink() and _is_whole(copy, file))

    def lock(self, listing: Listing) -> Path:
        return lock_file(self.cache, self._storage(listing).name)

    def finish(self, listing: Listing, files: Sequence[RemoteFile]) -> None:
        places = [(self.blob(listing, file), self.folder(listing) / file.path) for file in files]
        moved = [(blob, link) for blob, link in places if blob.is_file() and not _links(link, blob)]
        while moved:
            blob, link = moved.pop()
            if any(blob == other for other, _ in moved):
                _copy(blob, link)
            else:
                link.unlink(missing_ok=True)
                blob.replace(link)

    def complete(self, listing: Listing) -> None:
        revision = listing.ref.revision or "main"
        if revision != listing.commit:
            ref = self._storage(listing) / "refs" / revision
            if not ref.is_file() or ref.read_text() != listing.commit:
                ref.parent.mkdir(parents=True, exist_ok=True)
                fresh = ref.with_name(f"{ref.name}.{os.getpid()}.tmp")
                fresh.write_text(listing.commit)
                fresh.replace(ref)

    def search(self, words: str, limit: int) -> list[Found]:
        return self._found({"search": words, "limit": str(limit)})

    def by(self, author: str) -> list[Found]:
        return self._found({"author": author, "limit": "300"})

    def _found(self, asked: dict[str, str]) -> list[Found]:
        url = f"{self.endpoint}/api/models"
        params = {**asked, "sort": "downloads", "direction": "-1"}
        models = _convert(self.http.json(url, params), list[_Model], url)
        return [Found(m.id, m.downloads, m.likes, m.pipeline_tag or "", bool(m.gated)) for m in models]

    def _storage(self, listing: Listing) -> Path:
        """By the name that was asked for, as huggingface_hub has it; by the one it has now where that lies there."""
        renamed = self.cache / storage_name(listing.repo)
        return renamed if renamed.is_dir() else self.cache / storage_name(listing.ref.repo)

    def _is_mirror(self) -> bool:
        return urlsplit(self.endpoint).hostname == "hf-mirror.com"

    def _explain(self, answer: Answer) -> str | None:
        ref = self._ref
        if ref is None:
            return None
        page = f"https://huggingface.co/{ref.repo}"
        if answer.code == "GatedRepo" or (answer.status in (401, 403) and "gated" in answer.message.lower()):
            if answer.sent_token:
                return (
                    f"{ref.repo} is gated, and the account of your token has not been granted access: accept its terms "
                    f"at {page}, and wait until that is confirmed"
                )
            return f"{ref.repo} is gated: accept its terms at {page}, then set HF_TOKEN to a token from {_TOKENS_PAGE}"
        if "disabled" in answer.message.lower():
            return f"{ref.repo} has been disabled by {self.endpoint}: {answer.message}"
        if answer.status == 401 and ("credentials" in answer.message.lower() or "token" in answer.message.lower()):
            return f"{self.endpoint} does not take your token (HF_TOKEN or `hf auth login`): make one at {_TOKENS_PAGE}"
        if answer.code == "RevisionNotFound":
            return f"{ref.repo} has no revision {ref.revision}: its branches and commits are at {page}/commits"
        if answer.code == "EntryNotFound":
            return f"{ref.repo} has no file {answer.url.rpartition('/')[2]}: it changed meanwhile; try again"
        if answer.status in (401, 404):
            secret = "" if answer.sent_token else "; for a private one set HF_TOKEN"
            return f"{self.endpoint} has no public model {ref.repo}: check the name{secret}"
        if answer.status == 403:
            return f"your token does not allow to read {ref.repo} (403 {answer.message}): see {_TOKENS_PAGE}"
        return None


def cache_folder() -> Path:
    """Hugging Face's own, by HF_HOME, HF_HUB_CACHE and what else it reads."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser().absolute()


def storage_name(repo: str) -> str:
    return "--".join(["models", *repo.split("/")])


def lock_file(cache: Path, storage: str) -> Path:
    """ingle's own, of those who change a repository."""
    return cache / ".locks" / storage / "ingle.lock"


def _is_whole(path: Path, file: RemoteFile) -> bool:
    return path.is_file() and file.size in (None, path.stat().st_size)


def _links(link: Path, blob: Path) -> bool:
    """Makes a file of a snapshot lead to its bytes. False on a file system without links."""
    if blob == link or (link.is_symlink() and link.exists()):
        return True
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    try:
        link.symlink_to(os.path.relpath(blob, link.parent))
    except OSError:
        return False
    return True


def _copy(blob: Path, place: Path) -> None:
    part = place.with_name(place.name + PART)
    shutil.copyfile(blob, part)
    part.replace(place)


def _token() -> str | None:
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN:
        return None
    token = get_token()
    if token is not None and not (token.isascii() and token.isprintable() and " " not in token):
        raise ConfigError(f"HF_TOKEN holds what no token is made of (`hf_` and letters): copy it from {_TOKENS_PAGE}")
    return token


def _file(entry: _Entry, repo: str) -> RemoteFile:
    path = safe_path(entry.path, repo)
    lfs = entry.lfs
    sha256 = "" if lfs is None else (lfs.sha256 or lfs.oid or "").removeprefix("sha256:").lower()
    size = entry.size if lfs is None or lfs.size is None else lfs.size
    if len(sha256) == 64 and sha256.isalnum():
        return RemoteFile(path, size, Digest("sha256", sha256))
    oid = (entry.oid or "").lower()
    return RemoteFile(path, size, Digest("git", oid) if lfs is None and len(oid) == 40 and oid.isalnum() else None)


def _license(model: _Model) -> License:
    card = model.cardData or {}
    tagged = next((tag.removeprefix("license:") for tag in model.tags if tag.startswith("license:")), "")
    name = card.get("license_name") or card.get("license") or tagged
    url: object = None
    with contextlib.suppress(AttributeError):
        url = card.get("license_link")
    if isinstance(name, list):
        name = ", ".join(map(str, name))
    named = isinstance(url, str) and url.startswith(("https://", "http://"))
    return License(str(name)[:100], str(url)[:300] if named else None)


def _convert(value: Any, kind: type[Any], url: str) -> Any:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise HubError(f"{url} answers otherwise than a hub does ({error}): is HF_ENDPOINT right?") from error
