"""The lines of a batch: what each asks, and how it is answered, which is as over HTTP."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Message

from ingle.errors import AnswerLost, EngineError, IngleError, RequestError
from ingle.server.access import Client
from ingle.server.batch.records import BatchError, LineResponse, OutputLine
from ingle.server.engine_client import in_background
from ingle.server.errors import current_request_id, describe

ENDPOINTS = (
    "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/messages", "/v1/rerank",
    "/v1/score", "/rerank", "/score",
)  # fmt: skip
"""What a line may ask for, as far as the server has it."""
MAX_LINE_BYTES = 32 << 20
MAX_ID_CHARS = 512
_BUSY = (429, 503)
"""There was no room, or no time."""
BUSY_S = 0.5
_MOST_LOST = 2
"""Engines that may die with a line before it is given up."""

Answer = Callable[[Request], Awaitable[Response]]


class Line(msgspec.Struct):
    """What one line asks."""

    custom_id: str
    url: str
    body: msgspec.Raw
    method: str = "POST"


class _Body(msgspec.Struct):
    """What is looked at before an endpoint reads the rest."""

    model: str | None = None
    stream: bool | None = None


class BadLine(ValueError):
    """Why a line cannot be answered."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.param = code, param

    def error(self, number: int) -> BatchError:
        return BatchError(code=self.code, message=str(self), line=number, param=self.param)


def read_lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Those that are not empty, with their numbers from 1. One that is too long comes cut."""
    number = 0
    while data := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        while len(data) > MAX_LINE_BYTES and not data.endswith(b"\n") and (rest := file.readline(MAX_LINE_BYTES)):
            if rest.endswith(b"\n"):
                break
        if number == 1:
            data = data.removeprefix(b"\xef\xbb\xbf")
        if data.strip():
            yield number, data


def line_of(data: bytes, allowed: Mapping[str, Any] | tuple[str, ...]) -> tuple[Line, str | None]:
    """The line, and the model that it asks for. Raises `BadLine`."""
    if len(data) > MAX_LINE_BYTES:
        raise BadLine("line_too_large", f"the line is larger than {MAX_LINE_BYTES} bytes")
    try:
        line = msgspec.json.decode(data, type=Line)
        body = msgspec.json.decode(line.body, type=_Body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BadLine("invalid_json_line", f"the line is no request: {error}") from None
    if not line.custom_id or len(line.custom_id) > MAX_ID_CHARS:
        raise BadLine("invalid_custom_id", f"custom_id must have 1 to {MAX_ID_CHARS} characters", "custom_id")
    if line.method != "POST":
        raise BadLine("invalid_method", f"method must be POST, got {line.method!r:.20}", "method")
    if line.url not in allowed:
        raise BadLine("invalid_url", f"url {line.url!r:.60} is none of {', '.join(allowed)}", "url")
    if body.stream:
        raise BadLine("stream_not_allowed", "stream must be false: a batch has no streams", "body.stream")
    return line, body.model


def answers_of(app: Starlette) -> dict[str, Answer]:
    """What answers each of the endpoints that a batch may ask."""
    return {route.path: route.endpoint for route in app.routes if isinstance(route, Route) and route.path in ENDPOINTS}


async def answer(app: Starlette, answers: Mapping[str, Answer], line: Line, owner: str = "") -> OutputLine:
    """What the endpoint tells the batch's owner, errors included. Raises `EngineError` if there is nobody to ask."""
    request_id = uuid.uuid4().hex
    current_request_id.set(request_id)
    in_background.set(True)
    request = Request(_scope(app, line, request_id, owner), _receiver(bytes(line.body)))
    try:
        response = await answers[line.url](request)
        return _told(line, request_id, response.status_code, bytes(response.body))
    except RequestError as error:
        return _told(line, request_id, *_described(error))
    except IngleError:
        raise
    except Exception as error:  # logged there
        return _told(line, request_id, *_described(error))


def _described(error: Exception) -> tuple[int, bytes]:
    status, told = describe(error)
    return status, msgspec.json.encode(told)


def _told(line: Line, request_id: str, status: int, body: bytes) -> OutputLine:
    response = LineResponse(status_code=status, request_id=request_id, body=msgspec.Raw(body))
    return OutputLine(id=f"batch_req_{request_id}", custom_id=line.custom_id, response=response)


async def answer_patiently(app: Starlette, answers: Mapping[str, Answer], line: Line, owner: str = "") -> OutputLine:
    """As `answer`, but that what the server has no room for now, or no engine, is asked again.

    A line that an engine has died with is asked again too, but not for ever: it may be why.
    """
    num_lost = 0
    while True:
        try:
            result = await answer(app, answers, line, owner)
            if result.response is None or result.response.status_code not in _BUSY:
                return result
        except EngineError as error:
            if error.retry_after_s is None:
                raise
            num_lost += isinstance(error, AnswerLost)
            if num_lost > _MOST_LOST:
                return _told(line, uuid.uuid4().hex, *_described(error))
        await asyncio.sleep(BUSY_S)


def _scope(app: Starlette, line: Line, request_id: str, owner: str) -> dict[str, Any]:
    headers = [(b"content-type", b"application/json"), (b"x-request-id", request_id.encode())]
    headers.append((b"content-length", str(len(bytes(line.body))).encode()))
    return {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": line.url, "raw_path": line.url.encode(), "query_string": b"", "root_path": "", "headers": headers,
        "client": None, "server": None, "app": app, "path_params": {},
        "state": {"client": Client(owner, owner=owner)},
    }  # fmt: skip


def _receiver(body: bytes) -> Callable[[], Awaitable[Message]]:
    """A client that sends a body, and stays until it is cancelled."""
    sent = False

    async def receive() -> Message:
        nonlocal sent
        if sent:
            await asyncio.Event().wait()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive


def done_ids(*files: Path) -> set[str]:
    """The lines that files of answers have whole. What a cut-off write left at an end is taken off it."""
    found: set[str] = set()
    for path in files:
        if not path.exists():
            continue
        with path.open("r+b") as file:
            end = 0
            while data := file.readline():
                if not data.endswith(b"\n"):
                    file.truncate(end)
                    break
                end += len(data)
                try:
                    found.add(msgspec.json.decode(data, type=_Done).custom_id)
                except msgspec.MsgspecError as error:
                    raise ValueError(f"{path}, at byte {end - len(data)}: no line of answers: {error}") from None
    return found


class _Done(msgspec.Struct):
    custom_id: str
