"""Decides, step by step, which tokens of which sequences are computed. Pure Python over lengths and page numbers.

A sequence's tokens divide into half-open ranges:

    [0, num_settled)                    keys and values are written
    [num_settled, num_computed)         a launched step is writing them
    [num_computed, num_tokens)          still to be computed; one token for a sequence that decodes
    [len(token_ids), num_tokens)        sampled by a launched step, value known once that step is retired

With overlapped steps, step N+1 is planned before step N is retired. What a launched step can touch is not given back
before that step is retired: a finished sequence keeps slot and pages until `num_in_flight` is 0, preemption waits
until nothing is in flight, and pages that fell out of a window are given back once all steps are retired that compute
tokens before `num_settled`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import msgspec

from ingle.engine.arrivals import Arrivals, Load, LowerTiers, NoTiers
from ingle.engine.pages import PagePool
from ingle.engine.pooling import PooledPrompt
from ingle.engine.prefix import root
from ingle.engine.sequence_pages import Paging, SequencePages
from ingle.engine.waiting import FIRST, WaitingQueue
from ingle.kv import pages_held
from ingle.request import EngineOutput, EngineRequest, FinishReason, Sampling, TokenIds, TokenLogprobs
from ingle.step import RESERVED_PAGE, Admission, Chunk, Limits, Step, StepResult

_MANY_DECODES = 128
_FULL_STEP = 512
"""Tokens that keep a GPU's tensor cores busy for longer than it takes to read the weights."""
_MAX_TRIALS = 3
_MAX_LOADS = 3
"""Of one sequence. What then still cannot be read is computed."""


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
    num_in_flight: int = 0
    """Launched, unretired steps that touch this sequence."""
    priority: int = 0
    """The lowest goes first."""
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
    sequences: list[Sequence] = field(default_factory=list)
    """Of each chunk."""

    @property
    def num_left(self) -> int:
        """Tokens that it may still take."""
        return self.max_num_tokens - self.step.num_tokens


Drafter = Callable[[TokenIds, int], list[int]]
"""Guesses up to so many tokens that may follow these."""


class Scheduler:
    """First come, first served among those of one priority, but that short prompts may go ahead of long ones; decodes
    before prefill chunks; the newest of the last priority gives way when pages run out."""

    def __init__(
        self, pages: PagePool, limits: Limits, drafter: Drafter | None = None, lower: LowerTiers | None = None
    ) -> None:
        self.pages = pages
        self.limits = limits
        if self._most_pages(limits.max_model_len) > pages.capacity:
            raise ValueError("one sequence of max_model_len must fit the page pool")
        self.drafter = drafter
        self.running: list[Sequence] = []  # in order of admission
        self.num_preemptions = self.num_queried_tokens = self.num_hit_tokens = 0
        self.num_lower_queried_tokens = self.num_lower_hit_tokens = 0
        self.arrivals: Arrivals[Sequence] = Arrivals(pages)
        self._lower = lower or NoTiers()
        self._keeps_pages = lower is not None
        self._paging = Paging(pages, limits.windows, limits.page_size)
        self._waiting: WaitingQueue[Sequence] = WaitingQueue()
        self._by_id: dict[str, Sequence] = {}
        self._leaving: dict[str, Sequence] = {}  # finished, but a launched step still touches them
        self._free_slots = list(range(limits.max_num_seqs - 1, -1, -1))
        self._tainted_pages: list[int] = []
        self._entering: list[Sequence] = []  # told with the step that has their first tokens, as the next one tells
        self._page_entries: list[tuple[int, int, int, int]] = []
        self._num_steps_in_flight = 0
        self._num_arrivals = 0
        self._suspects: deque[Sequence] = deque()  # each is computed alone, to its next token

    # ---- requests come and go

    def add(self, request: EngineRequest, seed: int, *, masked: bool = False) -> None:
        """Queues a request. Its lengths were checked by `ingle.request.check_request`."""
        sampling = request.sampling
        num_prompt_tokens = len(request.prompt_token_ids)
        room = self.limits.max_model_len if sampling.max_tokens is None else num_prompt_tokens + sampling.max_tokens
        seq = Sequence(
            id=request.id,
            sampling=sampling,
            token_ids=request.prompt_token_ids[:],
            num_prompt_tokens=num_prompt_tokens,
            max_num_tokens=min(room, self.limits.max_model_len),
            eos_token_ids=frozenset() if sampling.ignore_eos else frozenset(request.eos_token_ids),
            seed=seed,
            pages=SequencePages(self._paging, root(request.cache_salt)),
            priority=request.priority,
            tells_progress=request.return_progress,
            masked=masked,
            arrival=self._num_arrivals,
            pooled=None if request.pooling is None else PooledPrompt(request.pooling, num_prompt_tokens),
        )
        if seq.id in self._by_id or seq.id in self._leaving:
            raise ValueError(f"request id {seq.id!r} is already in use")
        self._num_arrivals += 1
        self._by_id[seq.id] = seq
        self._waiting.append(seq, self._num_uncached(seq), seq.priority)

    def abort(self, request_id: str) -> bool:
        """Takes a request out at once; its pages return when no launched step touches them. False if unknown."""
        seq = self._by_id.get(request_id)
        if seq is None:
            return False
        if seq.slot < 0 and seq not in self.arrivals:
            self._waiting.remove(seq)
        self._finish(seq)
        return True

    @property
    def has_work(self) -> bool:
        return bool(self._by_id)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting) + len(self.arrivals)

    # ---- planning

    def plan(self) -> Plan | None:
        """The next step, or None when nothing can be computed before a launched step is retired (or at all)."""
        for load in self._lower.loaded():
            self._take_loaded(load)
        if self._suspects and not self._call_suspect():
            return None
        self._leave_windows()
        decodes, prefills = self._split_running()
        if not self._make_room(decodes, prefills):
            return None
        plan = Plan(Step(), self._max_num_tokens(len(decodes)))
        self._decode(plan, decodes)
        self._short_prompts(plan, prefills)
        for seq in prefills:
            self._chunk(plan, seq, seq.num_to_compute)
        self._admit(plan)
        if not plan.step.chunks:
            return None
        if self._entering:
            begun = set(plan.sequences)
            plan.step.admissions = [self._admission(seq) for seq in self._entering if seq in begun]
            self._entering = [seq for seq in self._entering if seq not in begun]
        plan.step.scrubbed, self._tainted_pages = self._tainted_pages, []
        plan.step.page_entries, self._page_entries = self._page_entries, []
        self._num_steps_in_flight += 1
        return plan

    def _max_num_tokens(self, num_decodes: int) -> int:
        """Once nearly all slots decode, prompts are read beside them in small portions.

        The weights are read for the decodes anyway, and up to some number of tokens the step takes little longer for
        more of them; in one large step prompt tokens would cost more, and all decodes would wait for it. Before that
        new sequences are worth more: with more slots in use every step yields more.
        """
        limit = self.limits.max_num_batched_tokens
        if num_decodes < max(_MANY_DECODES, self.limits.max_num_seqs * 7 // 8):
            return limit
        return min(max(_FULL_STEP, 2 * num_decodes), limit)

    def _split_running(self) -> tuple[list[Sequence], list[Sequence]]:
        decodes, prefills = [], []
        for seq in self.running:
            remaining = seq.num_to_compute
            if seq.num_drafted or (seq.num_sampled_ahead and self._may_draft(seq)):
                continue  # what follows is known once those steps are retired
            if remaining == 1 + seq.num_untold and seq.num_tokens > seq.num_prompt_tokens:
                if seq.num_tokens < seq.max_num_tokens:  # otherwise its last token is in flight
                    decodes.append(seq)
            elif remaining > 0:
                prefills.append(seq)
        return decodes, prefills

    def _make_room(self, decodes: list[Sequence], prefills: list[Sequence]) -> bool:
        """Preempts until every decode, and the oldest prompt, has the pages of its next token: from the last priority,
        and of one from the newest. Who is still being read for gives way before.

        False: retire a step first, or wait for that.
        """
        while self._num_lacking(decodes) + self._num_lacking(prefills[:1]) > self.pages.num_available:
            self.arrivals.cancel()
            if self._num_steps_in_flight or self.arrivals.is_reading:
                return False
            victim = max(reversed(self.running), key=lambda seq: seq.priority)
            for group in (decodes, prefills):
                if victim in group:
                    group.remove(victim)
            self._preempt(victim)
        return True

    @staticmethod
    def _num_lacking(sequences: Seq[Sequence]) -> int:
        return sum(seq.pages.num_lacking(seq.num_computed + 1) for seq in sequences)

    def _most_pages(self, num_tokens: int) -> int:
        """That a sequence of so many tokens holds at once."""
        limits = self.limits
        return pages_held(limits.windows, num_tokens, limits.page_size, limits.max_num_batched_tokens)

    def _leave_windows(self) -> None:
        """Gives back the pages that running sequences read no more."""
        for seq in self.running if self._paging.has_windows else ():
            left = seq.pages.leave_behind(seq.num_settled)
            self._page_entries += [(group, seq.slot, index, RESERVED_PAGE) for group, index in left]

    def _preempt(self, seq: Sequence) -> None:
        """Back to the head of its queue, to be computed again; every token it has is kept."""
        self.running.remove(seq)
        self._give_back(seq)
        seq.num_computed = seq.num_settled = 0
        self._wait_first(seq)
        self.num_preemptions += 1

    def _wait_first(self, seq: Sequence) -> None:
        self._waiting.prepend(seq, self._num_uncached(seq), seq.priority)

    def _decode(self, plan: Plan, decodes: list[Sequence]) -> None:
        """One token of each, then those whose next tokens somebody guesses, in pages that they have."""
        num_left = plan.num_left - len(decodes)
        drafting: list[tuple[Sequence, list[int]]] = []
        jumping: list[tuple[Sequence, int]] = []
        for seq in decodes:
            self._grow(seq, seq.num_computed + 1)
            drafts = self._drafts(seq, num_left)
            if seq.num_untold:
                jumping.append((seq, min(seq.num_untold, num_left)))
                num_left -= jumping[-1][1]
            elif drafts:
                num_left -= len(drafts)
                drafting.append((seq, drafts))
            else:
                self._chunk(plan, seq, 1)
        plan.step.num_decodes = len(plan.step.chunks)
        for seq, drafts in drafting:
            self._chunk(plan, seq, 1, drafts)
        for seq, num_jumped in jumping:
            self._chunk(plan, seq, 1 + num_jumped)

    def _drafts(self, seq: Sequence, most: int) -> list[int]:
        """Guesses of what follows, in pages that the sequence has."""
        if self.drafter is None or not self._may_draft(seq):
            return []
        most = min(most, seq.pages.num_tokens - seq.num_tokens, seq.max_num_tokens - seq.num_tokens - 1)
        return self.drafter(seq.token_ids, most)[:most] if most > 0 else []

    def _may_draft(self, seq: Sequence) -> bool:
        """Whether somebody guesses what follows: not where a mask or a count of all tokens before decides a draw."""
        return not (self.drafter is None or seq.masked or seq.sampling.penalized or self._suspects)

    def _grow(self, seq: Sequence, end: int) -> None:
        """Sees that the first `end` tokens have their pages."""
        self._page_entries += [(group, seq.slot, index, page_id) for group, index, page_id in seq.pages.grow(end)]

    def _short_prompts(self, plan: Plan, prefills: list[Sequence]) -> None:
        """Plans prompts that may go ahead of the oldest one, and takes them out of `prefills`.

        Such a prompt has at most half as many tokens to compute as the oldest. All of them together get half of the
        step, or what the oldest leaves. So a short prompt does not wait for a long one that came before it, and the
        sum of both waits is not longer for it; a long one is read at half speed at least, however many short ones come.
        Prompts of like lengths are read one after the other: shared out equally, all would end late.
        """
        if self._suspects or len(prefills) + len(self._waiting) < 2:
            return
        oldest = prefills[0].num_to_compute if prefills else self._waiting.num_tokens(self._waiting.head)
        num_left = plan.num_left
        end = plan.step.num_tokens + max(num_left // 2, num_left - oldest)
        for seq in sorted(prefills[1:], key=lambda seq: seq.num_to_compute):
            if seq.num_to_compute <= oldest // 2:
                prefills.remove(seq)
                self._chunk(plan, seq, min(seq.num_to_compute, end - plan.step.num_tokens))
        while self._waiting and self._free_slots and plan.step.num_tokens < end:
            seq, head = self._waiting.shortest, self._waiting.head
            # A slot and pages for the head of the queue are kept: else it might wait as long as short ones come.
            head_pages = 0 if seq is head else self._most_pages(head.num_tokens)
            if self._waiting.num_tokens(seq) > oldest // 2 or (seq is not head and len(self._free_slots) == 1):
                return
            if not self._start(plan, seq, end - plan.step.num_tokens, head_pages):
                return

    def _chunk(self, plan: Plan, seq: Sequence, wanted: int, drafts: Seq[int] = ()) -> None:
        """Adds up to `wanted` tokens of `seq` to the plan, as far as the step's budget and pages go, and drafts after
        them, for which there are pages."""
        step, start = plan.step, seq.num_computed
        count = seq.pages.reach(start + min(wanted, plan.num_left)) - start
        if count <= 0:
            return
        self._grow(seq, start + count)
        samples = start + count == seq.num_tokens and seq.pooled is None
        told = seq.token_ids[len(seq.token_ids) - seq.num_untold : start + count].tolist() if seq.num_untold else []
        seq.num_untold -= len(told)
        step.chunks.append(
            Chunk(
                slot=seq.slot,
                start=start,
                count=count + len(drafts),
                samples=samples,
                logprobs=seq.sampling.logprobs if samples else None,
                prompt_logprobs=seq.sampling.prompt_logprobs if start < seq.num_prompt_tokens - 1 else None,
                drafts=list(drafts),
                pooling=None if seq.pooled is None or not seq.pooled.wants(start + count) else seq.pooled.pooling,
                told=told,
            )
        )
        step.masked |= samples and seq.masked
        step.num_tokens += count + len(drafts)
        plan.sequences.append(seq)
        seq.num_computed += count
        seq.num_sampled_ahead += samples
        seq.num_drafted = len(drafts)
        seq.num_in_flight += 1
        self._register(seq)

    def _admit(self, plan: Plan) -> None:
        while self._waiting and self._free_slots and plan.num_left > 0:
            if self._suspects and self.running:  # which is computed alone
                return
            if not self._start(plan, self._waiting.head, plan.num_left):
                return

    def _start(self, plan: Plan, seq: Sequence, most: int, num_kept_pages: int = 0) -> bool:
        """Admits `seq` with up to `most` of its tokens. False if pages lack, of which so many are kept for another."""
        num_cached = self._num_cached(seq)
        if self.arrivals.is_reading and self._is_being_read(seq, num_cached):
            self._waiting.remove(seq)
            self.arrivals.park(seq)
            return True
        end = num_cached + min(seq.num_tokens - num_cached, most, plan.num_left)
        # Each running sequence may soon want one more page: admitting into those would only bring preemption.
        num_kept_pages += (len(self.running) + len(self.arrivals)) * len(self.limits.windows)
        if not seq.pages.start(seq.token_ids, num_cached, end, num_kept_pages):
            return False
        self._waiting.remove(seq)
        seq.slot = self._free_slots.pop()
        seq.num_computed = seq.num_settled = num_cached
        seq.num_read = 0
        if seq.pages.unread:
            self._load(seq)
        else:
            self._enter(seq)
            self._chunk(plan, seq, min(seq.num_to_compute, most))
        return True

    def _enter(self, seq: Sequence) -> None:
        """Has a sequence run that has its slot and its pages."""
        if seq.num_cached_tokens is None:
            seq.num_cached_tokens = seq.num_computed
            self.num_queried_tokens += seq.num_prompt_tokens
            self.num_hit_tokens += seq.num_computed - seq.num_read
            if self._keeps_pages:
                self.num_lower_hit_tokens += seq.num_read
                self.num_lower_queried_tokens += seq.num_prompt_tokens - seq.num_computed + seq.num_read
        seq.num_untold = 0  # the admission has all
        self.running.append(seq)
        self._entering.append(seq)

    @staticmethod
    def _admission(seq: Sequence) -> Admission:
        return Admission(
            slot=seq.slot,
            token_ids=seq.token_ids,
            num_prompt_tokens=seq.num_prompt_tokens,
            page_ids=[list(page_ids) for page_ids in seq.pages.page_ids],
            sampling=seq.sampling,
            seed=seq.seed,
            end_token_ids=(*seq.eos_token_ids, *seq.sampling.stop_token_ids),
        )

    # ---- pages from lower tiers

    def _is_being_read(self, seq: Sequence, num_cached: int) -> bool:
        """Whether another sequence's load brings what this one lacks."""
        return self.arrivals.is_read(name for _, _, name in seq.pages.absent(seq.token_ids, num_cached))

    def _load(self, seq: Sequence) -> None:
        """Has the pages read that the device lacks; `seq` runs once they are."""
        pages = {page_id for _, page_id in seq.pages.unread}
        tainted = [page_id for page_id in self._tainted_pages if page_id in pages]
        self._tainted_pages = [page_id for page_id in self._tainted_pages if page_id not in pages]
        load = Load(seq.pages.unread, tainted)
        seq.num_loads += 1
        seq.num_read = seq.num_computed - seq.pages.num_cached(seq.token_ids)
        self.arrivals.begin(load, seq)
        self._lower.load(load)

    def _take_loaded(self, load: Load) -> None:
        self._tainted_pages += [
            page_id for name, page_id in load.entries if name in load.failed and page_id in load.tainted
        ]
        seq = self.arrivals.end(load)
        if not (seq.finished or load.failed or self._suspects):  # of which one runs alone
            self._enter(seq)
        else:
            self._give_back(seq)
            seq.num_computed = seq.num_settled = 0
            if not seq.finished:
                self._wait_first(seq)
        for parked in reversed(self.arrivals.unpark()):
            self._wait_first(parked)

    def _save(self, seq: Sequence) -> None:
        """Has full pages kept whose content can be relied on: a token was drawn from what they hold."""
        if self._keeps_pages and self.limits.enable_prefix_caching:
            num_tokens = min(seq.num_settled, seq.num_computed, len(seq.token_ids))
            for name, page_id in seq.pages.newly_full(seq.token_ids, num_tokens):
                self._lower.save(name, page_id)

    # ---- prefix cache

    def _num_uncached(self, seq: Sequence) -> int:
        """Tokens to compute if it were admitted now."""
        return seq.num_tokens - self._num_cached(seq)

    def _num_cached(self, seq: Sequence) -> int:
        """Tokens that need not be computed."""
        needs_all = seq.sampling.prompt_logprobs is not None or (
            seq.pooled is not None and seq.pooled.pooling.needs_all
        )
        if not self.limits.enable_prefix_caching or needs_all:
            return 0
        if self._suspects or seq.num_loads >= _MAX_LOADS:
            return seq.pages.num_cached(seq.token_ids)
        return seq.pages.num_cached(seq.token_ids, self._lower)

    def _register(self, seq: Sequence) -> None:
        """Makes findable the full pages whose tokens are known and whose keys and values are (being) written.

        A step that reads them, this one included, writes every key and value of a layer before it attends in it.
        """
        if self.limits.enable_prefix_caching:
            seq.pages.register(seq.token_ids, min(seq.num_computed, len(seq.token_ids)))

    # ---- results

    def retire(self, plan: Plan, result: StepResult) -> list[EngineOutput]:
        """Takes in what a launched step computed. Plans are retired in the order in which they were made."""
        self._num_steps_in_flight -= 1
        outputs = []
        sampled = iter(zip(result.token_ids, result.finite, strict=True))
        for index, (chunk, seq) in enumerate(zip(plan.step.chunks, plan.sequences, strict=True)):
            seq.num_in_flight -= 1
            seq.num_drafted = 0 if chunk.drafts else seq.num_drafted
            if index in result.prompt_logprobs:
                self._take_prompt_logprobs(seq, chunk.start, result.prompt_logprobs[index])
            if seq.pooled is not None and not seq.finished and index in result.pooled:
                seq.pooled.add(chunk.start, result.pooled[index])
                seq.num_settled = chunk.end
                if chunk.end == seq.num_prompt_tokens:
                    self._acquit(seq)
                    outputs.append(self._take_pooled(seq, seq.pooled.finish()))
            if chunk.samples:
                token_ids, finite = next(sampled)
                seq.num_sampled_ahead -= 1
                self._acquit(seq)
                if not seq.finished:
                    seq.num_computed += len(token_ids) - 1
                    seq.num_settled = chunk.end if seq.num_in_flight else seq.num_computed
                    outputs.append(self._take_tokens(seq, token_ids, finite, result.logprobs.get(index)))
            elif seq.tells_progress and not seq.finished and not seq.num_generated:
                read = min(chunk.end, seq.num_prompt_tokens)
                cached = seq.num_cached_tokens or 0
                outputs.append(EngineOutput(seq.id, [], num_cached_tokens=cached, num_prompt_read=read))
            seq.num_settled = chunk.end if seq.num_in_flight else seq.num_computed
            if seq.finished and seq.num_in_flight == 0:
                self._leaving.pop(seq.id, None)
                self._give_back(seq)
        return outputs

    def _take_prompt_logprobs(self, seq: Sequence, start: int, entries: Seq[TokenLogprobs]) -> None:
        if seq.prompt_logprobs is None:
            seq.prompt_logprobs = [None]  # nothing predicts the first token
        num_known = len(seq.prompt_logprobs) - (start + 1)  # more than 0 after a preemption
        seq.prompt_logprobs.extend(entries[num_known : seq.num_prompt_tokens - (start + 1)])

    def _take_tokens(
        self, seq: Sequence, token_ids: Seq[int], finite: bool, logprobs: list[TokenLogprobs] | None
    ) -> EngineOutput:
        if not finite:
            return self._not_finite(seq, "logits")
        if len(seq.token_ids) >= seq.max_num_tokens:  # no token was asked for: the prompt was only scored
            self._finish(seq)
            cached = seq.num_cached_tokens or 0
            return EngineOutput(seq.id, [], "length", num_cached_tokens=cached, prompt_logprobs=self._of_prompt(seq))
        seq.pages.given_back.clear()  # NaN in them would have reached this token
        first = seq.num_generated == 0
        taken, reason, stop_token_id = self._append(seq, token_ids)
        self._register(seq)
        self._save(seq)
        if reason is not None:
            self._finish(seq)
        return EngineOutput(
            seq.id,
            taken,
            reason,
            stop_token_id,
            seq.num_cached_tokens or 0,
            None if logprobs is None else logprobs[: len(taken)],
            self._of_prompt(seq) if first else None,
        )

    def _take_pooled(self, seq: Sequence, vector: bytes | None) -> EngineOutput:
        if vector is None:
            return self._not_finite(seq, "hidden states")
        self._save(seq)
        self._finish(seq)
        return EngineOutput(seq.id, [], "stop", num_cached_tokens=seq.num_cached_tokens or 0, pooled=vector)

    def _not_finite(self, seq: Sequence, what: str) -> EngineOutput:
        seq.tainted = True
        self._finish(seq)
        return EngineOutput(
            seq.id,
            [],
            "error",
            error=f"the model computed NaN or infinite {what} for this request; try --dtype float32",
        )

    def _append(self, seq: Sequence, token_ids: Seq[int]) -> tuple[list[int], FinishReason | None, int | None]:
        """Takes tokens up to the end of the answer. Returns them, with what ended it."""
        taken: list[int] = []
        for token_id in token_ids:
            seq.token_ids.append(token_id)
            taken.append(token_id)
            reason, stop_token_id = self._finish_reason(seq, token_id)
            if reason is not None:
                return taken, reason, stop_token_id
        return taken, None, None

    def may_jump(self, request_id: str) -> bool:
        """Whether tokens may be added that nobody draws: not where a launched step is to draw the next one already,
        where drawn tokens are counted, or where their log probabilities are wanted."""
        seq = self._by_id.get(request_id)
        if seq is None or seq.num_in_flight:
            return False
        return not (seq.sampling.penalized or seq.sampling.logprobs is not None)

    def jump(self, output: EngineOutput, token_ids: Seq[int]) -> EngineOutput:
        """What a retired step brought, and the tokens that have to follow, which nobody draws."""
        seq = self._by_id[output.id]
        if not token_ids:
            return output
        taken, reason, stop_token_id = self._append(seq, token_ids)
        seq.num_untold += len(taken)
        if reason is not None:
            self._finish(seq)
        return msgspec.structs.replace(
            output, token_ids=[*output.token_ids, *taken], finish_reason=reason, stop_token_id=stop_token_id
        )

    @staticmethod
    def _of_prompt(seq: Sequence) -> list[TokenLogprobs | None] | None:
        return None if seq.sampling.prompt_logprobs is None else seq.prompt_logprobs or [None]

    def _finish_reason(self, seq: Sequence, token_id: int) -> tuple[FinishReason | None, int | None]:
        if token_id in seq.eos_token_ids:
            return "stop", None
        if token_id in seq.sampling.stop_token_ids:
            return "stop", token_id
        return ("length" if len(seq.token_ids) >= seq.max_num_tokens else None), None

    # ---- steps that fail

    def revoke(self, plans: Seq[Plan]) -> list[Sequence]:
        """Takes back all steps in flight, of which one failed, as if none had been launched.

        What they wrote is not to be trusted: those pages are forgotten and zeroed. Every running sequence waits again,
        to be computed from the tokens that it has. Returns the unfinished sequences of these steps, oldest first.
        """
        spoiled: dict[int, None] = {}
        for plan in plans:
            for chunk, seq in zip(plan.step.chunks, plan.sequences, strict=True):
                seq.num_in_flight -= 1
                seq.num_sampled_ahead -= chunk.samples
                seq.num_drafted = 0
                spoiled |= dict.fromkeys(seq.pages.written_from(chunk.start))
            spoiled |= dict.fromkeys(plan.step.scrubbed)
        self._num_steps_in_flight = 0
        self.pages.forget(spoiled)
        self._tainted_pages += spoiled
        while self._leaving:
            self._give_back(self._leaving.popitem()[1])
        self._preempt_all()
        sequences = {seq.id: seq for plan in plans for seq in plan.sequences if not seq.finished}
        return sorted(sequences.values(), key=lambda seq: seq.arrival)

    def blame(self, sequences: Seq[Sequence], error: str) -> list[EngineOutput]:
        """Finds whose fault it is that a step of these sequences, oldest first, failed; that request ends with `error`.

        Each is computed alone to its next token, and is at fault if that fails. Where none does, it is what they are
        together that fails, and at last the newest gives way.
        """
        if not self._suspects and any(seq.num_trials < _MAX_TRIALS for seq in sequences):
            self._suspects = deque(sequences)
            return []
        for seq in sequences[-1:]:
            self._waiting.remove(seq)
            self._finish(seq)
        return [EngineOutput(seq.id, [], "error", error=error) for seq in sequences[-1:]]

    def _call_suspect(self) -> bool:
        """Makes the first suspect the one sequence that runs. False: retire a step first."""
        if self._num_steps_in_flight:
            return False
        suspect = self._suspects[0]
        if suspect.slot < 0:
            self._preempt_all()
            self._waiting.remove(suspect)
            self._waiting.prepend(suspect, self._num_uncached(suspect), FIRST)
        return True

    def _acquit(self, seq: Sequence) -> None:
        """Its step did not fail."""
        if seq in self._suspects:
            self._suspects.remove(seq)
            seq.num_trials += 1
        else:
            seq.num_trials = 0

    def _preempt_all(self) -> None:
        """Everything waits, in the order in which it came."""
        for seq in self.running[::-1]:
            self._preempt(seq)
        self.arrivals.cancel()
        self._waiting.sort(lambda seq: seq.arrival)

    def _finish(self, seq: Sequence) -> None:
        seq.finished = True
        del self._by_id[seq.id]
        if seq in self._suspects:
            self._suspects.remove(seq)
        if seq in self.arrivals:
            if self.arrivals.leave(seq):
                return
        elif seq.slot >= 0:
            self.running.remove(seq)
        if seq.num_in_flight:
            self._leaving[seq.id] = seq
        else:
            self._give_back(seq)

    def _give_back(self, seq: Sequence) -> None:
        if seq.slot >= 0:
            if seq.tainted:
                exclusive = seq.pages.exclusive()
                self.pages.forget(exclusive)
                self._tainted_pages += exclusive
            seq.pages.give_back()
            if seq in self._entering:
                self._entering.remove(seq)
            self._free_slots.append(seq.slot)
            seq.slot = -1

    def check(self) -> None:
        """Proves the invariants of sequences, slots and pages. Raises `AssertionError`."""
        live = [*self.running, *self._leaving.values(), *self.arrivals.with_slots]
        slots = [seq.slot for seq in live] + self._free_slots
        assert sorted(slots) == list(range(self.limits.max_num_seqs)), "a slot is lost or used twice"
        for seq in self.running:
            assert seq.num_settled <= seq.num_computed <= min(seq.pages.num_tokens, seq.num_tokens), (
                f"{seq.id} computed more than it has pages or tokens for"
            )
            most = max(seq.max_num_tokens, seq.num_prompt_tokens + 1)  # one that is only scored draws a token, unused
            assert not seq.finished and seq.num_tokens <= most, f"{seq.id} should have left"
        assert all(seq.slot == -1 and not any(seq.pages.page_ids) for seq in self._waiting), (
            "a waiting sequence holds pages"
        )
        arriving = {seq.id for seq in self.arrivals.to_run}
        assert set(self._by_id) == {seq.id for seq in (*self.running, *self._waiting)} | arriving, "a request is lost"
        self.pages.check(list(seq.pages.held) for seq in live)
