"""`ingle serve`: binds the port, starts the engine's process, loads the text side meanwhile, and serves."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import ipaddress
import json
import logging
import os
import re
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ingle import facts
from ingle.config import ServeConfig, ServerConfig, parse_bytes
from ingle.config.access import AccessConfig
from ingle.errors import EngineError
from ingle.home import home
from ingle.hub.resolve import ModelSource, ensure_model
from ingle.server.access import Access
from ingle.server.batch.store import Store
from ingle.server.engine_client import EngineClient
from ingle.server.engine_process import EngineProcess
from ingle.server.http_limits import HttpLimits, allow_connections
from ingle.server.listening import bind
from ingle.server.load_model import load_model
from ingle.server.loading import Loading
from ingle.server.logs import LINE, TIME, BackgroundLog
from ingle.server.models import ModelPool, ServedModel
from ingle.server.running import announced, url_of
from ingle.server.stopping import Deadline, stop_while_loading
from ingle.text.formats.detect import in_words
from ingle.text.sandbox import sandboxes

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from ingle.server.graceful import GracefulServer

_SWITCH_INTERVAL_S = 0.001
"""After which a busy thread lets the event loop run, which by default is 5 ms for each event."""
logger = logging.getLogger("ingle")


def run_server(process: EngineProcess, config: ServeConfig) -> None:
    """Serves until interrupted, by a `process` that waits to be told what to load.

    Raises an `IngleError` when it cannot start, or when the engine fails on the way.
    """
    started = time.perf_counter()
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    log = BackgroundLog(sys.stderr.fileno())
    logging.basicConfig(level=config.server.log_level.upper(), format=LINE, datefmt=TIME, handlers=[log])
    logging.getLogger("uvicorn").setLevel(max(logging.WARNING, logging.getLogger().level))  # the log has our words
    deadline = Deadline(process, config.server.health.shutdown_timeout)
    stop_while_loading(deadline)
    try:
        _bind_and_serve(process, deadline, config, started)
    finally:
        log.flush()  # before the last words of the command itself


@dataclass(frozen=True)
class Start:
    """What a server is started with."""

    config: ServeConfig
    source: ModelSource
    process: EngineProcess
    sock: socket.socket
    started_s: float

    @property
    def url(self) -> str:
        """As this machine reaches it."""
        return url_of(self.sock)


def _bind_and_serve(process: EngineProcess, deadline: Deadline, config: ServeConfig, started: float) -> None:
    with bind(config.server.host, config.server.port) as sock:
        source = ensure_model(config.engine.model)
        process.load(config.engine, Path(source.path))
        start = Start(config, source, process, sock, started)
        import uvloop  # from here on, imports run while the engine's process loads

        uvloop.run(_serve(start, deadline))


async def _serve(start: Start, deadline: Deadline) -> None:
    """Answers from the first moment: that the model is being loaded, and then for it."""
    # Else pydantic looks through all packages there are for plugins, and runs what it finds.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "1")
    from ingle.server.app import create_app
    from ingle.server.graceful import GracefulServer
    from ingle.server.responses.store import ResponseStore

    config, loading, pool = start.config.server, Loading(), ModelPool()
    access = Access(config.access.keys(), _allowed_hosts(config.access, start.sock))
    logger.info("listening on %s; /health says how far the model is", start.url)
    app = create_app(
        pool,
        access,
        access_log=not config.disable_access_log,
        strict_fields=config.strict_fields,
        loading=loading,
        responses=ResponseStore(config.response_store_bytes(), config.response_store_hours * 3600.0),
    )
    server = GracefulServer(app, _limits(config), deadline, config.health.shutdown_timeout)

    async def load() -> None:
        try:
            model = await load_model(start.process, start.config, start.source, loading.report)
        except BaseException:
            server.should_exit = server.force_exit = True
            raise
        pool.add(model)
        store = app.state.store = store_of(config, model.name)
        server.engine, loading.done = model.engine, True
        if store is not None:
            working.append(asyncio.create_task(_run_batches(app, pool, store)))
        gc.freeze()
        gc.enable()
        with announced(model.names, model.info, start.sock):
            _announce(model, access, start)
            await _stop_with_engine(model.engine, server, deadline)

    tasks = [asyncio.create_task(load()), asyncio.create_task(loading.watch())]
    working: list[asyncio.Task[None]] = []
    try:
        await server.serve(sockets=[start.sock])
    finally:
        if server.engine is not None:
            await server.engine.close()
        for task in (*tasks, *working):
            task.cancel()
        sandboxes.stop()  # what waits in a thread for a template would hold up the end
    await asyncio.wait(tasks)  # raises when Ctrl-C has ended it all
    if not tasks[0].cancelled() and (error := tasks[0].exception()) is not None:
        raise error
    if server.engine is not None and server.engine.failure is not None:
        raise EngineError(server.engine.failure)


async def _run_batches(app: Starlette, pool: ModelPool, store: Store) -> None:
    from ingle.server.batch.worker import BatchWorker

    app.state.batches = BatchWorker(app, pool, store)
    try:
        await app.state.batches.run()
    except EngineError:  # there is no engine, and none to come: whichever server is next goes on
        pass
    except Exception as error:
        logger.error("batches are run no more", exc_info=error)


def store_of(config: ServerConfig, name: str) -> Store | None:
    """Where files and batches of the model served under that name are kept; None where none shall be."""
    if config.max_files_size == "0":
        return None
    if config.files_dir is not None:
        root = Path(config.files_dir).expanduser().absolute()
    else:  # a name may hold what no file's may
        kept = re.sub(r"[^\w.-]+", "-", name)[:80]
        root = home() / "served" / f"{kept}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return Store(root, parse_bytes("--max-files-size", config.max_files_size))


async def _stop_with_engine(engine: EngineClient, server: GracefulServer, deadline: Deadline) -> None:
    """A server whose engine is gone, and gets no other, answers nothing: it ends, so that whoever supervises it starts
    it anew."""
    await engine.closed.wait()
    deadline.start(serving=True, code=1)
    server.should_exit = True


def _allowed_hosts(config: AccessConfig, sock: socket.socket) -> tuple[str, ...]:
    """A server on loopback is guarded by default; one that the network reaches has names that only its owner knows."""
    if "*" in config.allowed_hosts:
        return ()
    return config.allowed_hosts or (("localhost",) if _is_loopback(sock) else ())


def _limits(config: ServerConfig) -> HttpLimits:
    allowed = allow_connections(config.max_connections)
    if allowed < config.max_connections:
        logger.warning(
            "notice: of --max-connections %d the limit of file descriptors (ulimit -n) leaves %d",
            config.max_connections, allowed,
        )  # fmt: skip
    return HttpLimits(keep_alive_s=config.timeout_keep_alive, max_connections=allowed)


def _is_loopback(sock: socket.socket) -> bool:
    """Whether only this machine reaches it: the bound address says so, not the name that was given for it."""
    address = ipaddress.ip_address(sock.getsockname()[0])
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def _announce(model: ServedModel, access: Access, start: Start) -> None:
    name, info, sock = model.name, model.info, start.sock
    if not _is_loopback(sock) and not access.asks_for_key:
        host, port = sock.getsockname()[:2]
        logger.warning("notice: whoever reaches %s port %d may use the model: --api-key asks for a key", host, port)
    for notice in [*info.notices, *model.text.notices, *model.tokenizer.hold_against(info.vocab_size)]:
        logger.warning("notice: %s", notice)
    if model.info.writes_text and model.chat_template is None:
        logger.warning("notice: the model has no chat template, so /v1/chat/completions needs --chat-template")
    elif model.chat_template is not None and model.info.writes_text:
        logger.info("%s", in_words(model.text.formats, template_knows_tools=model.chat_template.knows_tools))
    if not model.info.writes_text:
        logger.info("an embedding model (pooling: %s): it answers /v1/embeddings alone", model.text.pooling.kind)
    if model.text.reranker is not None:
        logger.info("a reranker: it answers /v1/rerank and /v1/score")
    phases = ", ".join(f"{phase} {value:.2f} s" for phase, value in info.timings_s.items())
    logger.info("%s: %s", name, facts.started(info, model.default_sampling, model.text.sampling_source))
    logger.info("try it: %s", _example(model, access, start.url))
    seconds = time.perf_counter() - start.started_s
    logger.info("ready in %.2f s (engine: %s); base URL: %s/v1", seconds, phases, start.url)


def _example(model: ServedModel, access: Access, url: str) -> str:
    """A request that this model answers."""
    key = " -H 'Authorization: Bearer YOUR_KEY'" if access.asks_for_key else ""
    body: dict[str, object] = {"model": model.name}
    if not model.info.writes_text:
        path, body["input"] = "embeddings", "Once upon a time"
        return _curl(url, path, key, body)
    if model.chat_template is not None:
        path, body["messages"] = "chat/completions", [{"role": "user", "content": "Hello!"}]
    else:
        path, body["prompt"] = "completions", "Once upon a time"
    if not model.default_sampling:
        body["temperature"] = 0.2
    body["max_tokens"] = 64
    return _curl(url, path, key, body)


def _curl(url: str, path: str, key: str, body: dict[str, object]) -> str:
    shown = json.dumps(body, ensure_ascii=False).replace("'", "\\u0027")  # no quote ends the shell's
    return f"curl {url}/v1/{path}{key} -H 'Content-Type: application/json' -d '{shown}'"
