"""Loads a model to be served: its engine in a process of its own, its text side here."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from ingle.config import ServeConfig
from ingle.errors import Collected, IngleError, errors_in
from ingle.hub.resolve import ModelSource
from ingle.server.engine_client import EngineClient
from ingle.server.engine_process import StartedEngine
from ingle.server.models import ServedModel
from ingle.server.names import ServedNames, served_names
from ingle.server.queue import RequestQueue
from ingle.server.replicas import ReplicaSet, ServedEngine
from ingle.text.load import TextSide, load_text_side

_OTHERS_S = 10.0
"""For the other half of a start to say what it refuses, when one has."""
T = TypeVar("T")


async def load_model(
    processes: Sequence[StartedEngine], config: ServeConfig, source: ModelSource, report: Callable[[str], None]
) -> ServedModel:
    """Both sides of a model that the `processes` were told to load, at the same time. What either refuses is raised at
    once, together with what the other does."""
    checked = asyncio.Event()
    text = asyncio.create_task(_in_thread(lambda: load_text_side(source.path, config.text, source.recommended)))
    engine = asyncio.create_task(_connected(processes, config, report, checked.set))
    try:
        await asyncio.wait({text, engine}, return_when=asyncio.FIRST_EXCEPTION)
        if text.done() and text.exception() is not None:
            await _first({engine}, checked.wait())
        elif engine.done() and engine.exception() is not None and not checked.is_set():
            await asyncio.wait({text}, timeout=_OTHERS_S)
        found = Collected()
        for task in (engine, text):
            if task.done() and (error := task.exception()) is not None:
                if not isinstance(error, IngleError):
                    raise error
                for each in errors_in(error):
                    found.add(each)
        found.raise_any()
        return _served(engine.result(), text.result(), config, source)
    finally:
        for task in (engine, text):
            task.cancel()


async def _connected(
    processes: Sequence[StartedEngine], config: ServeConfig, report: Callable[[str], None], checked: Callable[[], None]
) -> ServedEngine:
    health, interval = config.server.health, config.server.stream_interval
    if len(processes) == 1:
        return await EngineClient.connect(processes[0], report, checked, health, interval)
    return await ReplicaSet.connect(processes, config.engine, report, checked, health, interval)


async def _first(tasks: set[asyncio.Task[ServedEngine]], awaitable: Awaitable[object]) -> None:
    """Until a task has ended, or the other comes, for some seconds at most."""
    other = asyncio.ensure_future(awaitable)
    await asyncio.wait({*tasks, other}, timeout=_OTHERS_S, return_when=asyncio.FIRST_COMPLETED)
    other.cancel()


async def _in_thread(function: Callable[[], T]) -> T:
    """In a thread that nobody waits for when the server is told to end."""
    future: concurrent.futures.Future[T] = concurrent.futures.Future()

    def run() -> None:
        with contextlib.suppress(concurrent.futures.InvalidStateError):  # given up meanwhile
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

    threading.Thread(target=run, name="text side", daemon=True).start()
    return await asyncio.wrap_future(future)


def _served(engine: ServedEngine, text: TextSide, whole: ServeConfig, source: ModelSource) -> ServedModel:
    config, names = whole.server, served_names(source, whole.engine.model)
    engine.max_unread_bytes = config.limits.max_unread_bytes
    if config.served_model_name:
        names = ServedNames(config.served_model_name)
    return ServedModel(
        engine=engine,
        text=text,
        names=names.shown,
        root=str(source.path) if config.show_paths else names.shown[0],
        also=names.also,
        queue=RequestQueue(config.limits.max_num_queued_reqs, config.limits.max_num_queued_tokens),
    )
