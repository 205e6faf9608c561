"""How clients share the tokens of steps that read prompts."""

from __future__ import annotations

from collections import Counter


class Shares:
    """Counts what was read of each client's prompts; who has least goes first.

    As in "Fairness in Serving Large Language Models" (Sheng et al., OSDI 2024): a client that comes, or comes back,
    has what the one has who has least of those that are there. So nobody saves up for later, and nobody pays for what
    nobody else wanted.
    """

    def __init__(self) -> None:
        self._num_read: dict[str, int] = {}
        self._num_ahead: Counter[str] = Counter()
        self._num_live: Counter[str] = Counter()

    def join(self, client: str) -> None:
        """One more request of this client."""
        if client not in self._num_live:
            least = min((self._num_read[other] for other in self._num_live), default=0)
            self._num_read[client] = max(self._num_read.get(client, 0), least)
        self._num_live[client] += 1

    def leave(self, client: str) -> None:
        self._num_live[client] -= 1
        if self._num_live[client]:
            return
        del self._num_live[client]
        self._num_ahead.pop(client, None)
        # What is not above all others is what it would come back with.
        least = min((self._num_read[other] for other in self._num_live), default=None)
        for other in self._num_read.keys() - self._num_live.keys():
            if least is None or self._num_read[other] <= least:
                del self._num_read[other]

    def charge(self, client: str, num_tokens: int) -> None:
        self._num_read[client] += num_tokens

    def num_read(self, client: str) -> int:
        """To compare with others'."""
        return self._num_read[client]

    def num_ahead(self, client: str) -> int:
        """Tokens of short prompts that went ahead of the client's oldest one, and that this has not caught up with."""
        return self._num_ahead[client]

    def go_ahead(self, client: str, num_tokens: int) -> None:
        self._num_ahead[client] = max(self._num_ahead[client] + num_tokens, 0)
