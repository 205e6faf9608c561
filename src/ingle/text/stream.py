"""From the engine's tokens to the events of one choice."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from typing import TYPE_CHECKING

from ingle.events import Begin, Event, Finish, Progress, Text
from ingle.request import EngineOutput, FinishReason, SamplingParams
from ingle.text.hidden_stops import TokenStops
from ingle.text.stop import StopMatch

if TYPE_CHECKING:
    from ingle.text.tokenizer import Tokenizer


class TextStream:
    """The text of one choice as it grows. When a stop string ends it, the caller aborts the engine's request.

    The text continues that of the prompt `after`, so that both together are what all tokens decode to; without a
    prompt it stands alone.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        sampling: SamplingParams,
        after: Sequence[int] = (),
        choice: int = 0,
        shown: Set[int] = frozenset(),
    ) -> None:
        """`shown` are special tokens that the text holds though it has no others."""
        self._sampling = sampling
        self._detokenizer = tokenizer.detokenizer(sampling.skip_special_tokens, after, shown)
        self._skipped = tokenizer.special_token_ids - shown if sampling.skip_special_tokens else frozenset()
        self._stops = TokenStops(sampling.stop, tokenizer)
        self._choice = choice
        self._begun = False
        self._num_chars = 0
        self._starts: list[int] = []
        """Of the tokens of the output at hand."""
        self.num_tokens = 0
        self.finish_reason: FinishReason | None = None

    def push(self, output: EngineOutput) -> list[Event]:
        """What the engine's next output of this request brings; nothing after the end of the text."""
        if self.finish_reason is not None:
            return []
        if output.num_prompt_read is not None:
            return [Progress(self._choice, output.num_prompt_read, output.num_cached_tokens)]
        texts: list[str] = []
        self._starts = []
        hidden = output.token_ids[-1:] if self._hides_last_token(output) else []
        for count, token_id in enumerate(output.token_ids[: len(output.token_ids) - len(hidden)], start=1):
            self.num_tokens += 1
            self._note_start()
            unseen = (token_id,) if token_id in self._skipped else ()
            if stop := self._take(self._detokenizer.push(token_id), texts, unseen):
                return self._events(output, texts, count, "stop", stop)
        for _ in hidden:
            self.num_tokens += 1
            self._note_start()
        if output.finish_reason in ("stop", "length") and (
            stop := self._take(self._detokenizer.flush(), texts, hidden)
        ):
            return self._events(output, texts, len(output.token_ids), "stop", stop)
        if output.finish_reason is not None:
            texts.append(self._stops.flush())
        return self._events(output, texts, len(output.token_ids), output.finish_reason, output.stop_token_id)

    def _note_start(self) -> None:
        if self._sampling.logprobs is not None:
            self._starts.append(self._num_chars + self._detokenizer.num_held)

    def _hides_last_token(self, output: EngineOutput) -> bool:
        """Whether the token that ended the text is kept out of it."""
        if output.finish_reason != "stop" or output.complete:
            return False
        if output.stop_token_id is not None:
            return not self._sampling.include_stop_str_in_output
        return self._sampling.skip_special_tokens

    def _take(self, piece: str, texts: list[str], hidden: Iterable[int]) -> str | None:
        """Add to `texts` what is safe to give out, and return the stop string that `piece` completes, if any.

        `hidden` are tokens after the piece that the text does not show.
        """
        self._num_chars += len(piece)
        safe = self._stops.push(piece, hidden, armed=self.num_tokens >= self._sampling.min_tokens)
        if not isinstance(safe, StopMatch):
            texts.append(safe)
            return None
        texts.append(safe.text)
        if self._sampling.include_stop_str_in_output:
            texts.append(safe.string)
        return safe.string

    def _events(
        self,
        output: EngineOutput,
        texts: list[str],
        num_tokens: int,
        finish_reason: FinishReason | None,
        stop: int | str | None,
    ) -> list[Event]:
        events: list[Event] = []
        if not self._begun:
            self._begun = True
            events.append(Begin(self._choice, output.num_cached_tokens, output.prompt_logprobs))
        text, token_ids = "".join(texts), output.token_ids[:num_tokens]
        if text or token_ids:
            logprobs = output.logprobs[:num_tokens] if output.logprobs is not None else None
            events.append(Text(self._choice, text, token_ids, logprobs, self._starts[:num_tokens]))
        if finish_reason is not None:
            self.finish_reason = finish_reason
            events.append(Finish(self._choice, finish_reason, stop))
        return events
