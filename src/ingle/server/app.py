"""The HTTP application: routes, middleware, errors."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import APIRouter, FastAPI, Request, Response
from pydantic.json_schema import models_json_schema
from starlette.middleware import Middleware

from ingle.server.context import ServerContext
from ingle.server.errors import install_error_handlers
from ingle.server.middleware import ApiKeyGuard, HostGuard, RequestScope
from ingle.server.openai import chat, completions, models
from ingle.server.openai.protocol import SCHEMA_REF, ChatCompletionRequest, CompletionRequest
from ingle.version import __version__

router = APIRouter()


def create_app(context: ServerContext) -> FastAPI:
    """The application that serves `context`. It opens nothing: engine and sockets are the launcher's."""
    middleware = [Middleware(RequestScope, access_log=context.access_log)]
    if context.allowed_hosts:
        middleware.append(Middleware(HostGuard, allowed_hosts=context.allowed_hosts))
    if context.api_keys:
        middleware.append(Middleware(ApiKeyGuard, api_keys=context.api_keys))
    app = _App(title="ingle", version=__version__, middleware=middleware, redirect_slashes=False)
    app.state.context = context
    install_error_handlers(app)
    for part in (router, models.router, completions.router, chat.router):
        app.include_router(part)
    return app


@router.get("/health")
async def health(request: Request) -> Response:
    """200 while the engine takes requests, 503 with the reason otherwise. Asks for no API key."""
    status = request.app.state.context.engine.health()
    body = {"status": "ok" if status.ok else "unavailable", "detail": status.detail}
    return Response(msgspec.json.encode(body), 200 if status.ok else 503, media_type="application/json")


@router.get("/version")
async def version() -> dict[str, str]:
    return {"version": __version__}


class _App(FastAPI):
    """FastAPI whose schema knows the request bodies, which the endpoints read and validate themselves."""

    def openapi(self) -> dict[str, Any]:
        schema = super().openapi()
        _, definitions = models_json_schema(
            [(CompletionRequest, "validation"), (ChatCompletionRequest, "validation")], ref_template=SCHEMA_REF
        )
        schema.setdefault("components", {}).setdefault("schemas", {}).update(definitions["$defs"])
        return schema
