"""How much the holder of a key may ask for: requests and tokens a minute."""

from __future__ import annotations

import math
import time
from collections.abc import Callable


class Bucket:
    """Fills at so much a minute, up to a minute's worth. What is taken may be more than it holds: that is made up for
    before the next is given."""

    def __init__(self, per_minute: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_minute = per_minute
        self._most = max(per_minute, 1.0)
        self._level = self._most
        self._clock = clock
        self._filled_s = clock()

    @property
    def level(self) -> float:
        if math.isinf(self.per_minute):
            return math.inf
        now_s = self._clock()
        self._level = min(self._most, self._level + (now_s - self._filled_s) * self.per_minute / 60)
        self._filled_s = now_s
        return self._level

    def take(self, amount: float) -> None:
        self._level = self.level - amount

    def seconds_until(self, amount: float) -> float:
        """Until it holds that much."""
        lacks = amount - self.level
        return 0.0 if lacks <= 0 else lacks * 60 / self.per_minute


class Meter:
    """Of one client, whichever of its keys it uses."""

    def __init__(self, requests: float, tokens: float, clock: Callable[[], float] = time.monotonic) -> None:
        """A minute."""
        self.requests = Bucket(requests, clock)
        self.tokens = Bucket(tokens, clock)

    def admit(self) -> tuple[float, str]:
        """Takes one request; or says for how many seconds there is no room for it, and which limit that is."""
        waits = self.requests.seconds_until(1), self.tokens.seconds_until(1)
        if not any(waits):
            self.requests.take(1)
            return 0.0, ""
        bucket, unit = (self.requests, "requests") if waits[0] >= waits[1] else (self.tokens, "tokens")
        return max(waits), f"{bucket.per_minute:.10g} {unit} a minute"

    def spend(self, tokens: int) -> None:
        self.tokens.take(tokens)

    def headers(self) -> dict[str, str]:
        """As OpenAI's clients read them."""
        found = {}
        for name, bucket in (("requests", self.requests), ("tokens", self.tokens)):
            if math.isfinite(bucket.per_minute):
                level = bucket.level
                full_s = bucket.seconds_until(max(bucket.per_minute, 1.0))
                found[f"x-ratelimit-limit-{name}"] = f"{bucket.per_minute:.10g}"
                found[f"x-ratelimit-remaining-{name}"] = str(max(0, math.floor(level)))
                found[f"x-ratelimit-reset-{name}"] = f"{full_s:.3f}".rstrip("0").rstrip(".") + "s"
        return found


def meter_of(requests: float, tokens: float) -> Meter | None:
    return None if math.isinf(requests) and math.isinf(tokens) else Meter(requests, tokens)
