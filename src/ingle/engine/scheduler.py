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

from collections import Counter, deque
from collections.abc import Callable
from collections.abc import Sequence as Seq

from ingle.engine import outputs
from ingle.engine.arrivals import Arrivals, Load, LowerTiers, NoTiers
from ingle.engine.forecast import Forecast
from ingle.engine.pace import Pace
from ingle.engine.pages import PagePool
from ingle.engine.prefix import root
from ingle.engine.prompts import PromptReader
from ingle.engine.sequence import Plan, Sequence
from ingle.engine.sequence_pages import Paging, SequencePages
from ingle.engine.shares import Shares
from ingle.engine.waiting import FIRST, WaitingQueue
from ingle.kv import pages_held
from ingle.request import EngineOutput, EngineRequest, TokenIds
from ingle.step import RESERVED_PAGE, Limits, Step, StepResult

_MAX_TRIALS = 3
_MAX_LOADS = 3
"""Of one sequence. What then still cannot be read is computed."""

Drafter = Callable[[TokenIds, int], list[int]]
"""Guesses up to so many tokens that may follow these."""


class Scheduler:
    """Decodes before prompts. Of prompts, those of the lowest priority first, of whoever read least among clients; of
    one client, first come, first served, but that short ones may go ahead of long ones. When pages run out, the newest
    of the last priority gives way, of the client of whom most runs."""

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
        self._shares = Shares()
        self._reader = PromptReader(self, self._waiting, self._shares, limits.max_num_batched_tokens // 2)
        self._blocked: Sequence | None = None  # for which the last plan had no slot or pages
        self.forecast = Forecast(limits)
        self.pace = Pace(limits)

    # ---- requests come and go

    def add(self, request: EngineRequest, seed: int, *, masked: bool = False) -> None:
        """Queues a request. Its lengths were checked by `ingle.request.check_request`."""
        pages = SequencePages(self._paging, root(request.cache_salt))
        seq = Sequence.of(request, seed, pages, self.limits.max_model_len)
        seq.masked, seq.arrival = masked, self._num_arrivals
        if seq.id in self._by_id or seq.id in self._leaving:
            raise ValueError(f"request id {seq.id!r} is already in use")
        self._num_arrivals += 1
        self._by_id[seq.id] = seq
        self._shares.join(seq.client)
        self._waiting.append(seq, self._num_uncached(seq), seq.priority, seq.client)

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
        if not self._give_place():
            return None
        decodes, prefills = self._split_running()
        if not self._make_room(decodes, prefills):
            return None
        beside = self.pace.beside(len(decodes))
        plan = Plan(Step(), beside if decodes else self.pace.alone(), beside)
        self._decode(plan, decodes)
        self._read_prompts(plan, prefills)
        if not plan.step.chunks:
            return None
        if self._entering:
            begun = set(plan.sequences)
            plan.step.admissions = [seq.admission() for seq in self._entering if seq in begun]
            self._entering = [seq for seq in self._entering if seq not in begun]
        plan.step.scrubbed, self._tainted_pages = self._tainted_pages, []
        plan.step.page_entries, self._page_entries = self._page_entries, []
        self._num_steps_in_flight += 1
        return plan

    def _split_running(self) -> tuple[list[Sequence], list[Sequence]]:
        decodes, prefills, num_elsewhere = [], [], 0
        for seq in self.running:
            remaining = seq.num_to_compute
            if seq.num_drafted or (seq.num_sampled_ahead and self._may_draft(seq)):
                continue  # what follows is known once those steps are retired
            if self.limits.num_turns > 1 and seq.num_sampled_ahead:
                num_elsewhere += 1
                continue
            if remaining == 1 + seq.num_untold and seq.num_tokens > seq.num_prompt_tokens:
                if seq.num_tokens < seq.max_num_tokens:  # otherwise its last token is in flight
                    decodes.append(seq)
            elif remaining > 0:
                prefills.append(seq)
        # Equally many in each turn.
        return decodes[: -(-(len(decodes) + num_elsewhere) // self.limits.num_turns)], prefills

    def _make_room(self, decodes: list[Sequence], prefills: list[Sequence]) -> bool:
        """Preempts until every decode, and the oldest prompt, has the pages of its next token. Who is still being read
        for gives way before.

        False: retire a step first, or wait for that.
        """
        while self._num_lacking(decodes) + self._num_lacking(prefills[:1]) > self.pages.num_available:
            self.arrivals.cancel()
            if self._num_steps_in_flight or self.arrivals.is_reading:
                return False
            self.forecast.outgrown(decodes)
            victim = self._victim(self.running)
            for group in (decodes, prefills):
                if victim in group:
                    group.remove(victim)
            self._preempt(victim)
        return True

    def _give_place(self) -> bool:
        """A client of whom nothing runs, and whose turn it was in the last plan, gets the place of one of another's.

        False: retire a step first.
        """
        blocked, self._blocked = self._blocked, None
        if blocked is None or blocked.finished or blocked.slot >= 0 or self._suspects or self._leaving:
            return True
        if self.arrivals.is_reading:  # slots and pages are on their way
            return True
        counts = Counter(seq.client for seq in self.running)
        others = [seq for seq in self.running if seq.priority >= blocked.priority and counts[seq.client] > 1]
        if blocked.client in counts or not others:
            return True
        if self._num_steps_in_flight:
            self._blocked = blocked
            return False
        self._preempt(self._victim(others))
        return True

    @staticmethod
    def _victim(sequences: Seq[Sequence]) -> Sequence:
        """Of those of the last priority, the newest of the client who has most of them."""
        counts = Counter((seq.priority, seq.client) for seq in sequences)
        return max(reversed(sequences), key=lambda seq: (seq.priority, counts[seq.priority, seq.client]))

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
        self._waiting.prepend(seq, self._num_uncached(seq), seq.priority, seq.client)

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
                self.chunk(plan, seq, 1)
        plan.step.num_decodes = len(plan.step.chunks)
        for seq, drafts in drafting:
            self.chunk(plan, seq, 1, drafts)
        for seq, num_jumped in jumping:
            self.chunk(plan, seq, 1 + num_jumped)

    def _drafts(self, seq: Sequence, most: int) -> list[int]:
        """Guesses of what follows, in pages that the sequence has."""
        if self.drafter is None or not self._may_draft(seq):
            return []
        most = min(most, seq.pages.num_tokens - seq.num_tokens, seq.max_num_tokens - seq.num_tokens - 1)
        return self.drafter(seq.token_ids, most)[:most] if most > 0 else []

    def _may_draft(self, seq: Sequence) -> bool:
        """Whether somebody guesses what follows: not where a mask or a count of all tokens before decides a draw."""
        if self.drafter is None or self.limits.num_turns > 1:
            return False
        return not (seq.masked or seq.sampling.penalized or self._suspects)

    def _grow(self, seq: Sequence, end: int) -> None:
        """Sees that the first `end` tokens have their pages."""
        self._page_entries += [(group, seq.slot, index, page_id) for group, index, page_id in seq.pages.grow(end)]

    def _read_prompts(self, plan: Plan, prefills: list[Sequence]) -> None:
        """Plans prompts that are being read or wait."""
        if self._suspects:  # of which one is computed alone
            for seq in prefills:
                self.chunk(plan, seq, seq.num_to_compute)
            if self._waiting and not self.running:
                self.start(plan, next(iter(self._waiting)), plan.num_left)
        elif prefills or self._waiting:
            running = {seq.client for seq in self.running}
            self._blocked = self._reader.read(plan, prefills, running)

    def chunk(self, plan: Plan, seq: Sequence, wanted: int, drafts: Seq[int] = ()) -> None:
        """Adds up to `wanted` tokens of `seq` to the plan, as far as the step's budget and pages go, and drafts after
        them, for which there are pages."""
        count = seq.pages.reach(seq.num_computed + min(wanted, plan.num_left)) - seq.num_computed
        if count > 0:
            self._grow(seq, seq.num_computed + count)
            plan.append(seq, count, drafts, tells_drawn=self.limits.num_turns > 1)
            self._register(seq)

    def start(self, plan: Plan, seq: Sequence, most: int, kept_for: Sequence | None = None) -> bool:
        """Admits `seq` with up to `most` of its tokens. False if a slot or pages lack, of which `kept_for` is to have
        its own: else it might wait as long as others come."""
        if len(self._free_slots) <= (kept_for is not None):
            return False
        num_kept_pages = 0 if kept_for is None else self._most_pages(kept_for.num_tokens)
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
        num_held = self.pages.capacity - self.pages.num_available
        others = [*self.running, *self.arrivals.reading]
        if others and not self.forecast.fits([*others, seq], num_held, self.pages.capacity):
            seq.pages.give_back()
            return False
        self._waiting.remove(seq)
        seq.slot = self._free_slots.pop()
        seq.num_computed = seq.num_settled = num_cached
        seq.num_read = 0
        if seq.pages.unread:
            self._load(seq)
        else:
            self._enter(seq)
            self.chunk(plan, seq, min(seq.num_to_compute, most))
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
        seq.num_untold, seq.num_admitted = 0, len(seq.token_ids)  # the admission has all
        self.running.append(seq)
        self._entering.append(seq)

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
        told = []
        sampled = iter(zip(result.token_ids, result.finite, strict=True))
        for index, (chunk, seq) in enumerate(zip(plan.step.chunks, plan.sequences, strict=True)):
            seq.num_in_flight -= 1
            seq.num_drafted = 0 if chunk.drafts else seq.num_drafted
            if index in result.prompt_logprobs:
                outputs.take_prompt_logprobs(seq, chunk.start, result.prompt_logprobs[index])
            if seq.pooled is not None and not seq.finished and index in result.pooled:
                seq.pooled.add(chunk.start, result.pooled[index])
                seq.num_settled = chunk.end
                if chunk.end == seq.num_prompt_tokens:
                    self._acquit(seq)
                    told.append(self._taken(seq, outputs.take_pooled(seq, seq.pooled.finish())))
            if chunk.samples:
                token_ids, finite = next(sampled)
                seq.num_sampled_ahead -= 1
                self._acquit(seq)
                if not seq.finished:
                    seq.num_computed += len(token_ids) - 1
                    seq.num_settled = chunk.end if seq.num_in_flight else seq.num_computed
                    output = outputs.take_tokens(seq, token_ids, finite, result.logprobs.get(index))
                    if not seq.tainted:
                        self._register(seq)
                    told.append(self._taken(seq, output))
            elif seq.tells_progress and not seq.finished and not seq.num_generated:
                told.append(outputs.progress(seq, chunk.end))
            seq.num_settled = chunk.end if seq.num_in_flight else seq.num_computed
            if seq.finished and seq.num_in_flight == 0:
                self._leaving.pop(seq.id, None)
                self._give_back(seq)
        return told

    def _taken(self, seq: Sequence, output: EngineOutput) -> EngineOutput:
        if not seq.tainted:
            self._save(seq)
        if output.finish_reason is not None:
            if seq.pooled is None and output.error is None:
                self.forecast.ended(seq.num_generated)
            self._finish(seq)
        return output

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
        return self._taken(seq, outputs.take_told(seq, output, token_ids)) if token_ids else output

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

    def blame(self, sequences: Seq[Sequence], error: str, max_trials: int = _MAX_TRIALS) -> list[EngineOutput]:
        """Finds whose fault it is that a step of these sequences, oldest first, failed; that request ends with `error`.

        Each is computed alone to its next token, and is at fault if that fails. Where none does, so many times, it is
        what they are together that fails, and the newest gives way.
        """
        if not self._suspects and any(seq.num_trials < max_trials for seq in sequences):
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
            self._waiting.prepend(suspect, self._num_uncached(suspect), FIRST, suspect.client)
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
        self._shares.leave(seq.client)
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
