"""A hub on this machine, as Hugging Face's is seen by its library: descriptions, trees, files with redirects, ranges
and digests; and what goes wrong with hubs."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".bin", ".gguf", ".model", ".onnx")


@dataclass
class Repo:
    files: dict[str, bytes]
    tags: list[str] = field(default_factory=list)
    card: dict[str, Any] = field(default_factory=lambda: {"license": "apache-2.0"})
    gated: str | bool = False
    token: str | None = None
    """Needed to read it."""
    commit: str = "a" * 40
    facts: dict[str, Any] = field(default_factory=dict)
    """Other fields of its description."""

    def entries(self) -> Iterator[dict[str, Any]]:
        for path, data in self.files.items():
            entry = {"path": path, "size": len(data), "oid": git_sha1(data), "type": "file"}
            if path.endswith(LFS_SUFFIXES):
                entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
            yield entry


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Fault:
    """What happens to requests whose path matches, as often as `times` says."""

    path: str
    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    times: int = 1 << 30
    cut_after: int | None = None
    """The connection breaks after so many bytes of the body."""
    instead: bytes | None = None
    """What is sent in place of the file, with status 200."""
    pause_s: float = 0.0
    """Between pieces of the body."""


@dataclass
class Hub:
    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    ranges: bool = True
    etags: bool = True
    asked: list[str] = field(default_factory=list)
    """Method and path of each request."""
    tokens: list[tuple[str, str | None]] = field(default_factory=list)
    """Path and Authorization of each request."""
    sent: int = 0
    """Bytes of files."""
    starts: list[int] = field(default_factory=list)
    """The first byte of each file that was asked for."""

    @property
    def cdn(self) -> str:
        """Another host, as that of large files is."""
        return f"{self.url.replace('127.0.0.1', 'localhost')}/cdn"

    def taken(self, path: str) -> Fault | None:
        for fault in self.faults:
            if fault.times > 0 and re.search(fault.path, path):
                fault.times -= 1
                return fault
        return None


@contextmanager
def serving(hub: Hub, protocol: type[HubHandler] | None = None) -> Iterator[Hub]:
    class Handler(protocol or HubHandler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class HubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, parts = self.state, urlsplit(self.path)
        path, query = unquote(parts.path), {key: value[0] for key, value in parse_qs(parts.query).items()}
        hub.asked.append(f"{self.command} {path}")
        hub.tokens.append((path, self.headers.get("Authorization")))
        fault = hub.taken(path)
        if fault is not None and fault.status:
            self._answer(fault.status, fault.body, **{key.replace("-", "_"): v for key, v in fault.headers.items()})
        elif path == "/api/models":
            self._search(query)
        elif match := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)(?:/(revision|tree)/(.+))?", path):
            self._describe(match[1], match[2], match[3], query)
        elif match := re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(match[1], match[2], match[3], fault)
        elif match := re.fullmatch(r"/cdn/([\w.-]+/[\w.-]+)/(.+)", path):
            self._file(hub.repos[match[1]].files[match[2]], fault)
        else:
            self._answer(404, b"Not Found")

    def _search(self, query: Mapping[str, str]) -> None:
        words, author = query.get("search", "").lower(), query.get("author")
        found = [
            {"id": name, "downloads": 100, "likes": 3, "pipeline_tag": "text-generation", "gated": repo.gated}
            for name, repo in self.state.repos.items()
            if words in name.lower() and author in (None, name.partition("/")[0])
        ]
        self._json(found[: int(query.get("limit", "100"))])

    def _find(self, name: str, revision: str | None) -> Repo | None:
        """Answers itself where there is none to read."""
        hub = self.state
        if name in hub.renamed:
            target = self.path.replace(name, hub.renamed[name], 1)
            self._answer(307, b"Moved", Location=f"{hub.url}{target}")
            return None
        repo = hub.repos.get(name)
        allowed = repo is not None and (repo.token is None or f"Bearer {repo.token}" == self.headers["Authorization"])
        if repo is None or (not allowed and not repo.gated):
            status = 404 if self.headers["Authorization"] else 401
            self._answer(status, b"{}", X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
            return None
        if revision not in (None, "main", repo.commit, "v1"):
            self._answer(404, b"{}", X_Error_Code="RevisionNotFound", X_Error_Message=f"Invalid rev id: {revision}")
            return None
        return repo

    def _describe(self, name: str, what: str | None, revision: str | None, query: Mapping[str, str]) -> None:
        repo = self._find(name, revision)
        if repo is None:
            return
        if what == "tree":
            self._json(list(repo.entries()))
            return
        siblings = []
        for entry in repo.entries():
            sibling: dict[str, Any] = {"rfilename": entry["path"]}
            if query.get("blobs"):
                sibling |= {"size": entry["size"], "blobId": entry["oid"]}
                if "lfs" in entry:
                    sibling["lfs"] = {"sha256": entry["lfs"]["oid"], "size": entry["size"], "pointerSize": 134}
            siblings.append(sibling)
        facts = {"id": name, "sha": repo.commit, "tags": repo.tags, "gated": repo.gated, "cardData": repo.card}
        self._json({**facts, "siblings": siblings, "downloads": 100, "likes": 3, **repo.facts})

    def _resolve(self, name: str, revision: str, path: str, fault: Fault | None) -> None:
        repo = self._find(name, revision)
        if repo is None:
            return
        if repo.token is not None and self.headers["Authorization"] != f"Bearer {repo.token}":
            said = "Access to model is restricted"
            status = 403 if self.headers["Authorization"] else 401
            self._answer(status, said.encode(), X_Error_Code="GatedRepo", X_Error_Message=said)
        elif path not in repo.files:
            self._answer(404, b"Entry not found", X_Error_Code="EntryNotFound", X_Error_Message="Entry not found")
        elif path.endswith(LFS_SUFFIXES):
            data = repo.files[path]
            digest = hashlib.sha256(data).hexdigest()
            self._answer(302, b"", Location=f"{self.state.cdn}/{name}/{path}?sig=secret", X_Repo_Commit=repo.commit,
                         X_Linked_Size=str(len(data)), X_Linked_Etag=f'"{digest}"')  # fmt: skip
        else:
            self._file(repo.files[path], fault, X_Repo_Commit=repo.commit)

    def _file(self, data: bytes, fault: Fault | None, **headers: str) -> None:
        if fault is not None and fault.instead is not None:
            data = fault.instead
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        start, end, total = 0, len(data), len(data)
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        fresh = self.headers.get("If-Range", etag) == etag
        if match and self.state.ranges and fresh:
            start, end = int(match[1]), min(int(match[2] or total - 1) + 1, total)
            if start >= total:
                self._answer(416, b"", Content_Range=f"bytes */{total}")
                return
        self.state.starts.append(start)
        self.send_response(206 if (start, end) != (0, total) or (match and self.state.ranges and fresh) else 200)
        if match and self.state.ranges and fresh:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{total}")
        if self.state.etags:
            self.send_header("ETag", etag)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        if self.command != "HEAD":
            self._send(data[start:end], fault)

    def _send(self, data: bytes, fault: Fault | None) -> None:
        if fault is not None and fault.cut_after is not None:
            data = data[: fault.cut_after]
            self.close_connection = True
        step = max(len(data) // 16, 1) if fault is not None and fault.pause_s else len(data) or 1
        for at in range(0, len(data), step):
            part = data[at : at + step]
            self.state.sent += len(part)  # first: whoever has it may ask for the count at once
            try:
                self.wfile.write(part)
                self.wfile.flush()
            except OSError:
                self.state.sent -= len(part)
                raise
            if fault is not None and fault.pause_s:
                time.sleep(fault.pause_s)

    def _json(self, value: object) -> None:
        self._answer(200, json.dumps(value).encode(), Content_Type="application/json")

    def _answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # a client that has gone
            super().handle()
