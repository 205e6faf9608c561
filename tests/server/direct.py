"""A served model whose engine is a real one, in this process: the event loop steps it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ingle.channel import EngineInfo
from ingle.config import EngineConfig, TextConfig
from ingle.engine.build import build_engine
from ingle.engine.engine import Engine
from ingle.request import EngineOutput, EngineRequest
from ingle.server.models import ServedModel
from ingle.text.load import load_text_side

from .fakes import Health


@dataclass
class DirectEngine:
    engine: Engine
    info: EngineInfo
    queues: dict[str, asyncio.Queue[EngineOutput]] = field(default_factory=dict)
    aborted: list[str] = field(default_factory=list)

    def health(self) -> Health:
        return Health()

    async def generate(self, request: EngineRequest) -> AsyncGenerator[EngineOutput, None]:
        self.engine.add(request)
        queue = self.queues[request.id] = asyncio.Queue()
        finished = False
        try:
            while not finished:
                while queue.empty():
                    await asyncio.sleep(0)  # whoever else comes now shares the step
                    for output in self.engine.step() if queue.empty() else ():
                        if output.id in self.queues:
                            self.queues[output.id].put_nowait(output)
                output = queue.get_nowait()
                finished = output.finish_reason is not None
                yield output
        finally:
            del self.queues[request.id]
            if not finished:
                self.engine.abort(request.id)
                self.aborted.append(request.id)


def direct_model(folder: Path, name: str = "tiny", **options: Any) -> ServedModel:
    given = {"dtype": "float32", "device": "cpu", "kv_cache_memory": "8MiB", **options}
    engine, info = build_engine(EngineConfig.of(str(folder), **given), folder)
    return ServedModel(
        engine=DirectEngine(engine, info),  # type: ignore[arg-type]
        text=load_text_side(folder, TextConfig()),
        names=(name,),
        root=name,
    )
