"""`/v1/responses`: answers, and those that are kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from ingle.errors import RequestError
from ingle.request import SamplingParams
from ingle.server.access import client_of
from ingle.server.answer_format import bound_params
from ingle.server.body import UnknownFields, show
from ingle.server.endpoints import Endpoint
from ingle.server.generation import Generation
from ingle.server.models import ServedModel
from ingle.server.respond import respond, respond_at_once
from ingle.server.responses import answers
from ingle.server.responses.items import conversation_of, resolved
from ingle.server.responses.protocol import (
    AnyItem,
    InputTokensRequest,
    MessageItem,
    ResponsesInput,
    ResponsesRequest,
    read_items,
)
from ingle.server.responses.store import OwnedResponses
from ingle.server.responses.tools import Tools, read_tools
from ingle.server.responses.writer import Kept, ResponseWriter
from ingle.server.turn import Params, Turn, plan_turn, thinking_kwargs, turn_prompt

_PARAMS = Params(messages="input")
_MAX_LISTED = 100
_ONE = "/v1/responses/{response_id}"


async def create_response(request: Request) -> Response:
    """OpenAI's Responses API."""
    skipped, store = UnknownFields.of(request), _store(request)
    return await respond(request, ResponsesRequest, lambda model, body: prepare_response(model, body, store, skipped))


async def count_input_tokens(request: Request) -> Response:
    """What the prompt of such a response would take."""
    skipped, store = UnknownFields.of(request), _store(request)

    def counted(model: ServedModel, body: InputTokensRequest) -> answers.InputTokens:
        items, tools = _all_items(body, store), read_tools(body.tools or (), body.tool_choice)
        turn = _turn(body, items, tools, SamplingParams(max_tokens=None), skipped)
        return answers.InputTokens(len(model.tokenizer.encode(turn_prompt(model, turn), add_special_tokens=False)))

    return await respond_at_once(request, InputTokensRequest, counted)


async def retrieve_response(request: Request) -> Response:
    """A response that is kept."""
    if request.query_params.get("stream", "false") not in ("false", "0", ""):
        raise RequestError(
            "A response that is kept comes whole: leave stream out.", param="stream", code="unsupported_argument"
        )
    return Response(_store(request).get(_id(request)).response, media_type="application/json")


async def delete_response(request: Request) -> Response:
    """Forgets a response that is kept."""
    _store(request).delete(_id(request))
    return _json(answers.Deleted(_id(request)))


async def cancel_response(request: Request) -> Response:
    """Only responses in the background can be cancelled, and there are none: others end with their connection."""
    _store(request).get(_id(request))
    raise RequestError(
        "Only a response in the background can be cancelled; one that streams ends with its connection.",
        param="response_id",
        code="not_in_background",
    )


async def compact_response(request: Request) -> Response:
    """Conversations are not compacted here: clients do that themselves."""
    raise RequestError("This server does not compact conversations.", code="not_found", status=404)


async def list_input_items(request: Request) -> Response:
    """What a response that is kept answers, the newest first."""
    items = _store(request).get(_id(request)).input_items()
    order = request.query_params.get("order", "desc")
    if order not in ("asc", "desc"):
        raise RequestError(f"order must be asc or desc, got {show(order)}", param="order")
    limit = request.query_params.get("limit", "20")
    if not (limit.isascii() and limit.isdecimal() and 1 <= int(limit[:9]) <= _MAX_LISTED):
        raise RequestError(f"limit must be a number from 1 to {_MAX_LISTED}, got {show(limit)}", param="limit")
    if order == "desc":
        items.reverse()
    after = request.query_params.get("after")
    if after is not None:
        ids = [item.get("id") for item in items]
        if after not in ids:
            raise RequestError(f"after is {show(after)}, which is no item of this response", param="after")
        items = items[ids.index(after) + 1 :]
    shown = items[: int(limit)]
    first, last = (shown[0]["id"], shown[-1]["id"]) if shown else (None, None)
    return _json(answers.ItemList(shown, first, last, len(items) > len(shown)))


ENDPOINTS = (
    Endpoint(
        "POST",
        "/v1/responses",
        create_response,
        ResponsesRequest,
        answers=answers.Response,
        chunks=answers.StreamEvent,
    ),
    Endpoint("POST", "/v1/responses/input_tokens", count_input_tokens, InputTokensRequest, answers=answers.InputTokens),
    Endpoint("POST", "/v1/responses/compact", compact_response, answers=answers.Response, statuses=(404,)),
    Endpoint("GET", _ONE, retrieve_response, answers=answers.Response, statuses=(400, 404)),
    Endpoint("DELETE", _ONE, delete_response, answers=answers.Deleted, statuses=(404,)),
    Endpoint("POST", f"{_ONE}/cancel", cancel_response, answers=answers.Response, statuses=(400, 404)),
    Endpoint("GET", f"{_ONE}/input_items", list_input_items, answers=answers.ItemList, statuses=(400, 404)),
)


def prepare_response(
    model: ServedModel, body: ResponsesRequest, store: OwnedResponses, skipped: UnknownFields
) -> ResponseWriter:
    """Renders and tokenizes. Raises `RequestError`."""
    items, tools = _all_items(body, store), read_tools(body.tools or (), body.tool_choice)
    sampling = bound_params(body.format, "text.format", {**model.default_sampling, **body.sampling})

    def planned(of: Sequence[AnyItem]) -> Generation:
        return plan_turn(model, _turn(body, of, tools, sampling, skipped))

    generation = planned_within(items, planned) if body.truncation == "auto" else planned(items)
    kept = None
    if body.store is not False and store.keeps:
        kept = Kept(store.put, msgspec.json.encode([_dumped(item, f"{generation.id}-{at}") for at, item in
                                                    enumerate(items)]))  # fmt: skip
    return ResponseWriter(body, tools, generation, kept)


def planned_within(items: Sequence[AnyItem], planned: Callable[[Sequence[AnyItem]], Generation]) -> Generation:
    """What fits of a conversation: the oldest questions, and what followed them, are dropped until it does.

    What the system said at its head stays.
    """
    try:
        return planned(items)
    except RequestError as error:
        if error.code != "context_length_exceeded":
            raise
        questions = [at for at, item in enumerate(items) if isinstance(item, MessageItem) and item.role == "user"]
        head = items[: questions[0]] if questions else ()
        low, high = 1, len(questions) - 1
        fitting: Generation | None = None
        while low <= high:  # the fewest to drop
            middle = (low + high) // 2
            try:
                fitting = planned([*head, *items[questions[middle] :]])
                high = middle - 1
            except RequestError as again:
                if again.code != "context_length_exceeded":
                    raise
                low = middle + 1
        if fitting is None:
            raise
        return fitting


def _turn(
    body: ResponsesInput, items: Sequence[AnyItem], tools: Tools, sampling: SamplingParams, skipped: UnknownFields
) -> Turn:
    conversation = conversation_of(body.instructions, items)
    skipped.skip([*conversation.skipped, *tools.skipped])
    continues = conversation.ends_with_answer()
    return Turn(
        prefix="resp",
        messages=conversation.messages,
        sampling=sampling,
        tools=tools.functions,
        tool_choice=tools.choice,
        tool_name=tools.chosen,
        parallel_tool_calls=body.parallel_tool_calls is not False,
        template_kwargs=thinking_kwargs(body.effort) | (body.chat_template_kwargs or {}),
        continue_final_message=continues,
        params=_PARAMS,
    )


def _all_items(body: ResponsesInput, store: OwnedResponses) -> list[AnyItem]:
    """With what the response before it answered, and that response, and with what the input refers to."""
    before: list[AnyItem] = []
    if body.previous_response_id is not None:
        previous = store.get(body.previous_response_id, "previous_response_id")
        before = read_items([*previous.input_items(), *previous.output_items()])
    known = {item.id: item for item in before if item.id is not None}

    def find(item_id: str) -> AnyItem:
        """An item's id says which response has it."""
        if item_id not in known:
            response_id = f"resp_{item_id.partition('_')[2][:-4]}"
            found: list[AnyItem] = read_items(store.get(response_id, "input").output_items())
            known.update((item.id, item) for item in found if item.id is not None)
        if item_id not in known:
            raise RequestError(f"The item {item_id!r:.100} does not exist here.", param="input", status=404)
        return known[item_id]

    return [*before, *resolved(body.input, find)]


def _dumped(item: AnyItem, item_id: str) -> dict[str, Any]:
    """As it is kept, with an id, and texts as parts."""
    dumped = {"id": item_id, **item.model_dump(exclude_none=True, warnings=False)}
    if isinstance(item, MessageItem):
        dumped.setdefault("status", "completed")
        if isinstance(item.content, str):
            kind = "output_text" if item.role == "assistant" else "input_text"
            dumped["content"] = [{"type": kind, "text": item.content}]
    return dumped


def _store(request: Request) -> OwnedResponses:
    return OwnedResponses(request.app.state.responses, client_of(request.scope).owner)


def _id(request: Request) -> str:
    response_id: str = request.path_params["response_id"]
    return response_id


def _json(body: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(body), media_type="application/json")
