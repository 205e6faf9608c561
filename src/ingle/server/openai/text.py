"""`POST /tokenize` and `/detokenize`, as vLLM has them, and `…/render`: what a request becomes, without an answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import msgspec
from pydantic import PlainValidator
from starlette.requests import Request
from starlette.responses import Response

from ingle.request import Sampling, TokenIds, vocabulary_ids
from ingle.server.body import ModelRequest
from ingle.server.endpoints import Endpoint
from ingle.server.models import ModelPool, ServedModel
from ingle.server.openai.chat import chat_turn, prepare_chat
from ingle.server.openai.completions import prepare_completion
from ingle.server.openai.protocol import ChatCompletionRequest, CompletionRequest, TokenId, read_token_ids
from ingle.server.respond import Writer, respond_at_once
from ingle.server.turn import turn_prompt


class TokenizeTextRequest(ModelRequest):
    """Body of `POST /tokenize` with a text."""

    prompt: str
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class TokenizeChatRequest(ChatCompletionRequest):
    """Body of `POST /tokenize` with a conversation: a request for a chat as it is sent."""

    return_token_strs: bool | None = None


TokenizeRequest = TokenizeTextRequest | TokenizeChatRequest


def _kind_to_tokenize(fields: Mapping[str, Any]) -> type[TokenizeRequest]:
    return TokenizeChatRequest if fields.get("messages") is not None else TokenizeTextRequest


class DetokenizeRequest(ModelRequest):
    """Body of `POST /detokenize`."""

    tokens: Annotated[tuple[int, ...], PlainValidator(read_token_ids, json_schema_input_type=list[TokenId])]


class Tokenized(msgspec.Struct, kw_only=True):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None
    """As the vocabulary spells them, if asked for."""


class Detokenized(msgspec.Struct):
    prompt: str


class TokenizerInfo(msgspec.Struct, kw_only=True):
    """What lm-eval and others ask before they let the server count tokens."""

    tokenizer_class: str
    model_max_length: int
    chat_template: str | None
    eos_token: str | None
    bos_token: str | None
    pad_token: str | None
    unk_token: str | None


class RenderedPrompt(msgspec.Struct, kw_only=True):
    prompt: str
    """The text, special tokens included."""
    prompt_token_ids: list[int]
    count: int


class Rendered(msgspec.Struct, kw_only=True):
    """What the engine would be asked."""

    model: str
    max_model_len: int
    prompts: list[RenderedPrompt]
    sampling: dict[str, Any]
    """All sampling parameters, defaults included; without a seed each answer gets one of its own."""
    stop: list[str]
    eos_token_ids: list[int]


def tokenize(model: ServedModel, asked: TokenizeRequest) -> Tokenized:
    """Raises `RequestError` for a text that is no Unicode, or that no context could hold."""
    if isinstance(asked, TokenizeTextRequest):
        text, special = asked.prompt, asked.add_special_tokens is not False
        model.prompts.check_num_chars(len(text), "prompt")
    else:
        text, special = turn_prompt(model, chat_turn(model, asked)), bool(asked.add_special_tokens)
    ids = model.tokenizer.encode(text, add_special_tokens=special)
    spelled = [model.tokenizer.spelling(token_id) for token_id in ids] if asked.return_token_strs else None
    return Tokenized(count=len(ids), max_model_len=model.info.max_model_len, tokens=ids, token_strs=spelled)


def detokenize(model: ServedModel, asked: DetokenizeRequest) -> Detokenized:
    """Raises `RequestError` for ids that the model does not have."""
    ids = vocabulary_ids(asked.tokens, model.info.vocab_size, "tokens")
    return Detokenized(model.tokenizer.decode(ids, skip_special_tokens=False))


def render_chat(model: ServedModel, chat: ChatCompletionRequest) -> Rendered:
    writer = prepare_chat(model, chat)
    as_rendered = not (chat.truncate_prompt_tokens or chat.add_special_tokens)
    return _rendered(model, writer, [turn_prompt(model, chat_turn(model, chat)) if as_rendered else None])


def render_completion(model: ServedModel, completion: CompletionRequest) -> Rendered:
    plain = [prompt if isinstance(prompt, str) else None for prompt in completion.prompt]
    as_sent = not (completion.suffix or completion.truncate_prompt_tokens or completion.add_special_tokens is not False)
    return _rendered(model, prepare_completion(model, completion), plain if as_sent else [None] * len(plain))


def _rendered(model: ServedModel, writer: Writer, texts: Sequence[str | None]) -> Rendered:
    generation = writer.generation
    params, request = generation.prompts[0].params, generation.requests[0]

    def text_of(ids: TokenIds) -> str:
        return model.tokenizer.decode(ids, skip_special_tokens=False)

    prompts = [
        RenderedPrompt(
            prompt=text_of(prompt.token_ids) if text is None else text,
            prompt_token_ids=list(prompt.token_ids),
            count=len(prompt.token_ids),
        )
        for prompt, text in zip(generation.prompts, texts, strict=True)
    ]
    return Rendered(
        model=model.name,
        max_model_len=model.info.max_model_len,
        prompts=prompts,
        sampling={"n": params.n, **{name: getattr(request.sampling, name) for name in Sampling.__struct_fields__}},
        stop=list(params.stop),
        eos_token_ids=list(request.eos_token_ids),
    )


async def respond_tokenize(request: Request) -> Response:
    """The tokens of a text, or of the prompt that a conversation becomes."""
    return await respond_at_once(request, _kind_to_tokenize, tokenize)


async def respond_detokenize(request: Request) -> Response:
    """The text of tokens, special ones included."""
    return await respond_at_once(request, DetokenizeRequest, detokenize)


async def respond_tokenizer_info(request: Request) -> Response:
    """The chat template and the special tokens of the first model, or of the one that `?model=` names."""
    model = ModelPool.of(request).get(request.query_params.get("model"))
    special = model.tokenizer.special_tokens
    info = TokenizerInfo(
        tokenizer_class="PreTrainedTokenizerFast",
        model_max_length=model.info.max_model_len,
        chat_template=model.tokenizer.chat_template,
        eos_token=special.get("eos_token"),
        bos_token=special.get("bos_token"),
        pad_token=special.get("pad_token"),
        unk_token=special.get("unk_token"),
    )
    return Response(msgspec.json.encode(info), media_type="application/json")


async def respond_render_chat(request: Request) -> Response:
    """The prompt, its tokens and the sampling parameters that a request for a chat becomes."""
    return await respond_at_once(request, ChatCompletionRequest, render_chat)


async def respond_render_completion(request: Request) -> Response:
    """The prompts, their tokens and the sampling parameters that a request for completions becomes."""
    return await respond_at_once(request, CompletionRequest, render_completion)


_MODEL: Mapping[str, Any] = {"model": {"type": "string"}}

ENDPOINTS = (
    Endpoint("POST", "/tokenize", respond_tokenize, (TokenizeTextRequest, TokenizeChatRequest), Tokenized),
    Endpoint("POST", "/detokenize", respond_detokenize, DetokenizeRequest, Detokenized),
    Endpoint("GET", "/tokenizer_info", respond_tokenizer_info, answers=TokenizerInfo, query=_MODEL, statuses=(404,)),
    Endpoint("POST", "/v1/chat/completions/render", respond_render_chat, ChatCompletionRequest, Rendered),
    Endpoint("POST", "/v1/completions/render", respond_render_completion, CompletionRequest, Rendered),
)
