"""Nothing is reached without a key but a short list, whatever else the application answers to."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from typing import Any, cast

import pytest
from starlette.applications import Starlette
from starlette.routing import Mount, Route
from starlette.types import Message

from ingle.config.access import ApiKey
from ingle.server.access import PUBLIC, Client, client_of
from ingle.server.app import ENDPOINTS
from ingle.server.loading import Loading
from ingle.server.models import ServedModel

from .fakes import app_for, served

pytestmark = pytest.mark.anyio

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND", "get")
KEY = "the-right-key"
NONE: list[tuple[str, str]] = []
RIGHT = [[("authorization", f"Bearer {KEY}")], [("authorization", f"bearer  {KEY} ")], [("x-api-key", KEY)]]
WRONG = [
    [("authorization", "Bearer the-right-kez")],
    [("authorization", f"Bearer {KEY}2")],
    [("authorization", f"Bearer {KEY[:-1]}")],
    [("authorization", KEY)],
    [("authorization", f"Basic {KEY}")],
    [("authorization", "Bearer")],
    [("authorization", "")],
    [("x-api-key", f"Bearer {KEY}")],
    [("x-api-key", "")],
    [("api-key", KEY)],
    [("cookie", f"api_key={KEY}")],
    [("x-forwarded-for", "127.0.0.1"), ("x-original-url", "/health"), ("x-rewrite-url", "/health")],
]
UNKNOWN = (
    *(
        "/nowhere",
        "/v1",
        "/v1/",
        "/v1/nowhere",
        "/admin",
        "/metrics/",
        "//",
        "/page",
        "//page/x",
        "/*",
        "/.env",
        "/server-info",
    ),
    *("/health/", "//health", "/HEALTH", "/health/x", "/health/../v1/models", "/v1/../health", "/ping/", "/health\0"),
    *(
        "/v1/models/",
        "//v1/models",
        "/health;/v1/models",
        "/health?/v1/models",
        "/openapi.json/",
        "/docs/",
        "/docs/x",
        "",
    ),
)
WEBSOCKETS = ("/", "/v1/realtime")
"""No route is one: the connection takes no upgrade, and the application refuses none the less."""


def is_open(method: str, path: str) -> bool:
    """To whoever has no key: a short list, and what comes with ingle and holds nothing of the server's."""
    return (method, path) in PUBLIC or (
        method in ("GET", "HEAD") and (path in ("/docs", "/redoc") or path.startswith("/page/"))
    )


def paths_of(app: Starlette) -> Iterator[str]:
    """Of every route there is, parameters filled in. A mounted application has to be walked, too."""
    for route in app.routes:
        assert isinstance(route, Route), f"{route}: say here how to walk it"
        assert not isinstance(route, Mount)
        path = route.path
        for name in route.param_convertors:
            for spelled in (f"{{{name}}}", f"{{{name}:path}}"):
                path = path.replace(spelled, "a/b" if ":path" in spelled else "a")
        assert "{" not in path
        yield path


async def answer(
    app: Any, method: str, path: str, headers: list[tuple[str, str]], query: bytes = b""
) -> tuple[int, dict[str, str]]:
    """Status and headers. The request has no body, and whoever waits for more than the answer waits in vain."""
    sent: list[Message] = []
    read = False

    async def receive() -> Message:
        nonlocal read
        if read:
            return {"type": "http.disconnect"}
        read = True
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in [("host", "127.0.0.1:8000"), *headers]]
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "path": path,
        "raw_path": path.encode(), "query_string": query, "root_path": "", "scheme": "http", "headers": raw,
        "server": ("127.0.0.1", 8000), "client": ("127.0.0.1", 1), "state": {},
    }  # fmt: skip
    await app(scope, receive, send)
    start = sent[0]
    assert start["type"] == "http.response.start"
    return start["status"], {name.decode().lower(): value.decode("latin-1") for name, value in start["headers"]}


@pytest.fixture
def app(model: ServedModel) -> Starlette:
    return app_for(model, api_keys=(KEY,))


async def test_every_route_with_every_method(app: Starlette) -> None:
    walked = [*dict.fromkeys(paths_of(app))]
    described = {endpoint.path.partition("{")[0] for endpoint in ENDPOINTS}
    assert len(walked) > 30 and {"/", "/health", "/v1/models", "/openapi.json", "/docs", "/redoc"} <= set(walked)
    assert all(any(path.startswith(each) for path in walked) for each in described)
    for method, path in itertools.product(METHODS, (*walked, *UNKNOWN)):
        for headers in (NONE, WRONG[0]):
            status, told = await answer(app, method, path, headers)
            if is_open(method, path):
                assert status not in (401, 403, 500), (method, path)
            else:
                assert (status, told.get("www-authenticate")) == (401, "Bearer"), (method, path, headers)
        status, _ = await answer(app, method, path, RIGHT[0])
        assert status not in (401, 403) and status < 500, (method, path)


async def test_the_public_list_is_short_and_tells_little(app: Starlette) -> None:
    assert sorted({path for _, path in PUBLIC}) == ["/", "/health", "/health/live", "/health/ready", "/ping"]
    assert {method for method, _ in PUBLIC} == {"GET", "HEAD"} and ("GET", "/") not in PUBLIC


@pytest.mark.parametrize("headers", WRONG, ids=str)
async def test_what_is_no_key(app: Starlette, headers: list[tuple[str, str]]) -> None:
    for method, path in (("GET", "/v1/models"), ("POST", "/v1/completions"), ("GET", "/"), ("GET", "/openapi.json")):
        assert (await answer(app, method, path, headers))[0] == 401
    assert (await answer(app, "GET", "/v1/models", headers, query=f"api_key={KEY}&key={KEY}".encode()))[0] == 401


@pytest.mark.parametrize("headers", RIGHT, ids=str)
async def test_what_is_one(app: Starlette, headers: list[tuple[str, str]]) -> None:
    assert (await answer(app, "GET", "/v1/models", headers))[0] == 200
    assert (await answer(app, "GET", "/v1/models", [*WRONG[0], ("x-api-key", KEY)]))[0] == 200


async def test_while_the_model_is_loaded_too(model: ServedModel) -> None:
    app = app_for(model, api_keys=(KEY,), loading=Loading())
    for path in dict.fromkeys(paths_of(app)):
        for method in ("GET", "POST"):
            status, _ = await answer(app, method, path, NONE)
            if not path.startswith(("/health/", "/page/", "/docs", "/redoc")):
                assert status == (503 if is_open(method, path) else 401), (method, path)


async def test_behind_a_prefix_too(model: ServedModel) -> None:
    app = app_for(model, api_keys=(KEY,), root_path="/llm")
    for prefix in ("/llm", "/llm/llm", "/LLM", "//llm", "/llmx", "/llm/.."):
        for method, path in itertools.product(("GET", "POST"), dict.fromkeys(paths_of(app))):
            status, _ = await answer(app, method, prefix + path, NONE)
            opened = prefix == "/llm" and is_open(method, path)
            assert (status != 401) == opened, (method, prefix, path)
    for path in ("/llm", "/llm/", "/llm/v1/models", "/v1/models", "/llm/version", "/llm/docs", "/llm/openapi.json"):
        assert (await answer(app, "GET", path, RIGHT[0]))[0] == 200, path


async def test_no_websocket(app: Starlette) -> None:
    for path in WEBSOCKETS:
        sent: list[Message] = []

        async def receive() -> Message:
            return {"type": "websocket.connect"}

        async def send(message: Message, sent: list[Message] = sent) -> None:
            sent.append(message)

        scope = {"type": "websocket", "path": path, "headers": [], "query_string": b"", "root_path": "", "state": {}}
        await app(cast(Any, scope), receive, send)
        assert "websocket.accept" not in [message["type"] for message in sent]


RAW = [
    (b"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", 401),
    (b"GET http://127.0.0.1/v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", 401),
    (b"GET http://127.0.0.1/health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", 200),
    (b"GET /health?/v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", 200),
    (b"GET /%68ealth HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", 200),
    (b"GET /health%2f..%2fv1%2fmodels HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", 401),
    (b"GET /v1/%6dodels HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", 401),
    (b"GET /health/../v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", 401),
    (b"OPTIONS * HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", 401),
    (b"GET /v1/models HTTP/1.0\r\n\r\n", 401),
    (b"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n", 401),
    (b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 2\r\n\r\n{}", 401),
]


async def test_over_a_connection(app: Starlette) -> None:
    async with served(app) as port:
        for request, status in RAW:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(request)
            line = await asyncio.wait_for(reader.readline(), 30)
            assert line.split()[1] == str(status).encode(), request
            writer.close()


async def test_whose_request_it_is(model: ServedModel) -> None:
    keys = (ApiKey("a", "alice"), ApiKey("b", "bob"), ApiKey("root", "root", is_admin=True))
    app, seen = app_for(model, api_keys=keys), list[Client]()
    version = next(route for route in app.routes if isinstance(route, Route) and route.path == "/version")
    inner = version.app

    async def spying(scope: Any, receive: Any, send: Any) -> None:
        seen.append(client_of(scope))
        await inner(scope, receive, send)

    version.app = spying
    for key in ("b", "root", "a"):
        assert (await answer(app, "GET", "/version", [("x-api-key", key)]))[0] == 200
    assert seen == [Client("bob"), Client("root", is_admin=True), Client("alice")]
