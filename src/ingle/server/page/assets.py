"""The files of the pages that the server shows: found by their names in a table, read when somebody asks for one.

They come with ingle and hold nothing of the server that shows them, so no key is asked for.
"""

from __future__ import annotations

import asyncio
import gzip
import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

STATIC = Path(__file__).with_name("static")

_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".mjs": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".woff2": "font/woff2",
}
"""Of what is shown. Other files, such as licences, are text."""
_PACKED = (".woff2",)
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; font-src 'self'; connect-src 'self'; "
    "img-src 'self' data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Nothing comes from elsewhere, nothing goes there, and no script runs that is not a file of ours."""
_TYPED = "; require-trusted-types-for 'script'; trusted-types dompurify 'allow-duplicates'"
"""Nor does any text become markup but through the sanitizer."""
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_FOREVER = "public, max-age=31536000, immutable"


@dataclass(frozen=True)
class Asset:
    body: bytes
    packed: bytes | None
    """By gzip, where that makes it smaller."""
    digest: str
    media_type: str


class Assets:
    """All files of a folder. What is not in it when first asked for, nobody gets."""

    def __init__(self, root: Path = STATIC) -> None:
        self._root = root
        self._read: dict[str, Asset] = {}

    @cached_property
    def _paths(self) -> dict[str, Path]:
        found = sorted(path for path in self._root.rglob("*") if path.is_file())
        return {path.relative_to(self._root).as_posix(): path for path in found}

    @cached_property
    def version(self) -> str:
        """A digest of all of them, which stands in their addresses: what a browser keeps of another version, it asks
        for by another name."""
        digest = hashlib.sha256()
        for name, path in self._paths.items():
            digest.update(name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()[:16]

    def find(self, name: str) -> Asset | None:
        if (asset := self._read.get(name)) is None and (path := self._paths.get(name)) is not None:
            asset = self._read[name] = _asset(path)
        return asset

    def document(self, name: str, root_path: str) -> bytes:
        """An HTML file whose addresses begin with `root_path`, or are relative where nobody has said what that is."""
        root = f"{root_path}/" if root_path else ""
        text = self._paths[name].read_text(encoding="utf-8")
        return text.replace("{{root}}", root).replace("{{assets}}", f"{root}page/{self.version}").encode()


def _asset(path: Path) -> Asset:
    body = path.read_bytes()
    packed = None if path.suffix in _PACKED else gzip.compress(body, 6, mtime=0)
    if packed is not None and len(packed) >= len(body):
        packed = None
    media_type = _TYPES.get(path.suffix, "text/plain; charset=utf-8")
    return Asset(body, packed, hashlib.sha256(body).hexdigest()[:32], media_type)


class Pages:
    """What browsers are shown: the page at `/`, the viewer of the schema, and the files of both."""

    def __init__(self, root_path: str) -> None:
        self._root_path = root_path
        self._assets = Assets()

    def routes(self) -> list[Route]:
        files = Route("/page/{version}/{name:path}", self.file, methods=["GET"])
        return [files, *(Route(path, self.schema, methods=["GET"]) for path in ("/docs", "/redoc"))]

    async def chat(self, request: Request) -> Response:
        """The page at `/`."""
        return await self._document(request, "index.html", _POLICY + _TYPED)

    async def schema(self, request: Request) -> Response:
        return await self._document(request, "docs.html", _POLICY)

    async def file(self, request: Request) -> Response:
        asset = await asyncio.to_thread(self._assets.find, request.path_params["name"])
        if asset is None:
            return Response("There is no such file.", 404, _HEADERS, media_type="text/plain")
        headers = {**_HEADERS, "ETag": f'W/"{asset.digest}"', "Vary": "Accept-Encoding", "Cache-Control": "no-cache"}
        if request.path_params["version"] == await asyncio.to_thread(lambda: self._assets.version):
            headers["Cache-Control"] = _FOREVER
        if asset.media_type == "image/svg+xml":
            headers["Content-Security-Policy"] = "default-src 'none'; style-src 'unsafe-inline'"
        if asset.digest in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        body = asset.body
        if asset.packed is not None and "gzip" in request.headers.get("accept-encoding", ""):
            body, headers["Content-Encoding"] = asset.packed, "gzip"
        return Response(body, headers=headers, media_type=asset.media_type)

    async def _document(self, request: Request, name: str, policy: str) -> Response:
        body = await asyncio.to_thread(self._assets.document, name, self._root_path)
        tag = f'W/"{hashlib.sha256(body).hexdigest()[:32]}"'
        headers = {**_HEADERS, "Content-Security-Policy": policy, "ETag": tag, "Cache-Control": "no-cache"}
        headers["Vary"] = "Accept"
        if tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(body, headers=headers, media_type="text/html")
