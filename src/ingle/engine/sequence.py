"""A request inside the engine, and a step's plan: whose tokens it computes."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from ingle.engine.pooling import PooledPrompt
from ingle.engine.sequence_pages import SequencePages
from ingle.request import EngineRequest, Sampling, TokenIds, TokenLogprobs
from ingle.step import Admission, Chunk, Step


@dataclass(slots=True, eq=False)
class Sequence:
    """One request inside the engine."""

    id: str
    sampling: Sampling
    token_ids: TokenIds
    """Prompt, then every generated token whose value is known."""
    num_prompt_tokens: int
    max_num_tokens: int
    """Prompt and answer together may not grow beyond this."""
    eos_token_ids: frozenset[int]
    seed: int
    pages: SequencePages
    slot: int = -1
    """Row of the worker's tables while running; -1 otherwise."""
    num_settled: int = 0
    num_computed: int = 0
    num_sampled_ahead: int = 0
    """Tokens that launched steps sample and that are not in `token_ids` yet."""
    num_drafted: int = 0
    """Drafts beyond those, which a launched step tries: until it is retired, nobody knows where the sequence ends."""
    num_untold: int = 0
    """Of `token_ids` the last ones, which had to follow what was drawn, and which no device has been told."""
    num_admitted: int = 0
    """Of `token_ids` the first ones, which came with the admission."""
    num_in_flight: int = 0
    """Launched, unretired steps that touch this sequence."""
    priority: int = 0
    """The lowest goes first."""
    client: str = ""
    """Who shares with others what there is of steps."""
    tells_progress: bool = False
    """How much of its prompt is computed is told step by step."""
    masked: bool = False
    """Which tokens may be drawn is known only once all before are."""
    num_cached_tokens: int | None = None
    """Prompt tokens found in the prefix cache when first admitted."""
    finished: bool = False
    tainted: bool = False
    """Its keys and values may hold NaN."""
    arrival: int = 0
    """Requests that came before it."""
    num_trials: int = 0
    """Steps that it passed as a suspect since it last passed one otherwise."""
    num_loads: int = 0
    """How often pages were read for it from a lower tier."""
    num_read: int = 0
    """Tokens that were, when it was admitted last."""
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    pooled: PooledPrompt | None = None
    """Of a request that wants a vector: it ends with its prompt, and draws nothing."""

    @classmethod
    def of(cls, request: EngineRequest, seed: int, pages: SequencePages, max_model_len: int) -> Sequence:
        """One that has yet to be computed."""
        sampling, num_prompt_tokens = request.sampling, len(request.prompt_token_ids)
        room = max_model_len if sampling.max_tokens is None else num_prompt_tokens + sampling.max_tokens
        return cls(
            id=request.id,
            sampling=sampling,
            token_ids=request.prompt_token_ids[:],
            num_prompt_tokens=num_prompt_tokens,
            max_num_tokens=min(room, max_model_len),
            eos_token_ids=frozenset() if sampling.ignore_eos else frozenset(request.eos_token_ids),
            seed=seed,
            pages=pages,
            priority=request.priority,
            client=request.client,
            tells_progress=request.return_progress,
            pooled=None if request.pooling is None else PooledPrompt(request.pooling, num_prompt_tokens),
        )

    def admission(self) -> Admission:
        """What a device is told of it, once it has its slot and pages."""
        return Admission(
            slot=self.slot,
            token_ids=self.token_ids,
            num_prompt_tokens=self.num_prompt_tokens,
            page_ids=[list(page_ids) for page_ids in self.pages.page_ids],
            sampling=self.sampling,
            seed=self.seed,
            end_token_ids=(*self.eos_token_ids, *self.sampling.stop_token_ids),
        )

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) + self.num_sampled_ahead

    @property
    def num_to_compute(self) -> int:
        return self.num_tokens - self.num_computed

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens


@dataclass(slots=True)
class Plan:
    """One step, and whose it is."""

    step: Step
    max_num_tokens: int
    """That this step may have."""
    max_num_beside: int
    """That it may have once somebody gets a token of it, who waits for all of it."""
    sequences: list[Sequence] = field(default_factory=list)
    """Of each chunk."""

    @property
    def num_left(self) -> int:
        """Tokens that it may still take."""
        return self.max_num_tokens - self.step.num_tokens

    def append(self, seq: Sequence, count: int, drafts: Seq[int], *, tells_drawn: bool = False) -> None:
        """The next `count` tokens of a sequence, whose pages are there, and drafts after them.

        `tells_drawn`: what was drawn is told, too.
        """
        step, start = self.step, seq.num_computed
        end = start + count
        ends = end == seq.num_tokens
        samples = ends and seq.pooled is None
        first_told = len(seq.token_ids) - seq.num_untold
        if tells_drawn:
            first_told = min(first_told, max(start, seq.num_admitted))
        told = seq.token_ids[first_told:end].tolist() if first_told < end else []
        step.chunks.append(
            Chunk(
                slot=seq.slot,
                start=start,
                count=count + len(drafts),
                samples=samples,
                logprobs=seq.sampling.logprobs if samples else None,
                prompt_logprobs=seq.sampling.prompt_logprobs if start < seq.num_prompt_tokens - 1 else None,
                drafts=list(drafts),
                pooling=None if seq.pooled is None or not seq.pooled.wants(end) else seq.pooled.pooling,
                told=told,
            )
        )
        step.masked |= samples and seq.masked
        step.num_tokens += count + len(drafts)
        self.sequences.append(seq)
        seq.num_untold = min(seq.num_untold, max(len(seq.token_ids) - end, 0))
        seq.num_computed = end
        seq.num_sampled_ahead += samples
        seq.num_drafted = len(drafts)
        seq.num_in_flight += 1
        if ends:
            self.max_num_tokens = min(self.max_num_tokens, max(self.max_num_beside, step.num_tokens))
