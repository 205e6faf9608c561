"""The HTTP application: endpoints, middleware, errors."""

from __future__ import annotations

import asyncio

import msgspec
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ingle.limits import LimitsConfig
from ingle.server import metrics, recent_endpoint, rerank
from ingle.server.access import Access, KeyGuard, Keys, wants_html
from ingle.server.anthropic import messages
from ingle.server.batch.store import Store
from ingle.server.ending import AnswersMemory
from ingle.server.endpoints import Endpoint, guarded
from ingle.server.errors import install_error_handlers
from ingle.server.loading import Loading, LoadingGate, LoadingStatus
from ingle.server.middleware import Prefix, RequestScope
from ingle.server.models import ModelPool
from ingle.server.observers import Observers
from ingle.server.openai import batches, chat, completions, embeddings, files, models, text
from ingle.server.page.assets import Pages
from ingle.server.queue import BodyMemory
from ingle.server.responses import endpoints as responses_endpoints
from ingle.server.responses.store import ResponseStore
from ingle.server.sites import HostGuard, OriginGuard, cors
from ingle.version import __version__


def create_app(
    pool: ModelPool,
    access: Access,
    *,
    access_log: bool = True,
    strict_fields: bool = False,
    page: bool = True,
    limits: LimitsConfig = LimitsConfig(),  # noqa: B008 (frozen)
    loading: Loading | None = None,
    responses: ResponseStore | None = None,
    store: Store | None = None,
    observers: Observers | None = None,
) -> Starlette:
    """The application that hands out the models of `pool`. It opens nothing: engines and sockets are the launcher's.

    `access_log` asks for a line per HTTP request in the logger `ingle.access`; `strict_fields` for a refusal of fields
    that nobody knows; `page` for pages that browsers are shown; `limits` bound what one request, and all together, may
    take; while it is `loading`, the pool is empty and nobody is let through to it; `responses` keeps those that may be
    asked for again; `store` keeps files and batches, if any, and `ingle.server.batch.worker` runs those; `observers`
    are told of every request.
    """
    observers = Observers() if observers is None else observers
    keys = Keys(access.api_keys)
    middleware = [Middleware(Prefix, root_path=access.root_path)] if access.root_path else []
    middleware.append(Middleware(RequestScope, access_log=access_log, observers=observers))
    if access.allowed_hosts or access.local_names:
        middleware.append(Middleware(HostGuard, allowed_hosts=access.allowed_hosts, local_names=access.local_names))
    middleware.append(Middleware(OriginGuard, origins=access.cors_origins))
    if access.cors_origins:
        middleware.append(Middleware(cors, origins=access.cors_origins))
    guard = Middleware(KeyGuard, keys=keys, is_local=access.is_local, guarded=guarded(ENDPOINTS), pages=page)
    middleware.append(guard)
    if loading is not None:
        middleware.append(Middleware(LoadingGate, loading=loading))
    pages = Pages(access.root_path) if page else None
    routes = [Route(endpoint.path, endpoint.answer, methods=[endpoint.method]) for endpoint in ENDPOINTS]
    routes.append(Route("/openapi.json", Schema(access.root_path).answer, methods=["GET"]))
    routes += [] if pages is None else pages.routes()
    app = Starlette(routes=routes, middleware=middleware)
    app.router.redirect_slashes = False
    app.state.models = pool
    app.state.keys = keys
    app.state.responses = ResponseStore() if responses is None else responses
    app.state.strict_fields = strict_fields
    app.state.limits = limits
    app.state.unread = BodyMemory(limits.max_bodies_bytes)
    app.state.answers = AnswersMemory(limits.max_answers_bytes)
    app.state.store = store
    app.state.batches = None
    app.state.observers = observers
    app.state.pages = pages
    install_error_handlers(app)
    return app


class Health(msgspec.Struct):
    status: str
    detail: str


class Index(msgspec.Struct, kw_only=True):
    name: str = "ingle"
    version: str = __version__
    models: list[str]
    openai_base_url: str = "/v1"
    endpoints: list[str]
    docs: str


class Version(msgspec.Struct):
    version: str


async def health(request: Request) -> Response:
    """200 while the engine takes requests and gets on with them, 503 with the reason otherwise. Asks for no API key."""
    status = ModelPool.of(request).health()
    body, headers = Health(status.status, status.detail), {"Cache-Control": "no-store"}
    if status.retry_after_s is not None:
        headers["Retry-After"] = str(status.retry_after_s)
    return Response(msgspec.json.encode(body), 200 if status.ok else 503, headers, media_type="application/json")


async def live(request: Request) -> Response:
    """200 as long as the server answers at all, whatever its engine does. Asks for no API key."""
    body = Health("ok", "the server answers")
    return Response(msgspec.json.encode(body), headers={"Cache-Control": "no-store"}, media_type="application/json")


async def index(request: Request) -> Response:
    """What this is and where to go on. Browsers, who accept HTML, get a page to talk to the model."""
    pages: Pages | None = request.app.state.pages
    if pages is not None and wants_html(request.scope):
        return await pages.chat(request)
    body = Index(
        models=[name for name, _ in ModelPool.of(request).named()],
        endpoints=[f"{endpoint.method} {endpoint.path}" for endpoint in ENDPOINTS],
        docs="/openapi.json" if pages is None else "/docs",
    )
    shown = msgspec.json.format(msgspec.json.encode(body))
    return Response(shown, headers={"Vary": "Accept"}, media_type="application/json")


async def version(request: Request) -> Response:
    """ingle's own."""
    return Response(msgspec.json.encode(Version(__version__)), media_type="application/json")


_READY = "The same, under the name that goes with the last: 503 also while a model is loaded, at first or anew."
_PING = "The same, under the name that SageMaker asks for."
ENDPOINTS = (
    Endpoint("GET", "/", index, answers=Index),
    Endpoint("GET", "/health", health, answers=Health, other_answers=((503, (Health, LoadingStatus)),)),
    Endpoint("GET", "/health/live", live, answers=Health),
    Endpoint(
        "GET", "/health/ready", health, answers=Health, other_answers=((503, (Health, LoadingStatus)),), about=_READY
    ),
    Endpoint("GET", "/ping", health, answers=Health, other_answers=((503, (Health, LoadingStatus)),), about=_PING),
    Endpoint("GET", "/version", version, answers=Version),
    *metrics.ENDPOINTS,
    *recent_endpoint.ENDPOINTS,
    *models.ENDPOINTS,
    *completions.ENDPOINTS,
    *chat.ENDPOINTS,
    *embeddings.ENDPOINTS,
    *rerank.ENDPOINTS,
    *files.ENDPOINTS,
    *batches.ENDPOINTS,
    *text.ENDPOINTS,
    *messages.ENDPOINTS,
    *responses_endpoints.ENDPOINTS,
)


class Schema:
    """The OpenAPI document, made when first asked for: that takes some tenths of a second."""

    def __init__(self, root_path: str) -> None:
        self._root_path = root_path
        self._body: bytes | None = None

    async def answer(self, request: Request) -> Response:
        if self._body is None:
            self._body = await asyncio.to_thread(_schema, self._root_path, request.app.state.limits)
        return Response(self._body, media_type="application/json")


def _schema(root_path: str, limits: LimitsConfig) -> bytes:
    from ingle.server.description import document

    return msgspec.json.encode({**document(ENDPOINTS, limits), "servers": [{"url": root_path or "/"}]})
