"""Log probabilities in the three shapes that clients know: chat, completions, and vLLM's `prompt_logprobs`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

from ingle.request import TokenLogprobs
from ingle.server.openai.responses import (
    ChatLogprobs,
    ChatTokenLogprob,
    CompletionLogprobs,
    PromptLogprobs,
    RankedToken,
    TopLogprob,
)

if TYPE_CHECKING:
    from ingle.text.tokenizer import Tokenizer

TokenName = Callable[[int], str]
"""How a token is named: by its text, or as `token_id:5`."""


def token_name(tokenizer: Tokenizer, as_ids: bool | None) -> TokenName:
    return "token_id:{}".format if as_ids else tokenizer.token


_LOWEST = -9999.0
"""Stands for minus infinity, which JSON cannot say; vLLM's number."""


def chat_logprobs(
    tokenizer: Tokenizer, entries: Iterable[TokenLogprobs], name: TokenName | None = None
) -> ChatLogprobs:
    return ChatLogprobs([_chat_token(tokenizer, entry, name or tokenizer.token) for entry in entries])


class ScoredToken(NamedTuple):
    token_id: int
    start: int
    """Where in the returned text it begins, in characters."""
    entry: TokenLogprobs | None
    """None where the model predicts nothing, as at a prompt's first token."""


def completion_logprobs(name: TokenName, tokens: Iterable[ScoredToken]) -> CompletionLogprobs:
    """Log probabilities as parallel lists."""
    written = CompletionLogprobs([], [], [], [])
    for token_id, start, entry in tokens:
        written.tokens.append(name(token_id))
        written.text_offset.append(start)
        if entry is None:
            written.token_logprobs.append(None)
            written.top_logprobs.append(None)
            continue
        top: dict[str, float] = {}
        for candidate_id, logprob in zip(entry.token_ids, entry.logprobs, strict=True):
            # Tokens may share a text: the chosen one, and then the likelier one, keeps it.
            top.setdefault(name(candidate_id), _finite(logprob))
        written.token_logprobs.append(_finite(entry.logprobs[0]))
        written.top_logprobs.append(top)
    return written


def prompt_logprobs(tokenizer: Tokenizer, entries: Iterable[TokenLogprobs | None]) -> PromptLogprobs:
    return [None if entry is None else _ranked(tokenizer, entry) for entry in entries]


def _chat_token(tokenizer: Tokenizer, entry: TokenLogprobs, name: TokenName) -> ChatTokenLogprob:
    chosen, *top = (
        TopLogprob(name(token_id), _finite(logprob), list(tokenizer.token_bytes(token_id)))
        for token_id, logprob in zip(entry.token_ids, entry.logprobs, strict=True)
    )
    return ChatTokenLogprob(chosen.token, chosen.logprob, chosen.bytes, top)


def _ranked(tokenizer: Tokenizer, entry: TokenLogprobs) -> dict[str, RankedToken]:
    # The most likely tokens come in falling order after the chosen one, so that their place is their rank.
    ranks = (entry.rank, *range(1, len(entry.token_ids)))
    return {
        str(token_id): RankedToken(_finite(logprob), rank, tokenizer.token(token_id))
        for token_id, logprob, rank in zip(entry.token_ids, entry.logprobs, ranks, strict=True)
    }


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST)
