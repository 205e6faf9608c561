"""`GET /v1/models` and `GET /v1/models/{id}`."""

from __future__ import annotations

import uuid

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from ingle.request import SamplingParams
from ingle.server.endpoints import Endpoint
from ingle.server.models import ModelPool, ServedModel
from ingle.server.openai.responses import ModelCard, ModelFacts, ModelList, ModelPermission

_DEFAULTED_FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


async def list_models(request: Request) -> Response:
    """The served models, once for every name that they have."""
    return _json(ModelList(data=[_card(model, name) for name, model in ModelPool.of(request).named()]))


async def retrieve_model(request: Request) -> Response:
    """One served model."""
    name: str = request.path_params["model"]
    model = ModelPool.of(request).get(name)
    return _json(_card(model, name if name in model.names else model.name))


ENDPOINTS = (
    Endpoint("GET", "/v1/models", list_models, answers=ModelList),
    # names such as Qwen/Qwen3-8B hold slashes
    Endpoint("GET", "/v1/models/{model:path}", retrieve_model, answers=ModelCard, statuses=(404,)),
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
