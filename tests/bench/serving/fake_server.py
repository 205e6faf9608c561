"""A server of OpenAI's API in this process that gives tokens at moments a test chooses, and breaks as told."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Script:
    """How it answers."""

    delay_s: float = 0.0
    """Before the first event."""
    gap_s: float = 0.0
    tokens_per_event: int = 1
    usage: bool = True
    """Whether it knows `include_usage`."""
    refuses: tuple[str, ...] = ()
    """Fields for which it has a 400."""
    answers: Callable[[int], str] = lambda number: "ok"
    """Of the request of that number: ok, 500, error (in the stream), cut (in the middle), or die (the whole server)."""
    tokenize: bool = True
    hangs_up: bool = False
    """Closes each connection after an answer, without a word."""
    endless: bool = False
    """Streams go on until the client leaves."""


@dataclass
class Fake:
    script: Script
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    headers: list[str] = field(default_factory=list)
    open: int = 0
    """Streams under way."""
    most_open: int = 0
    asked: threading.Event = field(default_factory=threading.Event)
    """Set when a stream with many tokens has begun."""
    loop: asyncio.AbstractEventLoop | None = None
    server: asyncio.Server | None = None
    writers: set[asyncio.StreamWriter] = field(default_factory=set)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.add(writer)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while await self._one(reader, writer) and not self.script.hangs_up:
                pass
        self.writers.discard(writer)
        writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        first, *lines = head.split("\r\n")
        path = first.split()[1]
        length = next((int(line.split(":")[1]) for line in lines if line.lower().startswith("content-length")), 0)
        body = json.loads(await reader.readexactly(length)) if length else {}
        self.paths.append(path)
        self.headers.append(head)
        if path.endswith("/models"):
            return self._json(writer, {"data": [{"id": "fake", "max_model_len": 4096}]})
        if path == "/tokenize" and self.script.tokenize:
            return self._json(writer, {"tokens": body["prompt"].split(), "count": len(body["prompt"].split())})
        if path.endswith("/completions"):
            return await self._stream(writer, path, body)
        return self._json(writer, {"error": {"message": f"no {path}"}}, "404 Not Found")

    def _json(self, writer: asyncio.StreamWriter, said: Any, status: str = "200 OK") -> bool:
        content = json.dumps(said).encode()
        head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        writer.write(head.encode() + content)
        return True

    async def _stream(self, writer: asyncio.StreamWriter, path: str, body: dict[str, Any]) -> bool:
        refused = [name for name in self.script.refuses if name in body]
        if refused:
            return self._json(writer, {"error": {"message": f"unknown field {refused[0]}"}}, "400 Bad Request")
        what = "ok" if _is_warm_up(body) else self.script.answers(sum(not _is_warm_up(one) for one in self.bodies))
        self.bodies.append(body)
        self.open += 1
        self.most_open = max(self.open, self.most_open)
        try:
            return await self._answer(writer, path, body, what)
        finally:
            self.open -= 1

    async def _answer(self, writer: asyncio.StreamWriter, path: str, body: dict[str, Any], what: str) -> bool:
        if what == "500":
            return self._json(writer, {"error": {"message": "out of luck"}}, "500 Internal Server Error")
        script, say = self.script, _Sayer(writer, chat="chat" in path)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        say.role()
        await asyncio.sleep(script.delay_s)
        if what == "error":
            say.event({"error": {"message": "the engine died"}})
            return False
        num_tokens = body["max_tokens"]
        for at in range(0, num_tokens, script.tokens_per_event):
            say.text("x" * min(script.tokens_per_event, num_tokens - at))
            await writer.drain()
            if what == "cut" and at:
                writer.transport.abort()
                return False
            if what == "die":
                self.die()
                return False
            if not _is_warm_up(body):
                self.asked.set()
            while script.endless and not _is_warm_up(body):
                await asyncio.sleep(0.01)
                say.text("x")
                await writer.drain()
            if at + script.tokens_per_event < num_tokens:
                await asyncio.sleep(script.gap_s)
        say.text("", finish_reason="length")
        if script.usage and (body.get("stream_options") or {}).get("include_usage"):
            details = {"cached_tokens": 3}
            usage = {"prompt_tokens": 7, "completion_tokens": num_tokens, "prompt_tokens_details": details}
            say.event({"choices": [], "usage": usage})
        _chunk(writer, b"data: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")
        return True

    def die(self) -> None:
        """As a process that is killed: nobody listens, and all connections are reset."""
        assert self.server is not None
        self.server.close()
        for writer in self.writers:
            writer.transport.abort()


def _is_warm_up(body: dict[str, Any]) -> bool:
    return bool(body["max_tokens"] == 8)


class _Sayer:
    def __init__(self, writer: asyncio.StreamWriter, *, chat: bool) -> None:
        self._writer, self._chat = writer, chat

    def role(self) -> None:
        if self._chat:
            self._choice(delta={"role": "assistant", "content": ""}, finish_reason=None)

    def text(self, text: str, finish_reason: str | None = None) -> None:
        said: dict[str, Any] = {"text": text}
        if self._chat:
            said = {"delta": {"content": text} if text else {}}
        self._choice(**said, finish_reason=finish_reason)

    def event(self, said: dict[str, Any]) -> None:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        whole = {"id": "1", "object": kind, "created": 1, "model": "fake", "usage": None, **said}
        _chunk(self._writer, f"data: {json.dumps(whole)}\n\n".encode())

    def _choice(self, **fields: Any) -> None:
        self.event({"choices": [{"index": 0, **fields}]})


def _chunk(writer: asyncio.StreamWriter, content: bytes) -> None:
    writer.write(f"{len(content):x}\r\n".encode() + content + b"\r\n")


@contextlib.contextmanager
def fake_server(
    script: Script | None = None, *, socket: Path | None = None, port: int = 0, certificate: Path | None = None
) -> Iterator[Fake]:
    """In a thread of its own. `certificate`: a .pem file with its .key beside it, for TLS."""
    tls = None
    if certificate is not None:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(certificate, certificate.with_suffix(".key"))
    fake, up = Fake(script or Script()), threading.Event()

    async def main() -> None:
        fake.loop = asyncio.get_running_loop()
        if socket is not None:
            fake.server = await asyncio.start_unix_server(fake.serve, socket)
            fake.url = f"unix:{socket}"
        else:
            fake.server = await asyncio.start_server(fake.serve, "127.0.0.1", port, ssl=tls)
            fake.url = f"http{'s' * (tls is not None)}://127.0.0.1:{fake.server.sockets[0].getsockname()[1]}"
        up.set()
        await done.wait()
        fake.die()

    done = asyncio.Event()
    thread = threading.Thread(target=lambda: asyncio.run(main()), daemon=True)
    thread.start()
    assert up.wait(10)
    try:
        yield fake
    finally:
        assert fake.loop is not None
        fake.loop.call_soon_threadsafe(done.set)
        thread.join(10)


def flags(fake: Fake, output: Path, *more: str) -> Sequence[str]:
    return ["serve", "--base-url", fake.url, "--output", str(output), "--input-len", "5", "--output-len", "9", *more]
