"""A file that is uploaded as a form: it goes to disk as it comes, and nothing else of the form takes any room."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from starlette.requests import Request

from ingle.errors import RequestError
from ingle.server.body import show

_MAX_FIELDS, _MAX_FIELD_BYTES, _MAX_NAME_CHARS = 32, 4096, 255
_PIECE_BYTES = 1 << 20
"""Written at once, off the event loop."""


class Upload:
    """The parts of a multipart/form-data body: `file` is handed on, others are kept as text, by name.

    Source: RFC 7578. Raises `RequestError` for a body that is none.
    """

    def __init__(self, request: Request) -> None:
        from python_multipart.multipart import MultipartParser, parse_options_header

        self._request = request
        self._parse_options = parse_options_header
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        """Of `file`, without what stands before its last slash; None as long as there is none."""
        self._piece = bytearray()
        self._header = bytearray()
        self._value = bytearray()
        self._headers: dict[bytes, bytes] = {}
        self._name = ""
        self._text = bytearray()
        kind, options = parse_options_header(request.headers.get("content-type", ""))
        boundary = options.get(b"boundary", b"")
        if kind != b"multipart/form-data" or not boundary:
            got = show(request.headers.get("content-type", ""))
            raise RequestError(f"Send the file as a form, multipart/form-data with a boundary, got {got}.", status=415)
        callbacks: Any = {
            "on_part_begin": self._begin,
            "on_header_field": lambda data, start, end: self._header.extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
            "on_header_end": self._end_header,
            "on_headers_finished": self._named,
            "on_part_data": self._data,
            "on_part_end": self._end,
        }
        self._parser = MultipartParser(boundary, callbacks)

    async def read(self, write: Callable[[bytes], None], most: int) -> None:
        """Reads the whole body, of up to `most` bytes. `write` gets the file, piece by piece, in threads."""
        from python_multipart.exceptions import FormParserError
        from python_multipart.multipart import MultipartState

        num_bytes = 0
        try:
            async for chunk in self._request.stream():
                num_bytes += len(chunk)
                if num_bytes > most:
                    raise RequestError(f"The body is larger than {most} bytes.", code="body_too_large", status=413)
                self._parser.write(chunk)
                if len(self._piece) >= _PIECE_BYTES:
                    await self._hand_on(write)
            if self._parser.state != MultipartState.END:
                raise RequestError("The form cannot be read: it ends before its last boundary.")
        except FormParserError as error:
            raise RequestError(f"The form cannot be read: {error}") from error
        await self._hand_on(write)

    async def _hand_on(self, write: Callable[[bytes], None]) -> None:
        piece, self._piece = bytes(self._piece), bytearray()
        if piece:
            await asyncio.to_thread(write, piece)

    # What the parser calls.

    def _begin(self) -> None:
        self._headers, self._text = {}, bytearray()

    def _end_header(self) -> None:
        self._headers[bytes(self._header).lower()] = bytes(self._value)
        self._header, self._value = bytearray(), bytearray()

    def _named(self) -> None:
        _, options = self._parse_options(self._headers.get(b"content-disposition", b""))
        self._name = options.get(b"name", b"").decode(errors="replace")
        if len(self.fields) >= _MAX_FIELDS:
            raise RequestError(f"The form has more than {_MAX_FIELDS} fields.")
        if self._name != "file":
            return
        if self.filename is not None:
            raise RequestError("The form has several files: send one.", param="file")
        name = options.get(b"filename", b"").decode(errors="replace").replace("\\", "/").rpartition("/")[2]
        printed = "".join(character for character in name if character.isprintable())
        self.filename = printed[:_MAX_NAME_CHARS] or "file"

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._name == "file":
            self._piece += data[start:end]
            return
        self._text += data[start:end]
        if len(self._text) > _MAX_FIELD_BYTES:
            raise RequestError(f"The form's field {self._name[:80]!r} is larger than {_MAX_FIELD_BYTES} bytes.")

    def _end(self) -> None:
        if self._name != "file":
            self.fields[self._name[:80]] = self._text.decode(errors="replace")
