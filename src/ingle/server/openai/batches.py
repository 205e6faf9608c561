"""`/v1/batches`: many requests in a file, answered when there is time."""

from __future__ import annotations

import asyncio
import re
import uuid
from pathlib import Path
from typing import ClassVar, Literal

import msgspec
from pydantic import field_validator
from starlette.requests import Request
from starlette.responses import Response

from ingle.errors import RequestError
from ingle.server.batch.lines import BadLine, answers_of, line_of, read_lines
from ingle.server.batch.owned import OwnedStore
from ingle.server.batch.records import Batch, StoredBatch
from ingle.server.batch.store import KEEP_S, new_file_id
from ingle.server.body import Neutral, StrictModel, UnknownFields, parse_body, read_body, show
from ingle.server.endpoints import Endpoint
from ingle.server.openai.files import check_keep_s, first, json_of, page_of, store_of
from ingle.server.openai.protocol import Integer
from ingle.server.queue import BodyMemory

_MAX_PAIRS, _MAX_KEY_CHARS, _MAX_VALUE_CHARS = 16, 64, 512
_MAX_HOURS = 168
_WINDOW = re.compile(r"([1-9]\d{0,2})(h|d)")


class ExpiresAfter(StrictModel):
    anchor: Literal["created_at"]
    seconds: Integer


class BatchRequest(StrictModel):
    """Body of `POST /v1/batches`."""

    UNSUPPORTED: ClassVar[Neutral] = {}

    input_file_id: str
    endpoint: str
    completion_window: str
    """24h, or another number of hours or days up to a week: what is not answered then is not answered."""
    metadata: dict[str, str] | None = None
    output_expires_after: ExpiresAfter | None = None

    @field_validator("completion_window")
    @classmethod
    def _check_window(cls, value: str) -> str:
        if not 1 <= hours_of(value) <= _MAX_HOURS:
            raise ValueError(f"must be 24h, or another number of hours up to {_MAX_HOURS}h, got {show(value)}")
        return value

    @field_validator("metadata")
    @classmethod
    def _check_metadata(cls, value: dict[str, str] | None) -> dict[str, str] | None:
        pairs = (value or {}).items()
        if len(pairs) > _MAX_PAIRS or any(len(k) > _MAX_KEY_CHARS or len(v) > _MAX_VALUE_CHARS for k, v in pairs):
            raise ValueError(f"takes up to {_MAX_PAIRS} pairs, of {_MAX_KEY_CHARS} and {_MAX_VALUE_CHARS} characters")
        return value


def hours_of(window: str) -> int:
    """0 for what is none."""
    found = _WINDOW.fullmatch(window)
    return 0 if found is None else int(found[1]) * (24 if found[2] == "d" else 1)


class BatchList(msgspec.Struct, kw_only=True):
    object: Literal["list"] = "list"
    data: list[Batch]
    first_id: str | None
    last_id: str | None
    has_more: bool


async def create_batch(request: Request) -> Response:
    """Takes a file of requests; its lines are looked at later."""
    store, unread = store_of(request), request.app.state.unread
    assert isinstance(unread, BodyMemory)
    with unread.account() as account:
        asked = parse_body(BatchRequest, await read_body(request, account), UnknownFields.of(request))
    if asked.endpoint not in (known := answers_of(request.app)):
        raise RequestError(f"endpoint must be one of {', '.join(known)}, got {show(asked.endpoint)}", param="endpoint")
    stored = await asyncio.to_thread(_add, store, asked)
    if request.app.state.batches is not None:
        request.app.state.batches.changed.set()
    return json_of(stored.batch)


def _add(store: OwnedStore, asked: BatchRequest) -> StoredBatch:
    file = store.file(asked.input_file_id)
    if file.purpose != "batch":
        raise RequestError(f"The file {file.id} was uploaded for {file.purpose}, not for batch.", param="input_file_id")
    keep_s = KEEP_S
    if asked.output_expires_after is not None:
        keep_s = check_keep_s(asked.output_expires_after.seconds, "output_expires_after.seconds")
    now = int(store.now())
    batch = Batch(
        id=f"batch_{uuid.uuid4().hex}",
        endpoint=asked.endpoint,
        model=_first_model(store.content(file.id), asked.endpoint),
        input_file_id=file.id,
        completion_window=asked.completion_window,
        created_at=now,
        expires_at=now + hours_of(asked.completion_window) * 3600,
        metadata=asked.metadata,
    )
    stored = StoredBatch(batch=batch, output_id=new_file_id(), error_id=new_file_id(), keep_s=keep_s, owner=store.owner)
    store.add_batch(stored)
    return stored


def _first_model(path: Path, endpoint: str) -> str | None:
    """What the first line asks for, if it can be read: the server of that model runs the batch."""
    with path.open("rb") as file:
        for _, data in read_lines(file):
            try:
                return line_of(data, (endpoint,))[1]
            except BadLine:
                return None
    return None


async def list_batches(request: Request) -> Response:
    """The newest first."""
    store = store_of(request)
    found = await asyncio.to_thread(lambda: store.batches()[::-1])
    page, has_more = page_of(request, found, 20, 100, lambda batch: batch.id)
    ids = [batch.id for batch in page]
    return json_of(BatchList(data=page, first_id=first(ids), last_id=first(ids[::-1]), has_more=has_more))


async def retrieve_batch(request: Request) -> Response:
    """How far a batch is."""
    store = store_of(request)
    return json_of(await asyncio.to_thread(store.batch, request.path_params["batch_id"]))


async def cancel_batch(request: Request) -> Response:
    """Lines that run are finished, and no more begun."""
    store = store_of(request)
    return json_of(await asyncio.to_thread(store.ask_to_cancel, request.path_params["batch_id"]))


_ONE = "/v1/batches/{batch_id}"
_QUERY = {"limit": {"type": "integer", "minimum": 1, "maximum": 100}, "after": {"type": "string"}}
ENDPOINTS = (
    Endpoint("POST", "/v1/batches", create_batch, BatchRequest, Batch, statuses=(507,)),
    Endpoint("GET", "/v1/batches", list_batches, answers=BatchList, statuses=(400, 404), query=_QUERY),
    Endpoint("GET", _ONE, retrieve_batch, answers=Batch, statuses=(404,)),
    Endpoint("POST", f"{_ONE}/cancel", cancel_batch, answers=Batch, statuses=(400, 404)),
)
