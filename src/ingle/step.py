"""A step of the engine as messages: what a device is told of it and what it answers. Plain values that cross processes.

A device knows slots and pages, not requests: whoever plans keeps which sequence has which slot.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from ingle.request import Pooling, Sampling, TokenIds, TokenLogprobs

RESERVED_PAGE = 0
"""Padding rows of a batch read and write here; it never belongs to a sequence."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How much one step and one sequence may take."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    page_size: int
    enable_prefix_caching: bool = True
    windows: tuple[int | None, ...] = (None,)
    """Of each group of layers whose pages are apart: how many tokens they look back; None for all (`ingle.kv`)."""
    target_itl_s: float | None = None
    """About how long a step may take in which somebody gets a token; None for any time."""
    least_portion: int = 512
    """Tokens for which a device is fast enough: a step that reads prompts is not made smaller for its time's sake."""
    num_turns: int = 1
    """Steps that a pipeline computes at once. Sequences take turns: what a step draws is told by a later one, and not
    known on the device that begins it."""


class Admission(msgspec.Struct):
    """A slot that starts, or restarts, with this content."""

    slot: int
    token_ids: TokenIds
    num_prompt_tokens: int
    page_ids: list[list[int]]
    """Of each group of layers; the reserved page in place of those that nobody reads."""
    sampling: Sampling
    seed: int
    end_token_ids: tuple[int, ...]
    """Tokens that are impossible before `sampling.min_tokens` are generated."""


class Chunk(msgspec.Struct):
    """Tokens [start, start + count) of the sequence in `slot`; if `samples`, the token after them is drawn.

    The last ones may be drafts. Then a token is drawn after each of them too, and those are taken that follow what was
    drawn: as many as the drafts that were right, and one more.
    """

    slot: int
    start: int
    count: int
    samples: bool
    logprobs: int | None = None
    """Report the log probabilities of the drawn tokens, with this many alternatives."""
    prompt_logprobs: int | None = None
    """Report the log probabilities of the prompt tokens that this chunk predicts, with this many alternatives."""
    drafts: list[int] = []
    pooling: Pooling | None = None
    """Report one vector of the chunk's hidden states, as its kind says: for `mean` their sum."""
    told: list[int] = []
    """Of the chunk's tokens the last ones, where the device has not got them: nobody drew them."""

    @property
    def end(self) -> int:
        return self.start + self.count

    @property
    def num_samples(self) -> int:
        """Rows whose next token is drawn: the chunk's last ones."""
        return len(self.drafts) + 1 if self.samples else 0


class Step(msgspec.Struct, tag="step"):
    """`chunks` has the decoding sequences first, of one token each."""

    admissions: list[Admission] = []
    page_entries: list[tuple[int, int, int, int]] = []
    """(group, slot, index, page) of entries of page tables that change, before the admissions: pages that running
    sequences gained, or the reserved one in place of those that they gave back."""
    scrubbed: list[int] = []
    """Pages to be zeroed first: NaN left in them would reach their next owner through masked positions."""
    chunks: list[Chunk] = []
    num_decodes: int = 0
    num_tokens: int = 0
    masked: bool = False
    """Masks of allowed tokens come after the forward and before the draw."""


class Masks(msgspec.Struct):
    """The tokens that may be drawn in a step, where not all may."""

    slots: list[int] = []
    words: memoryview = msgspec.field(default_factory=lambda: memoryview(b""))
    """A row for each of the slots: bit i % 32 of its little-endian word i // 32 stands for token i."""


class StepResult(msgspec.Struct):
    """What a step computed, per chunk that samples, in the step's order."""

    token_ids: list[list[int]]
    """One token, or with drafts as many as were taken."""
    finite: list[bool]
    """False where the logits held NaN or infinity: that request fails, the others go on."""
    logprobs: dict[int, list[TokenLogprobs]] = {}
    """By index of the chunk in the step, of each of its tokens."""
    prompt_logprobs: dict[int, list[TokenLogprobs]] = {}
    """By index of the chunk in the step: for prompt tokens [start + 1, start + count + 1)."""
    pooled: dict[int, bytes] = {}
    """By index of the chunk in the step: float32."""
