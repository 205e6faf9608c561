"""The API process's view of the engine: start it, send requests, receive tokens, know whether it is well."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from pathlib import Path

from ingle.channel import Abort, AsyncChannel, ChannelClosed, EngineInfo, EngineStats, Failed, Progress, Start
from ingle.config import EngineConfig
from ingle.errors import EngineError
from ingle.request import EngineOutput, EngineRequest, check_token_ids

STALL_S = 60.0
"""A busy engine that finishes no step for this long is reported as unhealthy."""
_EXIT_S = 5.0
_THREAD_POOL = {"GOMP_SPINCOUNT": "2000"}
"""PyTorch's CPU threads spin for milliseconds before they sleep: on a core that another process wants, each parallel
operator then waits for a time slice. A short spin keeps the pace of an idle machine, and most of it on a busy one."""


@dataclass(frozen=True)
class HealthStatus:
    ok: bool
    detail: str


class EngineProcess:
    """The child process and our end of its channel. It starts importing at once, before anything is awaited."""

    def __init__(self, config: EngineConfig, path: Path) -> None:
        self.start_message = Start(config, str(path))
        self.socket, theirs = socket.socketpair()
        with theirs:
            self._popen = subprocess.Popen(
                [sys.executable, "-m", "ingle.engine.process", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env={**_THREAD_POOL, **os.environ},
            )

    def exit_text(self) -> str:
        """Why the process ended, as far as its exit code tells."""
        try:
            code = self._popen.wait(timeout=_EXIT_S)
        except subprocess.TimeoutExpired:
            return "it closed its channel but still runs"
        if code < 0:
            name = signal.Signals(-code).name
            return f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
        return f"exit code {code}"

    def stop(self) -> None:
        """Ends the process, by force if it does not go by itself."""
        self.socket.close()
        try:
            self._popen.wait(timeout=_EXIT_S)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()


class EngineClient:
    """Requests to a running engine. Use `connect`, then `generate`; `closed` is set when the engine has gone."""

    def __init__(self, process: EngineProcess, channel: AsyncChannel, info: EngineInfo) -> None:
        self.info = info
        self.stats = EngineStats()
        self.closed = asyncio.Event()
        self.failure: str | None = None
        self._closing = False
        self._process = process
        self._channel = channel
        self._queues: dict[str, asyncio.Queue[EngineOutput | None]] = {}
        self._last_message = time.monotonic()
        self._reader = asyncio.create_task(self._read())

    @classmethod
    async def connect(cls, process: EngineProcess, report: Callable[[str], None] = lambda stage: None) -> EngineClient:
        """Waits until the engine is loaded. Raises `EngineError` with the engine's own words when it cannot."""
        channel = await AsyncChannel.open(process.socket)
        channel.send(process.start_message)
        while True:
            try:
                message = await channel.receive()
            except ChannelClosed:
                text = await asyncio.to_thread(process.exit_text)
                raise EngineError(f"the engine ended while it was loading: {text}") from None
            if isinstance(message, EngineInfo):
                return cls(process, channel, message)
            if isinstance(message, Failed):
                raise EngineError(message.message)
            if isinstance(message, Progress):
                report(message.stage)

    async def generate(self, request: EngineRequest) -> AsyncGenerator[EngineOutput, None]:
        """The request's outputs until it finishes. Closing or cancelling the iteration aborts it in the engine.

        Raises `RequestError` before the first output for token ids that the model lacks, `EngineError` when the
        engine is gone.
        """
        check_token_ids(request.sampling, self.info.vocab_size)
        if self.failure is not None:
            raise EngineError(self.failure)
        queue: asyncio.Queue[EngineOutput | None] = asyncio.Queue()
        if not self._queues:
            self._last_message = time.monotonic()  # idle until now: the stall clock starts here
        self._queues[request.id] = queue
        self._channel.send(request)
        finished = False
        try:
            while not finished:
                output = await queue.get()
                if output is None:
                    raise EngineError(self.failure or "the engine is gone")
                finished = output.finish_reason is not None
                yield output
        finally:
            del self._queues[request.id]
            if not finished and self.failure is None and not self._closing:
                self._channel.send(Abort(request.id))

    def health(self) -> HealthStatus:
        """Well means: alive, and steps progress while requests are pending."""
        if self.failure is not None:
            return HealthStatus(False, self.failure)
        silent_s = time.monotonic() - self._last_message
        if self._queues and silent_s > STALL_S:
            return HealthStatus(
                False, f"{len(self._queues)} requests are pending and no step ended for {silent_s:.0f} s"
            )
        return HealthStatus(True, f"{self.stats.num_running} requests running, {self.stats.num_waiting} waiting")

    async def _read(self) -> None:
        try:
            while self.failure is None:
                message = await self._channel.receive()
                self._last_message = time.monotonic()
                if isinstance(message, Failed):
                    self.failure = f"the engine failed: {message.message}"
                elif not isinstance(message, (EngineInfo, Progress)):
                    self.stats = message.stats
                    for output in message.outputs:
                        queue = self._queues.get(output.id)
                        if queue is not None:
                            queue.put_nowait(output)
        except ChannelClosed:
            self.failure = f"the engine died: {await asyncio.to_thread(self._process.exit_text)}"
        for queue in self._queues.values():
            queue.put_nowait(None)
        self.closed.set()

    async def close(self) -> None:
        """Ends the engine; requests still running are dropped."""
        self._closing = True
        self._reader.cancel()
        self._channel.close()
        await asyncio.to_thread(self._process.stop)
