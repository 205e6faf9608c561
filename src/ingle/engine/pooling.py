"""One vector of a prompt, chunk by chunk of it."""

from __future__ import annotations

import numpy as np

from ingle.request import Pooling


class PooledPrompt:
    """What chunks of one prompt have reported so far; a prompt that is computed again begins anew."""

    def __init__(self, pooling: Pooling, num_tokens: int) -> None:
        self.pooling = pooling
        self._num_tokens = num_tokens
        self._total = np.zeros(0)

    def wants(self, end: int) -> bool:
        """Whether a chunk of the tokens before `end` has to report."""
        return self.pooling.needs_all or end == self._num_tokens

    def add(self, start: int, reported: bytes) -> None:
        """What the chunk that begins at `start` has reported, one after the other."""
        vector = np.frombuffer(reported, "<f4").astype(np.float64)
        if start == 0 or not self.pooling.needs_all:
            self._total = vector
        else:
            self._total = self._total + vector * (1.0 if self.pooling.kind == "mean" else 0.0)

    def finish(self) -> bytes | None:
        """The whole prompt's vector, float32; None where it holds NaN or infinity."""
        pooling, vector = self.pooling, self._total
        if not np.isfinite(vector).all():
            return None
        if pooling.kind == "mean":
            vector = vector / self._num_tokens
        if pooling.dimensions is not None:
            vector = vector[: pooling.dimensions]
        if pooling.normalize:
            vector = vector / max(float(np.linalg.norm(vector)), 1e-12)
        return vector.astype("<f4").tobytes()
