"""The HTTP application: endpoints, middleware, errors. FastAPI only describes it, when somebody asks for that."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import msgspec
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from ingle.server.context import ServerContext
from ingle.server.endpoints import Endpoint
from ingle.server.errors import install_error_handlers
from ingle.server.middleware import ApiKeyGuard, HostGuard, RequestScope
from ingle.server.openai import chat, completions, models
from ingle.version import __version__

if TYPE_CHECKING:
    from fastapi import FastAPI

_DESCRIPTIONS = ("/openapi.json", "/docs", "/docs/oauth2-redirect", "/redoc")
"""Where FastAPI has the schema and its viewers."""


def create_app(context: ServerContext) -> Starlette:
    """The application that serves `context`. It opens nothing: engine and sockets are the launcher's."""
    middleware = [Middleware(RequestScope, access_log=context.access_log)]
    if context.allowed_hosts:
        middleware.append(Middleware(HostGuard, allowed_hosts=context.allowed_hosts))
    if context.api_keys:
        middleware.append(Middleware(ApiKeyGuard, api_keys=context.api_keys))
    described = Described()
    routes = [Route(endpoint.path, endpoint.answer, methods=[endpoint.method]) for endpoint in ENDPOINTS]
    routes += [Route(path, described, methods=["GET"]) for path in _DESCRIPTIONS]
    app = Starlette(routes=routes, middleware=middleware)
    app.router.redirect_slashes = False
    app.state.context = context
    install_error_handlers(app)
    return app


async def health(request: Request) -> Response:
    """200 while the engine takes requests, 503 with the reason otherwise. Asks for no API key."""
    status = request.app.state.context.engine.health()
    body = {"status": "ok" if status.ok else "unavailable", "detail": status.detail}
    return Response(msgspec.json.encode(body), 200 if status.ok else 503, media_type="application/json")


async def version(request: Request) -> Response:
    """ingle's own."""
    return Response(msgspec.json.encode({"version": __version__}), media_type="application/json")


ENDPOINTS = (
    Endpoint("GET", "/health", health),
    Endpoint("GET", "/version", version),
    *models.ENDPOINTS,
    *completions.ENDPOINTS,
    *chat.ENDPOINTS,
)


class Described:
    """The OpenAPI schema and its viewers: an ASGI application that imports FastAPI when first asked.

    That import takes as long as half of the server's start, and few servers are ever asked.
    """

    def __init__(self) -> None:
        self._app: FastAPI | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._app is None:
            self._app = await asyncio.to_thread(_description)
        await self._app(scope, receive, send)


def _description() -> FastAPI:
    from ingle.server.description import describing_app

    return describing_app(ENDPOINTS)
