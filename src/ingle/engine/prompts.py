"""Which prompts a step reads, and how much of each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

from ingle.engine.sequence import Plan, Sequence
from ingle.engine.shares import Shares
from ingle.engine.waiting import Line, WaitingQueue


class Computes(Protocol):
    """Has slots and pages."""

    def chunk(self, plan: Plan, seq: Sequence, wanted: int) -> None:
        """Adds up to so many tokens of a sequence to a plan, as far as its tokens and pages go."""
        ...

    def start(self, plan: Plan, seq: Sequence, most: int, kept_for: Sequence | None = None) -> bool:
        """The same for one that waits; False, with nothing done, if slots or pages lack, also for `kept_for`."""
        ...


class PromptReader:
    """Gives the tokens that a step has left to prompts: those of the lowest priority first, by turns of clients."""

    def __init__(self, on: Computes, waiting: WaitingQueue[Sequence], shares: Shares, most_ahead: int) -> None:
        """`most_ahead`: tokens by which short prompts go ahead of others."""
        self._on = on
        self._waiting = waiting
        self._shares = shares
        self._most_ahead = most_ahead

    def read(self, plan: Plan, prefills: list[Sequence], running: set[str]) -> Sequence | None:
        """Plans prompts that are being read, `prefills`, or wait. `running`: the clients of whom something runs.

        Returns the one whose turn it was when slots or pages lacked: it waits for them, and all others behind it.
        """
        blocked: Sequence | None = None
        for priority in sorted({*self._waiting.priorities, *(seq.priority for seq in prefills)}):
            of_priority = [seq for seq in prefills if seq.priority == priority]
            lines = self._waiting.lines(priority) if blocked is None else {}
            prompts = Prompts(of_priority, lines, running, self._shares)
            self._read_short(plan, prompts)
            prompts.admits = True
            while plan.num_left > 0 and (seq := prompts.next()) is not None:
                num_read = self._read(plan, prompts, seq, plan.num_left)
                if num_read is None:
                    blocked, prompts.admits = seq, False
                else:
                    self._shares.go_ahead(seq.client, -num_read)
        return blocked

    def _read_short(self, plan: Plan, prompts: Prompts) -> None:
        """Short prompts go ahead of long ones, by half of the largest step at most.

        So a short prompt does not wait for a long one that came before it, and the sum of both waits is not longer for
        it; a long one is read at half speed at least, however many short ones come. Prompts of like lengths are read
        one after the other: shared out equally, all would end late.
        """
        while plan.num_left > 0 and (found := prompts.next_short(plan.num_left, self._most_ahead)) is not None:
            seq, most = found
            head = prompts.next_waiting
            num_read = self._read(plan, prompts, seq, min(most, plan.num_left), None if seq is head else head)
            if num_read is None:
                prompts.admits = False
            else:
                self._shares.go_ahead(seq.client, num_read)

    def _read(
        self, plan: Plan, prompts: Prompts, seq: Sequence, most: int, kept_for: Sequence | None = None
    ) -> int | None:
        """Plans up to `most` tokens of a prompt, and returns how many; None if it waits for slots or pages."""
        num_before = plan.step.num_tokens
        if seq.slot >= 0:
            prompts.drop(seq)
            self._on.chunk(plan, seq, min(seq.num_to_compute, most))
        elif self._on.start(plan, seq, most, kept_for):
            prompts.started(seq)
        else:
            return None
        num_read = plan.step.num_tokens - num_before
        self._shares.charge(seq.client, num_read)
        return num_read


class Prompts:
    """The prompts of one priority that are left for a step, each client's apart.

    A client's turn comes when nothing of it runs, and else when it has read least. Its prompts are read in order, those
    that are being read before those that wait, but that short ones go ahead.
    """

    def __init__(
        self,
        prefills: Iterable[Sequence],
        lines: Mapping[str, Line[Sequence]],
        running: set[str],
        shares: Shares,
    ) -> None:
        """`running`: the clients of whom something runs, which starts change."""
        self._prefills: dict[str, list[Sequence]] = {}
        """By client, in order of admission."""
        for seq in prefills:
            self._prefills.setdefault(seq.client, []).append(seq)
        self._lines = lines
        self._running = running
        self._shares = shares
        self.admits = True
        """Whether one that waits may start. What is short of slots or pages waits for them, and all others behind it:
        else it might wait as long as others come."""
        self._short = max(map(self._num_tokens, self._oldest()), default=0) // 2
        """Prompts of so many tokens are short."""
        self._least = min(map(shares.num_read, self._clients()), default=0)

    def next(self) -> Sequence | None:
        """The oldest prompt of the client whose turn it is."""
        return min(self._oldest(), key=self._turn, default=None)

    @property
    def next_waiting(self) -> Sequence | None:
        """The next of those that wait for a slot."""
        return min((line.head for line in self._lines.values() if line), key=self._turn, default=None)

    def next_short(self, num_left: int, most_ahead: int) -> tuple[Sequence, int] | None:
        """The shortest prompt of the client whose turn it is among those that have short ones, and how many tokens of
        it may go ahead in a step that has `num_left`.

        Short ones go ahead of what is long and of the turns of other clients by `most_ahead` tokens, and as far as the
        step has room for both; more of them wait until the others caught up.
        """
        found = []
        for client in self._clients():
            seq, oldest = self._shortest(client), self._oldest_of(client)
            if seq is None or oldest is None or self._num_tokens(seq) > self._short:
                continue
            room = most_ahead - (self._shares.num_read(client) - self._least)
            if (length := self._num_tokens(oldest)) > self._short:
                room = min(room, max(most_ahead - self._shares.num_ahead(client), num_left - length))
            if room > 0:
                found.append((seq, room))
        return min(found, key=lambda entry: self._turn(entry[0]), default=None)

    def drop(self, seq: Sequence) -> None:
        """Takes out one that is being read."""
        prefills = self._prefills[seq.client]
        prefills.remove(seq)
        if not prefills:
            del self._prefills[seq.client]

    def started(self, seq: Sequence) -> None:
        """One that waited runs now."""
        self._running.add(seq.client)

    def _clients(self) -> Iterator[str]:
        yield from self._prefills
        yield from (client for client, line in self._lines.items() if line and client not in self._prefills)

    def _oldest(self) -> Iterator[Sequence]:
        for client in self._clients():
            if (seq := self._oldest_of(client)) is not None:
                yield seq

    def _oldest_of(self, client: str) -> Sequence | None:
        if client in self._prefills:
            return self._prefills[client][0]
        return self._lines[client].head if self.admits else None

    def _shortest(self, client: str) -> Sequence | None:
        found = list(self._prefills.get(client, ()))
        if self.admits and (line := self._lines.get(client)):
            found.append(line.shortest)
        return min(found, key=self._num_tokens, default=None)

    def _num_tokens(self, seq: Sequence) -> int:
        """To be computed; of one that waits, as known when it came."""
        return seq.num_to_compute if seq.slot >= 0 else self._lines[seq.client].num_tokens(seq)

    def _turn(self, seq: Sequence) -> tuple[bool, int, int]:
        return seq.client in self._running, self._shares.num_read(seq.client), seq.arrival
