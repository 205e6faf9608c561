"""`POST /v1/embeddings`."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from pydantic import Field, PlainValidator, model_validator
from starlette.requests import Request
from starlette.responses import Response

from ingle.limits import limits
from ingle.request import MAX_INTEGER, EngineRequest
from ingle.server.body import FieldError, ModelRequest, Neutral
from ingle.server.endpoints import Endpoint
from ingle.server.models import ServedModel
from ingle.server.openai.protocol import Integer, texts_or_ids
from ingle.server.vectors import respond_vectors
from ingle.text.vectors import Reading, numbers


class EmbeddingRequest(ModelRequest):
    """Body of `POST /v1/embeddings`: OpenAI's fields, and of vLLM's those about tokens and length."""

    UNSUPPORTED: ClassVar[Neutral] = {
        "cache_salt": (),
        "chat_template": (),
        "chat_template_kwargs": (),
        "embed_dtype": ("float32",),
        "endianness": ("native", "little"),
        "messages": (),
        "mm_processor_kwargs": (),
        "request_id": (),
    }

    input: Annotated[
        list[str] | list[list[int]],
        PlainValidator(texts_or_ids, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
    ]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Integer | None = Field(None, ge=1, le=MAX_INTEGER)
    """The first numbers of each vector."""
    normalize: bool | None = None
    """To length 1. Default: as the model says."""
    use_activation: bool | None = None
    """The same, as newer versions of vLLM call it."""
    prompt_name: str | None = None
    """Of the model's prompts (`query`, …) the one that goes before each text."""
    truncate_prompt_tokens: Integer | None = Field(None, ge=-1, le=MAX_INTEGER)
    """Tokens that are kept of a longer text; -1 for as many as the model takes. Default: it is refused."""
    truncation_side: Literal["left", "right"] | None = None
    add_special_tokens: bool | None = None
    priority: Integer | None = Field(None, ge=-MAX_INTEGER, le=MAX_INTEGER)
    """Lower ones are computed first; 0 by default."""
    user: str | None = None
    metadata: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check(self) -> EmbeddingRequest:
        if (text := limits().over("max_texts", len(self.input), f"has {len(self.input)} texts")) is not None:
            raise FieldError("input", f" {text}")
        if None not in (self.normalize, self.use_activation) and self.normalize != self.use_activation:
            raise FieldError("normalize", " and use_activation differ: send one of them")
        return self

    @property
    def reading(self) -> Reading:
        return Reading(
            add_special_tokens=self.add_special_tokens is not False,
            prompt_name=self.prompt_name,
            truncate=self.truncate_prompt_tokens,
            side=self.truncation_side or "right",
        )


class Embedding(msgspec.Struct, kw_only=True):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | bytes
    """Bytes leave as base64: float32, little-endian."""


class EmbeddingUsage(msgspec.Struct):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(msgspec.Struct, kw_only=True):
    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


async def create_embeddings(request: Request) -> Response:
    """A vector for each text."""
    return await respond_vectors(request, EmbeddingRequest, prepare_embeddings)


ENDPOINTS = (Endpoint("POST", "/v1/embeddings", create_embeddings, EmbeddingRequest, EmbeddingList),)


class EmbeddingWriter:
    def __init__(self, model: ServedModel, requests: Sequence[EngineRequest], *, as_base64: bool) -> None:
        self.model = model
        self.requests = requests
        self._as_base64 = as_base64

    def whole(self, vectors: Sequence[bytes]) -> EmbeddingList:
        data = [
            Embedding(index=index, embedding=vector if self._as_base64 else numbers(vector))
            for index, vector in enumerate(vectors)
        ]
        count = sum(len(request.prompt_token_ids) for request in self.requests)
        return EmbeddingList(data=data, model=self.model.name, usage=EmbeddingUsage(count, count))


def prepare_embeddings(model: ServedModel, asked: EmbeddingRequest) -> EmbeddingWriter:
    """Tokenizes. Raises `RequestError`."""
    normalize = asked.use_activation if asked.normalize is None else asked.normalize
    pooling = model.text.pooling.of(asked.dimensions, normalize)
    reader, name, reading = model.texts, f"embd-{uuid.uuid4().hex}", asked.reading
    texts: Iterable[str | list[int]] = asked.input
    requests = [
        msgspec.structs.replace(
            reader.read(
                text, pooling, reading, f"{name}-{index}", "input" if len(asked.input) == 1 else f"input[{index}]"
            ),
            priority=asked.priority or 0,
        )
        for index, text in enumerate(texts)
    ]
    return EmbeddingWriter(model, requests, as_base64=asked.encoding_format == "base64")
