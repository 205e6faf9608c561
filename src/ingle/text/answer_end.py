"""Where an answer ends, as the model's chat template shows it: what follows the words of an assistant."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ingle.errors import RequestError, printable
from ingle.text.chat_template import ChatTemplate

log = logging.getLogger(__name__)

_LEAST_STOP_CHARS = 4
"""Fewer might stand in any answer."""

_QUESTION, _ANSWER, _NEXT_QUESTION = "a question", "what the assistant said", "another question"


_CALL, _CHANNEL = "<|call|>", "<|channel|>"


@dataclass(frozen=True)
class AnswerEnd:
    tokens: tuple[str, ...] = ()
    """Any of these ends an answer. Tokens, since nobody can wait for the text of one that is left out of it."""
    stops: tuple[str, ...] = ()
    """Text that ends it, where the template has no token in that place."""


def answer_end(source: str, special_tokens: Mapping[str, str], tokens: Collection[str]) -> AnswerEnd:
    """Of a chat template; `tokens` are those that a text may spell out.

    The end is the token that the template writes right after an answer. Where it writes none before the next turn
    begins, it is what leads to the next question: the text up to the first token there, and that token.
    """
    template, find = ChatTemplate(source, special_tokens), _finder(tokens)
    turns = [_turn("user", _QUESTION), _turn("assistant", _ANSWER)]
    at_once: tuple[str, ...] = ()
    try:
        closed = _render(template, turns, False)
        before, token = find(_after_answer(closed))
        if token is not None and not before.strip():
            at_once = (token,)
        # A template that always asks for one more answer shows the beginning of that here, not an end.
        if at_once and closed != _render(template, turns, True):
            return AnswerEnd(at_once)
        asked = _render(template, [*turns, _turn("user", _NEXT_QUESTION)], False)
    except RequestError as error:
        if not at_once:
            log.warning("the chat template does not render a question and an answer: %s", printable(str(error)))
        return AnswerEnd(at_once)
    between, found, _ = _after_answer(asked).partition(_NEXT_QUESTION)
    if not found:
        return AnswerEnd(at_once)
    before, token = find(between)
    stop = before.rstrip()
    return AnswerEnd((token,) if token is not None else (), (stop,) if len(stop.strip()) >= _LEAST_STOP_CHARS else ())


def call_ends(source: str, tokens: Collection[str]) -> tuple[str, ...]:
    """What ends an answer that calls a tool where that is another token: in OpenAI's Harmony, whose GGUF files do not
    name it."""
    return (_CALL,) if _CHANNEL in source and _CALL in tokens else ()


def _render(template: ChatTemplate, turns: list[dict[str, Any]], add_generation_prompt: bool) -> str:
    """As a request would be; a template that leaves out some of it may still show where answers end."""
    try:
        return template.prompt(turns, add_generation_prompt=add_generation_prompt)
    except RequestError as error:
        if error.code != "message_not_rendered":
            raise
        return template.render(turns, add_generation_prompt=add_generation_prompt)


def _turn(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def _after_answer(rendered: str) -> str:
    """Empty where the answer is not in the text."""
    _, found, tail = rendered.rpartition(_ANSWER)
    return tail if found else ""


def _finder(tokens: Collection[str]) -> Callable[[str], tuple[str, str | None]]:
    """Gives the text before the first token in a text, and that token; of several that begin there, the longest."""
    spelled = sorted((token for token in tokens if token.strip()), key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, spelled)) or r"(?!)")

    def find(text: str) -> tuple[str, str | None]:
        match = pattern.search(text)
        return (text, None) if match is None else (text[: match.start()], match[0])

    return find
