"""`POST /v1/rerank` as Jina, Cohere and vLLM have it, and vLLM's `POST /v1/score`: how well texts answer queries."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import UNSET, UnsetType
from pydantic import Field, PlainValidator, model_validator
from starlette.requests import Request
from starlette.responses import Response

from ingle.errors import RequestError
from ingle.limits import limits
from ingle.request import MAX_INTEGER, EngineRequest
from ingle.server.body import FieldError, ModelRequest, Neutral, show
from ingle.server.endpoints import Endpoint
from ingle.server.models import ServedModel
from ingle.server.openai.embeddings import EmbeddingUsage
from ingle.server.openai.protocol import Integer
from ingle.server.vectors import respond_vectors
from ingle.text.reranker import Reranker, score
from ingle.text.vectors import numbers


def _document(value: Any) -> str | None:
    """A text, or an object with one, as Jina and Cohere take it."""
    text = value.get("text") if isinstance(value, dict) and value.keys() <= {"text", "id"} else value
    return text if isinstance(text, str) else None


def _documents(value: Any) -> list[str]:
    texts = [_document(entry) for entry in value] if isinstance(value, list) else []
    if not texts or None in texts:
        raise ValueError(f'must be a list of texts, or of objects with a "text", got {_shown(value)}')
    return [text for text in texts if text is not None]


def _one_or_many(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else _documents(value)


def _shown(value: Any) -> str:
    return "an empty list" if value == [] else show(value)


_OTHER_FIELDS: Neutral = {
    "activation": (),
    "max_chunks_per_doc": (),
    "mm_processor_kwargs": (),
    "priority": (0,),
    "rank_fields": (),
    "request_id": (),
    "softmax": (),
    "use_activation": (True,),
}


class RankingRequest(ModelRequest):
    """What requests for scores have in common."""

    UNSUPPORTED: ClassVar[Neutral] = _OTHER_FIELDS

    instruction: str | None = None
    """What makes a text an answer to the query. Default: that of the model's makers, for a search of the web."""
    truncate_prompt_tokens: Integer | None = Field(None, ge=-1, le=MAX_INTEGER)
    """Tokens that are kept of prompt and text; -1 for as many as the context holds. Default: longer ones are
    refused."""
    max_tokens_per_doc: Integer | None = Field(None, ge=1, le=MAX_INTEGER)
    """Tokens that are kept of each text, as Cohere has it."""
    user: str | None = None


class RerankRequest(RankingRequest):
    """Body of `POST /v1/rerank`."""

    query: Annotated[str, PlainValidator(lambda value: _query(value), json_schema_input_type=str)]
    documents: Annotated[list[str], PlainValidator(_documents, json_schema_input_type=list[str] | list[dict[str, str]])]
    top_n: Integer | None = Field(None, ge=0, le=MAX_INTEGER)
    """How many of the best are returned; 0 for all."""
    return_documents: bool | None = None

    @model_validator(mode="after")
    def _check(self) -> RerankRequest:
        count = len(self.documents)
        if (text := limits().over("max_texts", count, f"has {count} texts")) is not None:
            raise FieldError("documents", f" {text}")
        return self


class ScoreRequest(RankingRequest):
    """Body of `POST /v1/score`: one query for all texts, or one for each. Both names of vLLM's are taken."""

    text_1: Annotated[list[str] | None, PlainValidator(_one_or_many, json_schema_input_type=str | list[str])] = None
    text_2: Annotated[list[str] | None, PlainValidator(_one_or_many, json_schema_input_type=str | list[str])] = None
    queries: Annotated[list[str] | None, PlainValidator(_one_or_many, json_schema_input_type=str | list[str])] = None
    documents: Annotated[list[str] | None, PlainValidator(_one_or_many, json_schema_input_type=str | list[str])] = None
    encoding_format: Literal["float"] | None = None

    @model_validator(mode="after")
    def _check(self) -> ScoreRequest:
        for first, other in (("text_1", "queries"), ("text_2", "documents")):
            if (getattr(self, first) is None) == (getattr(self, other) is None):
                raise FieldError(first, f" or {other} is required, one of the two")
        queries, texts = len(self.all_queries), len(self.all_texts)
        if queries not in (1, texts):
            raise FieldError("text_1", f" has {queries} texts for {texts}: send one for all, or one for each")
        if (text := limits().over("max_texts", texts, f"has {texts} texts")) is not None:
            raise FieldError("documents" if self.text_2 is None else "text_2", f" {text}")
        return self

    @property
    def all_queries(self) -> list[str]:
        return self.text_1 or self.queries or []

    @property
    def all_texts(self) -> list[str]:
        return self.text_2 or self.documents or []


def _query(value: Any) -> str:
    text = _document(value)
    if text is None:
        raise ValueError(f'must be a text, or an object with a "text", got {show(value)}')
    return text


class RankedDocument(msgspec.Struct):
    text: str


class Ranked(msgspec.Struct, kw_only=True):
    index: int
    document: RankedDocument | UnsetType = UNSET
    relevance_score: float


class Ranking(msgspec.Struct, kw_only=True):
    """The best first."""

    id: str
    model: str
    usage: EmbeddingUsage
    results: list[Ranked]


class Score(msgspec.Struct, kw_only=True):
    index: int
    object: Literal["score"] = "score"
    score: float


class ScoreList(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Score]
    usage: EmbeddingUsage


async def rerank(request: Request) -> Response:
    """Texts in the order in which they answer a query."""
    return await respond_vectors(request, RerankRequest, prepare_rerank)


async def score_texts(request: Request) -> Response:
    """How well each text answers its query, from 0 to 1."""
    return await respond_vectors(request, ScoreRequest, prepare_score)


ENDPOINTS = (
    *(Endpoint("POST", path, rerank, RerankRequest, Ranking) for path in ("/v1/rerank", "/rerank", "/v2/rerank")),
    *(Endpoint("POST", path, score_texts, ScoreRequest, ScoreList) for path in ("/v1/score", "/score")),
)


class _Judged:
    """Pairs of a query and a text, tokenized."""

    def __init__(
        self, model: ServedModel, asked: RankingRequest, pairs: Sequence[tuple[str, str]], prefix: str
    ) -> None:
        self.model = model
        self.id = f"{prefix}-{uuid.uuid4().hex}"
        reader, reranker = model.texts, reranker_of(model)
        most = reader.max_tokens if asked.truncate_prompt_tokens == -1 else asked.truncate_prompt_tokens
        self.requests: Sequence[EngineRequest] = [
            reader.request(
                reranker.prompt(query, _kept(model, text, asked.max_tokens_per_doc), asked.instruction, most),
                reranker.pooling,
                f"{self.id}-{index}",
                f"documents[{index}]",
            )
            for index, (query, text) in enumerate(pairs)
        ]

    @property
    def usage(self) -> EmbeddingUsage:
        count = sum(len(request.prompt_token_ids) for request in self.requests)
        return EmbeddingUsage(count, count)


def _kept(model: ServedModel, text: str, most: int | None) -> str:
    if most is None or len(text) <= most:
        return text
    ids = model.tokenizer.encode_plain(text)
    return text if len(ids) <= most else model.tokenizer.decode(ids[:most], skip_special_tokens=False)


class RerankWriter(_Judged):
    def __init__(self, model: ServedModel, asked: RerankRequest) -> None:
        super().__init__(model, asked, [(asked.query, text) for text in asked.documents], "rerank")
        self._documents = asked.documents if asked.return_documents is not False else None
        self._top_n = asked.top_n or len(asked.documents)

    def whole(self, vectors: Sequence[bytes]) -> Ranking:
        scores = [score(numbers(vector)) for vector in vectors]
        best = sorted(range(len(scores)), key=lambda index: (-scores[index], index))[: self._top_n]
        results = [
            Ranked(
                index=index,
                document=UNSET if self._documents is None else RankedDocument(self._documents[index]),
                relevance_score=scores[index],
            )
            for index in best
        ]
        return Ranking(id=self.id, model=self.model.name, usage=self.usage, results=results)


class ScoreWriter(_Judged):
    def __init__(self, model: ServedModel, asked: ScoreRequest) -> None:
        queries, texts = asked.all_queries, asked.all_texts
        queries = queries * len(texts) if len(queries) == 1 else queries
        super().__init__(model, asked, list(zip(queries, texts, strict=True)), "score")

    def whole(self, vectors: Sequence[bytes]) -> ScoreList:
        data = [Score(index=index, score=score(numbers(vector))) for index, vector in enumerate(vectors)]
        return ScoreList(id=self.id, created=int(time.time()), model=self.model.name, data=data, usage=self.usage)


def reranker_of(model: ServedModel) -> Reranker:
    """Raises `RequestError` for a model that was not made to judge texts."""
    reranker = model.text.reranker
    if reranker is None:
        raise RequestError(
            f"The model {model.name!r} is no reranker that ingle knows: it runs Qwen3-Reranker, which it tells by the "
            "model's card, or by --rerank-template qwen3.",
            code="model_not_supported",
        )
    return reranker


def prepare_rerank(model: ServedModel, asked: RerankRequest) -> RerankWriter:
    """Tokenizes. Raises `RequestError`."""
    return RerankWriter(model, asked)


def prepare_score(model: ServedModel, asked: ScoreRequest) -> ScoreWriter:
    """Tokenizes. Raises `RequestError`."""
    return ScoreWriter(model, asked)
