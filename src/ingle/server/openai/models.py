"""`GET /v1/models` and `GET /v1/models/{id}`."""

from __future__ import annotations

import uuid

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from ingle.request import SamplingParams
from ingle.server.context import ServerContext
from ingle.server.endpoints import Endpoint
from ingle.server.openai.responses import ModelCard, ModelFacts, ModelList, ModelPermission

_DEFAULTED_FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


async def list_models(request: Request) -> Response:
    context: ServerContext = request.app.state.context
    return _json(ModelList(data=[_card(context, name) for name in context.model_names]))


async def retrieve_model(request: Request) -> Response:
    context: ServerContext = request.app.state.context
    name: str = request.path_params["model"]
    context.check_model(name)
    return _json(_card(context, name))


ENDPOINTS = (
    Endpoint("GET", "/v1/models", list_models),
    Endpoint("GET", "/v1/models/{model:path}", retrieve_model),  # names such as Qwen/Qwen3-8B hold slashes
)


def _card(context: ServerContext, name: str) -> ModelCard:
    permission = ModelPermission(id=f"modelperm-{uuid.uuid4().hex}", created=context.created)
    info = context.engine.info
    sampling = SamplingParams(**context.default_sampling)
    return ModelCard(
        id=name,
        created=context.created,
        root=context.model_root,
        max_model_len=info.max_model_len,
        permission=[permission],
        default_sampling_params={field: getattr(sampling, field) for field in _DEFAULTED_FIELDS},
        meta=ModelFacts(**{name: getattr(info, name) for name in ModelFacts.__struct_fields__}),
    )


def _json(body: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(body), media_type="application/json")
