"""`/v1/files`: what batches read and write."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import FileResponse, Response

from ingle.errors import RequestError
from ingle.server.access import client_of
from ingle.server.batch.owned import OwnedStore
from ingle.server.batch.records import File
from ingle.server.batch.store import KEEP_S, Store
from ingle.server.body import show
from ingle.server.endpoints import Endpoint
from ingle.server.upload import Upload

PURPOSES = ("batch", "user_data", "evals", "assistants", "fine-tune", "vision")
MIN_KEEP_S, MAX_KEEP_S = 3600, KEEP_S
_AROUND_BYTES = 64 << 10
"""What a form takes around its file."""
T = TypeVar("T")


class FileList(msgspec.Struct, kw_only=True):
    object: Literal["list"] = "list"
    data: list[File]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedFile(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["file"] = "file"
    deleted: bool = True


async def create_file(request: Request) -> Response:
    """Keeps an uploaded file."""
    store = store_of(request)
    upload = Upload(request)
    with await asyncio.to_thread(store.incoming) as incoming:
        await upload.read(incoming.write, store.limits.max_file_bytes + _AROUND_BYTES)
        if upload.filename is None:
            raise RequestError("file is required", param="file")
        purpose = upload.fields.get("purpose")
        if purpose not in PURPOSES:
            got = "nothing" if purpose is None else show(purpose)
            raise RequestError(f"purpose must be one of {', '.join(PURPOSES)}, got {got}", param="purpose")
        keep_s = _keep_s(upload.fields)
        file = await asyncio.to_thread(incoming.keep, upload.filename, purpose, keep_s)
    return json_of(file)


def _keep_s(fields: dict[str, str]) -> int:
    anchor, seconds = fields.get("expires_after[anchor]"), fields.get("expires_after[seconds]")
    if anchor is None and seconds is None:
        return KEEP_S
    if anchor != "created_at":
        raise RequestError("expires_after.anchor must be created_at", param="expires_after.anchor")
    if seconds is None or not seconds.isdecimal() or len(seconds) > 9:
        raise RequestError("expires_after.seconds must be a whole number", param="expires_after.seconds")
    return check_keep_s(int(seconds), "expires_after.seconds")


def check_keep_s(seconds: int, param: str) -> int:
    """Raises `RequestError`."""
    if not MIN_KEEP_S <= seconds <= MAX_KEEP_S:
        raise RequestError(f"{param} must be from {MIN_KEEP_S} to {MAX_KEEP_S}, got {seconds}", param=param)
    return seconds


async def list_files(request: Request) -> Response:
    """The newest first, or in the `order` that is asked for."""
    store = store_of(request)
    purpose, order = request.query_params.get("purpose"), request.query_params.get("order", "desc")
    if order not in ("asc", "desc"):
        raise RequestError(f"order must be asc or desc, got {show(order)}", param="order")
    found = await asyncio.to_thread(store.files)
    files = [file for file in found if purpose is None or file.purpose == purpose]
    page, has_more = page_of(request, files if order == "asc" else files[::-1], 10_000, 10_000, lambda file: file.id)
    ids = [file.id for file in page]
    return json_of(FileList(data=page, first_id=first(ids), last_id=first(ids[::-1]), has_more=has_more))


async def retrieve_file(request: Request) -> Response:
    """What is said of a file."""
    store = store_of(request)
    return json_of(await asyncio.to_thread(store.file, request.path_params["file_id"]))


async def retrieve_content(request: Request) -> Response:
    """The file as it is."""
    store = store_of(request)
    path = await asyncio.to_thread(store.content, request.path_params["file_id"])
    return FileResponse(path, media_type="application/octet-stream")


async def delete_file(request: Request) -> Response:
    """Deletes a file; a batch that was made of it goes on."""
    store, file_id = store_of(request), request.path_params["file_id"]
    await asyncio.to_thread(store.delete, file_id)
    return json_of(DeletedFile(id=file_id))


_ONE = "/v1/files/{file_id}"
_FORM = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {
        "file": {"type": "string", "contentMediaType": "application/octet-stream"},
        "purpose": {"enum": list(PURPOSES)},
        "expires_after[anchor]": {"const": "created_at"},
        "expires_after[seconds]": {"type": "integer", "minimum": MIN_KEEP_S, "maximum": MAX_KEEP_S},
    },
}
_QUERY = {
    "purpose": {"type": "string"},
    "order": {"enum": ["asc", "desc"]},
    "limit": {"type": "integer", "minimum": 1, "maximum": 10_000},
    "after": {"type": "string"},
}
ENDPOINTS = (
    Endpoint("POST", "/v1/files", create_file, answers=File, statuses=(400, 404, 413, 415, 507), form=_FORM),
    Endpoint("GET", "/v1/files", list_files, answers=FileList, statuses=(400, 404), query=_QUERY),
    Endpoint("GET", _ONE, retrieve_file, answers=File, statuses=(404,)),
    Endpoint("DELETE", _ONE, delete_file, answers=DeletedFile, statuses=(404,)),
    Endpoint("GET", f"{_ONE}/content", retrieve_content, statuses=(404, 416), media_type="application/octet-stream"),
)


def store_of(request: Request) -> OwnedStore:
    """What the client has there. Raises `RequestError` (404) where the server keeps no files."""
    store: Store | None = request.app.state.store
    if store is None:
        raise RequestError("This server keeps no files, and so no batches.", code="files_off", status=404)
    return OwnedStore(store, client_of(request.scope).owner)


def page_of(
    request: Request, found: Sequence[T], default: int, most: int, id_of: Callable[[T], str]
) -> tuple[list[T], bool]:
    """What `limit` and `after` ask for, and whether there is more. Raises `RequestError`."""
    limit, after = request.query_params.get("limit", str(default)), request.query_params.get("after")
    if not limit.isdecimal() or len(limit) > 6 or not 1 <= int(limit) <= most:
        raise RequestError(f"limit must be from 1 to {most}, got {show(limit)}", param="limit")
    start = 0
    if after is not None:
        place = next((index for index, each in enumerate(found) if id_of(each) == after), None)
        if place is None:
            raise RequestError(f"after {show(after)} is not there", param="after")
        start = place + 1
    page = list(found[start : start + int(limit)])
    return page, len(found) > start + len(page)


def first(ids: Sequence[str]) -> str | None:
    return ids[0] if ids else None


def json_of(body: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(body), media_type="application/json")
