"""`GET /v1/models` and `GET /v1/models/{id}`."""

from __future__ import annotations

import uuid

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from ingle.request import SamplingParams
from ingle.server.anthropic.answers import ModelInfo, ModelPage
from ingle.server.anthropic.errors import AnthropicError
from ingle.server.anthropic.models import model_info, model_page
from ingle.server.dialects import speaks_anthropic
from ingle.server.endpoints import Endpoint
from ingle.server.models import ModelPool, ServedModel
from ingle.server.openai.responses import ModelCard, ModelFacts, ModelList, ModelPermission

_DEFAULTED_FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


async def list_models(request: Request) -> Response:
    """The served models, once for every name that they have; in Anthropic's shape for its clients."""
    if speaks_anthropic(request.scope):
        return _json(model_page(ModelPool.of(request)))
    return _json(ModelList(data=[_card(model, name) for name, model in ModelPool.of(request).named()]))


async def retrieve_model(request: Request) -> Response:
    """One served model."""
    name: str = request.path_params["model"]
    model = ModelPool.of(request).get(name)
    shown = name if name in model.names else model.name
    return _json(model_info(model, shown) if speaks_anthropic(request.scope) else _card(model, shown))


ENDPOINTS = (
    Endpoint("GET", "/v1/models", list_models, answers=ModelList, other_answers=((200, (ModelPage,)),)),
    # names such as Qwen/Qwen3-8B hold slashes
    Endpoint(
        "GET",
        "/v1/models/{model:path}",
        retrieve_model,
        answers=ModelCard,
        other_answers=((200, (ModelInfo,)), (404, (AnthropicError,))),
        statuses=(404,),
    ),
)


def _card(model: ServedModel, name: str) -> ModelCard:
    permission = ModelPermission(id=f"modelperm-{uuid.uuid4().hex}", created=model.created)
    sampling = SamplingParams(**model.default_sampling)
    return ModelCard(
        id=name,
        created=model.created,
        root=model.root,
        max_model_len=model.info.max_model_len,
        permission=[permission],
        default_sampling_params={field: getattr(sampling, field) for field in _DEFAULTED_FIELDS},
        meta=ModelFacts(**{name: getattr(model.info, name) for name in ModelFacts.__struct_fields__}),
    )


def _json(body: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(body), media_type="application/json")
