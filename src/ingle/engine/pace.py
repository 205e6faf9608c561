"""How many tokens a step takes where somebody waits for it, by how long steps took so far."""

from __future__ import annotations

from ingle.step import Limits

_MANY_DECODES = 128
_ALONE = 4
"""A step that reads prompts and gives nobody a token may take this much longer: whoever comes meanwhile waits for it,
and nobody else."""
_CALM_STEPS = 1000
"""After which a step may be twice as large again as memory allowed before."""
_FASTEST_RISE = 1.25
"""Of the time of a token from one step to the next: one that compiled something tells nothing of those that follow."""


class Pace:
    """Portions of prompts that take as long as `Limits.target_itl_s` says.

    They are the largest step halved as often as needed, so that there are few sizes, for which there are CUDA graphs.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._token_s: float | None = None
        self._most = limits.max_num_batched_tokens
        """Less than that while memory is short."""
        self._num_calm_steps = 0

    def learn(self, num_tokens: int, seconds: float) -> None:
        """Of a step that read so many tokens of prompts. Small ones tell little: they take as long as weights do."""
        if num_tokens < self._least // 2:
            return
        self._grow()
        token_s = seconds / num_tokens
        if self._token_s is not None:
            token_s = min(max(token_s, self._token_s / 2), self._token_s * _FASTEST_RISE)
        self._token_s = token_s

    def shrink(self, num_tokens: int) -> int | None:
        """A step that read so many tokens of prompts ran out of memory. Returns how many the next may read; None if it
        was of the least portion."""
        while self._most >= num_tokens and self._most // 2 >= self._least:
            self._most //= 2
        self._num_calm_steps = 0
        return self._most if self._most < num_tokens else None

    def _grow(self) -> None:
        self._num_calm_steps += 1
        if self._num_calm_steps == _CALM_STEPS:
            self._num_calm_steps = 0
            self._most = min(2 * self._most, self._limits.max_num_batched_tokens)

    def alone(self) -> int:
        """Tokens of a step that gives nobody a token."""
        return self._portion(_ALONE)

    def beside(self, num_decodes: int) -> int:
        """Tokens of a step that has so many decodes, or gives a prompt its first token.

        Once nearly all slots decode, prompts are read beside them in the least portions: the weights are read for the
        decodes anyway, and up to some number of tokens the step takes little longer for more of them. Before that new
        sequences are worth more, as with more slots in use every step yields more.
        """
        many = num_decodes >= max(_MANY_DECODES, self._limits.max_num_seqs * 7 // 8)
        portion = self._least if many else self._portion(1)
        return min(max(portion, 2 * num_decodes), self._limits.max_num_batched_tokens)

    @property
    def _least(self) -> int:
        return min(self._limits.least_portion, self._limits.max_num_batched_tokens)

    def _portion(self, share: int) -> int:
        portion, target_s = self._most, self._limits.target_itl_s
        if target_s is None or self._token_s is None:
            return portion
        while portion * self._token_s > share * target_s and portion // 2 >= self._least:
            portion //= 2
        return portion
