"""What the engine has brought for one request and nobody has taken yet."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable

from ingle.errors import EngineError, RequestError
from ingle.request import EngineOutput, TokenLogprobs

_BYTES_PER_OUTPUT, _BYTES_PER_TOKEN, _BYTES_PER_SCORE = 300, 40, 80


class Unread:
    """Outputs of one request in their order. A stream whose client reads too little takes none any more."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._outputs: deque[EngineOutput | EngineError] = deque()
        self._changed = asyncio.Event()
        self.num_bytes = 0
        self.overrun = False

    def put(self, output: EngineOutput | EngineError) -> bool:
        """After an error there will be no more. False where it becomes too much: all is dropped, and the request is to
        be ended."""
        if self.overrun:
            return True
        self._outputs.append(output)
        self.num_bytes += _size_of(output) if isinstance(output, EngineOutput) else 0
        if len(self._outputs) > 1 and self.num_bytes > self._max_bytes:
            self.overrun = True
            self._outputs.clear()
        self._changed.set()
        return not self.overrun

    async def take(self) -> list[EngineOutput | EngineError]:
        """All that is there, once something is. Raises `RequestError` where it was too much."""
        while not self._outputs:
            if self.overrun:
                raise RequestError(
                    f"What waited to be read had more than {self._max_bytes} bytes (--max-unread-bytes): read a stream "
                    "as fast as it comes.",
                    code="slow_reader",
                    status=408,
                )
            self._changed.clear()
            await self._changed.wait()
        outputs = list(self._outputs)
        self._outputs.clear()
        self.num_bytes = 0
        return outputs


def _size_of(output: EngineOutput) -> int:
    num_scores = _num_scores(output.logprobs or ()) + _num_scores(output.prompt_logprobs or ())
    pooled = len(output.pooled or b"")
    return _BYTES_PER_OUTPUT + _BYTES_PER_TOKEN * len(output.token_ids) + _BYTES_PER_SCORE * num_scores + pooled


def _num_scores(entries: Iterable[TokenLogprobs | None]) -> int:
    return sum(len(entry.token_ids) for entry in entries if entry is not None)
