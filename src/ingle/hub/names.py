"""What the user calls a model, taken apart: a repository of a hub, a URL, or a short name. Paths are `resolve`'s."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from typing import Literal, get_args
from urllib.parse import unquote, urlsplit

from ingle.errors import ConfigError, ModelError
from ingle.hub.http import shown_url

Hub = Literal["huggingface", "modelscope"]

_PREFIXES: dict[str, Hub] = {
    "hf.co/": "huggingface",
    "huggingface.co/": "huggingface",
    "hf-mirror.com/": "huggingface",
    "hf://": "huggingface",
    "hf:": "huggingface",
    "huggingface:": "huggingface",
    "www.modelscope.cn/models/": "modelscope",
    "modelscope.cn/models/": "modelscope",
    "modelscope.cn/": "modelscope",
    "modelscope://": "modelscope",
    "modelscope:": "modelscope",
    "ms:": "modelscope",
}
"""What may stand before `org/name` to say on which hub it lies; longer ones first where one begins as another."""
_HUB_HOSTS: dict[str, Hub] = {
    "huggingface.co": "huggingface",
    "www.huggingface.co": "huggingface",
    "hf.co": "huggingface",
    "hf-mirror.com": "huggingface",
    "modelscope.cn": "modelscope",
    "www.modelscope.cn": "modelscope",
    "modelscope.ai": "modelscope",
    "www.modelscope.ai": "modelscope",
}
_MIRRORS = {
    "hf-mirror.com": "https://hf-mirror.com",
    "modelscope.ai": "https://www.modelscope.ai",
    "www.modelscope.ai": "https://www.modelscope.ai",
}
"""Hosts whose URLs mean that the files should come from there, whatever HF_ENDPOINT says."""

_PART = r"[A-Za-z0-9_](?:[\w.-]{0,94}[\w-])?"
_REPO = re.compile(rf"{_PART}/{_PART}", re.ASCII)
_ONE_PART = re.compile(_PART, re.ASCII)
_REVISION = re.compile(r"[\w](?:[\w./-]{0,198}[\w-])?", re.ASCII)
_CHOICE = re.compile(r"[A-Za-z0-9_][\w.-]{0,199}", re.ASCII)
_FILE = re.compile(r"[^\x00-\x1f\\]{1,400}")
_SHORT_PART = r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?"
SHORT_NAME = re.compile(rf"{_SHORT_PART}(?::{_SHORT_PART})?")
"""In lower case: smollm2:135m."""
_MAX_CHARS = 2048
FILE_SUFFIXES = (".gguf", ".safetensors", ".bin", ".zip", ".tar", ".gz", ".onnx", ".pth", ".json")
"""What paths to files of models end with, and names on a hub do not."""


@dataclass(frozen=True)
class RepoRef:
    """A model of a hub, `org/name@revision:choice`."""

    hub: Hub
    repo: str
    revision: str | None = None
    """A branch, tag or commit; None is the hub's main branch."""
    choice: str | None = None
    """Which GGUF file: its quantization, such as Q4_K_M, or its name."""
    endpoint: str | None = None
    """Of the hub or mirror, where a URL named it."""

    @property
    def name(self) -> str:
        """What it is called once it is here: without hub and revision."""
        return self.repo if self.choice is None else f"{self.repo}:{self.choice.rpartition('/')[2]}"

    def __str__(self) -> str:
        prefix = "modelscope:" if self.hub == "modelscope" else ""
        revision = "" if self.revision is None else f"@{self.revision}"
        choice = "" if self.choice is None else f":{self.choice}"
        return f"{prefix}{self.repo}{revision}{choice}"


@dataclass(frozen=True)
class UrlRef:
    """One .gguf file, or the first of a split model, wherever it lies."""

    url: str

    @property
    def file(self) -> str:
        return unquote(urlsplit(self.url).path).rpartition("/")[2]

    def __str__(self) -> str:
        return shown_url(self.url)


@dataclass(frozen=True)
class ShortName:
    name: str
    """As given; the catalog and the store know which."""

    def __str__(self) -> str:
        return self.name


Reference = RepoRef | UrlRef | ShortName


def default_hub(given: str | None = None) -> Hub:
    """The hub of a name that says none: `given` (by --hub), else $INGLE_HUB, else Hugging Face's.

    Raises `ConfigError`.
    """
    flag, name = ("--hub", given) if given else ("INGLE_HUB", os.environ.get("INGLE_HUB") or "huggingface")
    for hub in get_args(Hub):
        if name.lower() in (hub, {"huggingface": "hf", "modelscope": "ms"}[hub]):
            found: Hub = hub
            return found
    raise ConfigError(f"{flag} {name!r:.100} is not a hub: give huggingface or modelscope")


def parse_name(name: str, hub: str | None = None) -> Reference:
    """Takes a name that is no path apart. `hub` is that of `org/name` where the name does not say.

    Raises `ModelError` for what names nothing on a hub, and `ConfigError` for a hub that there is not.
    """
    if len(name) > _MAX_CHARS:
        raise ModelError(f"{quote(name)} is too long for the name of a model")
    if "://" in name and name.split("://", 1)[0].lower() in ("http", "https"):
        return _from_url(name)
    for prefix, its_hub in _PREFIXES.items():
        if name.lower().startswith(prefix):
            return _from_repo_path(name, name[len(prefix) :], its_hub)
    if "/" not in name:
        return ShortName(name)
    name = name.rstrip("/")
    return _from_repo_path(name, name, default_hub(hub))


def is_hub_name(name: str) -> bool:
    """Whether it is written as models of a hub are, and no path: those to files end as files do."""
    lowered = name.lower().rstrip("/")
    if any(lowered.startswith(prefix) for prefix in _PREFIXES):
        return True
    path = lowered.partition("@")[0].partition(":")[0]
    if path.endswith(".gguf") and path.count("/") > 1:  # a file of a repository
        path = "/".join(path.split("/")[:2])
    return _REPO.fullmatch(path) is not None and not path.endswith(FILE_SUFFIXES)


def _from_repo_path(name: str, path: str, hub: Hub) -> RepoRef:
    """`org/name`, then maybe `@revision`, `:choice` or `/file.gguf`."""
    explicit = path != name  # a name that says its hub may be of one part, as the oldest models' are
    path, choice = _cut(path, ":")
    path, revision = _cut(path, "@")
    if choice is not None and revision is None:
        choice, revision = _cut(choice, "@")
    parts = path.strip("/").split("/")
    if len(parts) > 2 and parts[-1].lower().endswith(".gguf") and choice is None:
        parts, choice = parts[:2], "/".join(parts[2:])
    repo = "/".join(parts)
    whole = _REPO.fullmatch(repo) or (explicit and len(parts) == 1 and _ONE_PART.fullmatch(repo))
    if not whole or ".." in repo or (hub == "huggingface" and "--" in repo):
        raise ModelError(
            f"{quote(name)} is no model: there is no such file or folder, and a name on a hub is org/name, such as "
            "Qwen/Qwen3-0.6B, with @revision or :quantization after it"
        )
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision or "//" in revision):
        raise ModelError(f"{quote(name)}: {quote(revision)} is not the name of a branch, a tag or a commit")
    pattern = _FILE if choice is not None and choice.lower().endswith(".gguf") else _CHOICE
    if choice is not None and not pattern.fullmatch(choice):
        raise ModelError(f"{quote(name)}: {quote(choice)} is neither a quantization, such as Q4_K_M, nor a .gguf file")
    return RepoRef(hub, repo, revision, choice)


def _cut(text: str, mark: str) -> tuple[str, str | None]:
    before, found, after = text.partition(mark)
    return before, after if found else None


def _from_url(url: str) -> Reference:
    try:
        parts = urlsplit(url)
        host, _ = (parts.hostname or "").lower(), parts.port
    except ValueError as error:
        raise ModelError(f"{quote(url)} is not a URL: {error}") from error
    if not host:
        raise ModelError(f"{quote(url)} is not a URL: it names no host")
    path = [unquote(part) for part in parts.path.split("/") if part]
    if host in _HUB_HOSTS:
        return _from_hub_page(url, path, host)
    if path and path[-1].lower().endswith(".gguf"):
        return UrlRef(url)
    resolved = _resolved(path, "huggingface")
    if resolved is not None:  # a file of another hub that speaks Hugging Face's protocol
        ref = _from_repo_path(url, resolved[0], "huggingface")
        return replace(ref, revision=resolved[1], endpoint=f"{parts.scheme}://{parts.netloc}")
    raise ModelError(f"{quote(url)}: a URL has to be that of a .gguf file, or of a model on Hugging Face or ModelScope")


def _from_hub_page(url: str, path: list[str], host: str) -> Reference:
    """The address of a model's page, of a folder or of a file in it."""
    hub = _HUB_HOSTS[host]
    if hub == "modelscope" and path[:1] == ["models"]:
        path = path[1:]
    elif path[:1] in (["datasets"], ["spaces"], ["collections"]):
        raise ModelError(f"{quote(url)} is not a model's page")
    repo, revision = "/".join(path[:2]), None
    file = None
    if (found := _resolved(path, hub)) is not None:
        repo, revision, file = found
    if revision in ("main", "master"):
        revision = None
    ref = _from_repo_path(url, repo, hub)
    if file is not None and file.lower().endswith(".gguf"):
        ref = replace(ref, choice=file)
    return replace(ref, revision=revision, endpoint=_MIRRORS.get(host))


def _resolved(path: list[str], hub: Hub) -> tuple[str, str | None, str | None] | None:
    """Repository, revision and file of `org/name/resolve/main/file`, as hubs write the address of a file."""
    words = ("resolve", "blob", "tree", "raw") if hub == "huggingface" else ("resolve", "file", "files", "summary")
    if len(path) < 3 or path[2] not in words:
        return None
    if hub == "modelscope" and path[2] in ("files", "summary"):
        return "/".join(path[:2]), None, None
    rest = path[3:]
    if hub == "modelscope" and rest[:1] == ["view"]:
        rest = rest[1:]
    return "/".join(path[:2]), (rest[0] if rest else None), ("/".join(rest[1:]) or None)


def quote(name: str) -> str:
    """`name` for an error message: control characters escaped, not longer than a line."""
    return repr(name if len(name) <= 100 else name[:97] + "...")
