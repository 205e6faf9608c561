"""What a retired step means for a sequence: its new tokens, and whether it ends with them."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import msgspec

from ingle.engine.sequence import Sequence
from ingle.request import EngineOutput, FinishReason, TokenLogprobs


def take_tokens(seq: Sequence, token_ids: Seq[int], finite: bool, logprobs: list[TokenLogprobs] | None) -> EngineOutput:
    """What was drawn, up to the end of the answer."""
    if not finite:
        return _not_finite(seq, "logits")
    cached = seq.num_cached_tokens or 0
    if len(seq.token_ids) >= seq.max_num_tokens:  # no token was asked for: the prompt was only scored
        return EngineOutput(seq.id, [], "length", num_cached_tokens=cached, prompt_logprobs=_of_prompt(seq))
    seq.pages.given_back.clear()  # NaN in them would have reached this token
    first = seq.num_generated == 0
    taken, reason, stop_token_id = _append(seq, token_ids)
    return EngineOutput(
        seq.id,
        taken,
        reason,
        stop_token_id,
        cached,
        None if logprobs is None else logprobs[: len(taken)],
        _of_prompt(seq) if first else None,
    )


def take_told(seq: Sequence, output: EngineOutput, token_ids: Seq[int]) -> EngineOutput:
    """What a retired step brought, and the tokens that have to follow, which nobody draws."""
    taken, reason, stop_token_id = _append(seq, token_ids)
    seq.num_untold += len(taken)
    return msgspec.structs.replace(
        output, token_ids=[*output.token_ids, *taken], finish_reason=reason, stop_token_id=stop_token_id
    )


def take_pooled(seq: Sequence, vector: bytes | None) -> EngineOutput:
    if vector is None:
        return _not_finite(seq, "hidden states")
    return EngineOutput(seq.id, [], "stop", num_cached_tokens=seq.num_cached_tokens or 0, pooled=vector)


def take_prompt_logprobs(seq: Sequence, start: int, entries: Seq[TokenLogprobs]) -> None:
    """Those that a chunk brings which begins at `start`."""
    if seq.prompt_logprobs is None:
        seq.prompt_logprobs = [None]  # nothing predicts the first token
    num_known = len(seq.prompt_logprobs) - (start + 1)  # more than 0 after a preemption
    seq.prompt_logprobs.extend(entries[num_known : seq.num_prompt_tokens - (start + 1)])


def progress(seq: Sequence, num_read: int) -> EngineOutput:
    cached = seq.num_cached_tokens or 0
    return EngineOutput(seq.id, [], num_cached_tokens=cached, num_prompt_read=min(num_read, seq.num_prompt_tokens))


def _append(seq: Sequence, token_ids: Seq[int]) -> tuple[list[int], FinishReason | None, int | None]:
    """Takes tokens up to the end of the answer. Returns them, with what ended it."""
    taken: list[int] = []
    for token_id in token_ids:
        seq.token_ids.append(token_id)
        taken.append(token_id)
        reason, stop_token_id = _finish_reason(seq, token_id)
        if reason is not None:
            return taken, reason, stop_token_id
    return taken, None, None


def _finish_reason(seq: Sequence, token_id: int) -> tuple[FinishReason | None, int | None]:
    if token_id in seq.eos_token_ids:
        return "stop", None
    if token_id in seq.sampling.stop_token_ids:
        return "stop", token_id
    return ("length" if len(seq.token_ids) >= seq.max_num_tokens else None), None


def _not_finite(seq: Sequence, what: str) -> EngineOutput:
    seq.tainted = True
    text = f"the model computed NaN or infinite {what} for this request; try --dtype float32"
    return EngineOutput(seq.id, [], "error", error=text)


def _of_prompt(seq: Sequence) -> list[TokenLogprobs | None] | None:
    return None if seq.sampling.prompt_logprobs is None else seq.prompt_logprobs or [None]
