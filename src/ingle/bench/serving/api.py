"""What is sent to an OpenAI-compatible server, and what it is asked before."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from ingle.bench.serving.answer import Body, RequestFailed, Stream
from ingle.bench.serving.connection import AnswerBroken, Client
from ingle.bench.serving.data import Message, Session
from ingle.bench.serving.figures import Exchange
from ingle.errors import EngineError, IngleError

CUT_SHORT = "cut short"
"""The error of a request that was under way when all was stopped."""
_MAX_NAME, _MAX_CARD_BYTES = 500, 1 << 14
CHAT, COMPLETIONS = "chat/completions", "completions"


@dataclass(frozen=True)
class Dialect:
    """How this server is asked."""

    model: str
    endpoint: str
    fields: Mapping[str, Any]
    """Of each request, beside what it says."""
    ignores_eos: bool = False
    include_usage: bool = True
    limit: str = "max_tokens"
    """The field for the answer's length; OpenAI's own servers call it otherwise in chats."""

    def body(self, history: Sequence[Message], max_tokens: int) -> bytes:
        fields: dict[str, Any] = {"model": self.model, "stream": True, self.limit: max_tokens}
        if self.include_usage:
            fields["stream_options"] = {"include_usage": True}
        if self.ignores_eos:
            fields["ignore_eos"] = True
        if self.endpoint == CHAT:
            fields["messages"] = history
        else:
            fields["prompt"] = "\n".join(_text_of(message) for message in history)
        return msgspec.json.encode({**fields, **self.fields})


def _text_of(message: Message) -> str:
    content = message["content"]
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content if isinstance(part, Mapping))
    return str(content)


async def answer(
    client: Client, dialect: Dialect, history: Sequence[Message], exchange: Exchange, *, keep_text: bool
) -> str:
    """Asks, and notes in `exchange` what came and when, errors too. Returns the text, if it is kept.

    Raises `ServerGone` where nobody listens any more.
    """
    body = dialect.body(history, exchange.max_tokens)
    stream = Stream(keep_text=keep_text)
    exchange.sent_s, exchange.event_s = stream.sent_s, stream.event_s
    try:
        await client.ask("POST", client.address.path(dialect.endpoint), body, stream)
        stream.check()
        exchange.ended_s = stream.last_s or time.perf_counter()
    except (AnswerBroken, RequestFailed, TimeoutError) as error:
        exchange.error, exchange.ended_s = str(error), time.perf_counter()
    except BaseException:
        exchange.error, exchange.ended_s = CUT_SHORT, time.perf_counter()
        raise
    finally:
        exchange.prompt_tokens, exchange.cached_tokens = stream.prompt_tokens, stream.cached_tokens
        exchange.usage_tokens = stream.completion_tokens
    return "".join(stream.text or ())


async def get(client: Client, path: str) -> Body:
    body = Body()
    await client.ask("GET", path, b"", body)
    return body


class Server:
    """What a server says of itself."""

    def __init__(self, card: Mapping[str, Any], software: str, version: str | None) -> None:
        self.card = card
        self.software, self.version = software, version

    @property
    def model(self) -> str:
        return str(self.card["id"])

    @property
    def max_model_len(self) -> int | None:
        found = self.card.get("max_model_len")
        return found if isinstance(found, int) else None


async def meet(client: Client, model: str | None) -> Server:
    """The model's card, and the server's name and version. Raises `EngineError`."""
    body = await _asked(client, client.address.path("models"))
    try:
        listed = body.json()
        cards = [card for card in listed["data"] if isinstance(card["id"], str) and len(card["id"]) <= _MAX_NAME]
    except RequestFailed as error:
        key = "; --api-key is for keys" if error.status in (401, 403) else ""
        if model is None or key:
            raise EngineError(f"{client.address} lists no models: {error}{key}") from None
        cards = []
    except (LookupError, TypeError):
        cards = []
    names = [card["id"] for card in cards]
    if model is None and not cards:
        raise EngineError(f"{client.address} lists no models: say which by --model")
    card = next((card for card in cards if model in (None, card["id"])), None)
    if card is None and model is not None and names and model not in names:
        card = {"id": model}  # a name that is not listed may do: the first request says
    if card is not None and len(msgspec.json.encode(card)) > _MAX_CARD_BYTES:  # which goes into the file
        card = {key: card[key] for key in ("id", "max_model_len") if key in card}
    card = card or {"id": model}
    software, version = await _version(client)
    return Server(card, software or str(card.get("owned_by") or _header(body, b"server") or "")[:100], version)


async def _asked(client: Client, path: str) -> Body:
    try:
        return await get(client, path)
    except (AnswerBroken, TimeoutError) as error:
        raise EngineError(f"{client.address}{path}: {error}") from None


async def _version(client: Client) -> tuple[str, str | None]:
    """The software's name, where the address says it, and its version. ingle and vLLM give theirs at the first."""
    places = (("", "/version", "version"), ("Ollama", "/api/version", "version"), ("llama.cpp", "/props", "build_info"))
    for software, path, field in places:
        try:
            said = (await get(client, client.address.root + path)).json()
            return software, str(said[field])[:100]
        except (RequestFailed, AnswerBroken, LookupError, TypeError, TimeoutError):
            continue
    return "", None


def _header(body: Body, name: bytes) -> str | None:
    found = body.headers.get(name)
    return None if found is None else found.decode("latin-1")[:100]


async def find_dialect(
    client: Client, dialect: Dialect, endpoint: str | None, session: Session
) -> tuple[Dialect, list[str]]:
    """How this server takes a request, by trying one, with what is to be told. Raises `IngleError`.

    Fields that only some servers know are left out where they are refused.
    """
    notices: list[str] = []
    turn = session.turns[0]
    for _ in range(6):
        exchange = Exchange(0, 0, 0.0, turn.max_tokens)
        await answer(client, dialect, turn.messages, exchange, keep_text=False)
        if exchange.error is None:
            return dialect, notices
        simpler, notice = _simpler(dialect, exchange.error, fixed=endpoint is not None)
        if simpler is None:
            raise IngleError(f"{dialect.model} at {client.address} does not answer a first request: {exchange.error}")
        dialect = simpler
        notices.append(notice)
    raise IngleError(f"{dialect.model} at {client.address} refuses every form of a request: {'; '.join(notices)}")


def _simpler(dialect: Dialect, error: str, *, fixed: bool) -> tuple[Dialect | None, str]:
    """What to try after that error."""
    if "max_completion_tokens" in error and dialect.limit == "max_tokens":
        return replace(dialect, limit="max_completion_tokens"), "the server wants max_completion_tokens"
    if "ignore_eos" in error and dialect.ignores_eos:
        return replace(dialect, ignores_eos=False), "the server does not know ignore_eos: answers may be short"
    if ("stream_options" in error or "include_usage" in error) and dialect.include_usage:
        return replace(dialect, include_usage=False), "the server does not know stream_options"
    without_template = "template" in error or error.startswith(("HTTP 404", "HTTP 405", "HTTP 501"))
    if dialect.endpoint == CHAT and not fixed and without_template:
        return replace(dialect, endpoint=COMPLETIONS), f"/v1/completions is measured, as there are no chats: {error}"
    return None, ""
