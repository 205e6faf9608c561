"""A server of the OpenAI protocol whose answers a test writes."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

Reply = Callable[[str, dict[str, Any]], Any]
"""Given the path and the body: a text, which becomes a chat's answer; a dict, the whole answer; a status; or None, for
a connection that ends without a word."""


@dataclass
class FakeServer:
    url: str
    reply: Reply
    asked: list[dict[str, Any]] = field(default_factory=list)


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    told: FakeServer

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send(200, {"data": [{"id": "fake"}, {"id": "other"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            told.asked.append({"path": self.path, "key": self.headers.get("authorization"), **body})
            reply = told.reply(self.path, body)
            if reply is None:
                self.close_connection = True
            elif isinstance(reply, int):
                self._send(reply, {"error": {"message": f"status {reply}"}})
            elif isinstance(reply, str):
                usage = {"prompt_tokens": 10, "completion_tokens": 2}
                self._send(200, {"choices": [{"message": {"content": reply}}], "usage": usage})
            else:
                self._send(200, reply)

        def _send(self, status: int, body: object) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        told = FakeServer(f"http://127.0.0.1:{server.server_port}", lambda path, body: "yes")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield told
        finally:
            server.shutdown()
            thread.join()
