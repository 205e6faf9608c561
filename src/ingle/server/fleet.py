"""The engines that a server has started, and ends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from ingle.channel import Share
from ingle.config import EngineConfig
from ingle.server.engine_process import EngineProcess, StartedEngine

if TYPE_CHECKING:
    from typing_extensions import Self

    from ingle.server.nodes import Nodes

Start = Callable[[int], StartedEngine]
"""Starts the replica of that number, which waits to be told what to load."""


def start_here(index: int) -> StartedEngine:
    return EngineProcess()


class Fleet:
    """One engine for each of `--data-parallel-size`. Leaving the context ends those that were started here."""

    def __init__(self, first: StartedEngine, config: EngineConfig, start: Start = start_here) -> None:
        """`first` runs already, since before the flags were read: whoever started it ends it.

        Raises `ConfigError` where the machine has not what they take.
        """
        self.engines = [first]
        self._places = [(config, Share())]
        self._nodes: Nodes | None = None
        if config.parallel.data_parallel_size > 1 and config.parallel.distributed_executor_backend == "ray":
            from ingle.server.nodes import Nodes

            self._nodes = Nodes(config)
            self._places, start = self._nodes.places, self._nodes.start
        elif config.parallel.data_parallel_size > 1:
            from ingle.server.places import places

            self._places = places(config)
        try:
            for index in range(1, config.parallel.data_parallel_size):
                self.engines.append(start(index))
        except BaseException:
            self.close()
            raise

    def load(self, path: Path) -> None:
        """Tells all of them what to load."""
        for engine, (config, share) in zip(self.engines, self._places, strict=True):
            engine.load(config, path, share)

    def kill(self) -> None:
        for engine in self.engines:
            engine.kill()

    def close(self) -> None:
        for engine in self.engines[1:]:
            engine.end()
        for engine in self.engines[1:]:
            engine.stop()
        if self._nodes is not None:
            self._nodes.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
