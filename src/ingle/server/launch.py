"""`ingle serve`: binds the port, starts the engine's process, loads the text side meanwhile, and serves."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import json
import logging
import os
import re
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ingle import facts
from ingle.config import ServeConfig, ServerConfig, parse_bytes
from ingle.config.access import ListenConfig
from ingle.config.monitoring import MonitoringConfig
from ingle.errors import EngineError
from ingle.home import home
from ingle.hub.resolve import ModelSource, ensure_model
from ingle.server.access import Access, Keys
from ingle.server.batch.store import Store
from ingle.server.engine_client import for_the_log
from ingle.server.engine_process import EngineProcess
from ingle.server.fleet import Fleet
from ingle.server.followed import FollowedFiles
from ingle.server.http_limits import HttpLimits, allow_connections
from ingle.server.listening import is_local, listening
from ingle.server.load_model import load_model
from ingle.server.loading import Loading
from ingle.server.logs import BackgroundLog, formatter
from ingle.server.models import ModelPool, ServedModel
from ingle.server.observers import Observers
from ingle.server.replicas import ServedEngine
from ingle.server.request_log import RequestsLog
from ingle.server.running import UNIX, announced, url_of
from ingle.server.stats_log import log_stats
from ingle.server.stopping import Deadline, stop_while_loading
from ingle.server.tls import Certificate, key_notice
from ingle.server.tracing import Tracer
from ingle.text.formats.detect import in_words
from ingle.text.sandbox import sandboxes

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from ingle.server.graceful import GracefulServer

_SWITCH_INTERVAL_S = 0.001
"""After which a busy thread lets the event loop run, which by default is 5 ms for each event."""
_LEAST_KEY = 16
"""Characters of a key that is not found by trying."""
_COLLECT_AFTER = (700, 10, 100)
"""Objects, and collections of the young and of those of middle age, until the next. To look through all that a thousand
requests hold takes a quarter of a second, in which nobody is answered; by itself Python does so ten times as often."""
logger = logging.getLogger("ingle")


def run_server(process: EngineProcess, config: ServeConfig) -> None:
    """Serves until interrupted, by a `process` that waits to be told what to load.

    Raises an `IngleError` when it cannot start, or when the engine fails on the way.
    """
    started = time.perf_counter()
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    log = BackgroundLog(sys.stderr.fileno())
    log.setFormatter(formatter(config.server.monitoring.log_format))
    logging.basicConfig(level=config.server.log_level.upper(), handlers=[log])
    logging.getLogger("uvicorn").setLevel(max(logging.WARNING, logging.getLogger().level))  # the log has our words
    observers = observers_of(config.server.monitoring)
    fleet = Fleet(process, config.engine)
    deadline = Deadline(fleet, config.server.health.shutdown_timeout)
    stop_while_loading(deadline)
    try:
        with fleet:
            _bind_and_serve(fleet, deadline, config, observers, started)
    finally:
        if observers.tracer is not None:
            observers.tracer.close()
        log.flush()  # before the last words of the command itself


@dataclass(frozen=True)
class Start:
    """What a server is started with."""

    config: ServeConfig
    source: ModelSource
    fleet: Fleet
    sock: socket.socket
    started_s: float
    certificate: Certificate | None = None
    observers: Observers = field(default_factory=Observers)

    @property
    def url(self) -> str:
        """As this machine reaches it."""
        return url_of(self.sock, "http" if self.certificate is None else "https")


def observers_of(config: MonitoringConfig) -> Observers:
    """Raises `ConfigError` where spans cannot be sent."""
    endpoint = config.otlp_traces_endpoint
    return Observers(
        tracer=None if endpoint is None else Tracer.to(endpoint),
        requests=RequestsLog(config.max_log_len) if config.log_requests else None,
    )


def _bind_and_serve(
    fleet: Fleet, deadline: Deadline, config: ServeConfig, observers: Observers, started: float
) -> None:
    certificate = _certificate(config.server.listen)
    with listening(config.server) as sock:
        source = ensure_model(config.engine.model)
        fleet.load(Path(source.path))
        start = Start(config, source, fleet, sock, started, certificate, observers)
        import uvloop  # from here on, imports run while the engine's process loads

        uvloop.run(_serve(start, deadline))


def _certificate(config: ListenConfig) -> Certificate | None:
    """Raises `ConfigError`."""
    return None if config.ssl_certfile is None else Certificate(config)


async def _serve(start: Start, deadline: Deadline) -> None:
    """Answers from the first moment: that the model is being loaded, and then for it."""
    # Else pydantic looks through all packages there are for plugins, and runs what it finds.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "1")
    from ingle.server.app import create_app
    from ingle.server.graceful import GracefulServer
    from ingle.server.responses.store import ResponseStore

    config, loading, pool = start.config.server, Loading(), ModelPool()
    access = access_of(config, start.sock)
    logger.info("listening on %s; /health says how far the model is", start.url)
    app = create_app(
        pool,
        access,
        access_log=not config.disable_access_log,
        strict_fields=config.strict_fields,
        page=config.page,
        limits=config.limits,
        loading=loading,
        responses=ResponseStore(config.response_store_bytes(), config.response_store_hours * 3600.0),
        observers=start.observers,
    )
    server = GracefulServer(app, _limits(config), deadline, start.certificate, config.listen.proxies)

    async def load() -> None:
        try:
            model = await load_model(start.fleet.engines, start.config, start.source, loading.report)
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
        gc.set_threshold(*_COLLECT_AFTER)
        with announced(model.names, model.info, start.url, config.health.shutdown_timeout):
            _announce(model, access, start)
            await _stop_with_engine(model.engine, server, deadline)

    tasks = [asyncio.create_task(load()), asyncio.create_task(loading.watch())]
    working = [asyncio.create_task(start.observers.statistics.watch_loop())]
    if not config.monitoring.disable_log_stats:
        working.append(asyncio.create_task(log_stats(pool)))
    working += [asyncio.create_task(files.follow()) for files in _followed(config, start.certificate, app.state.keys)]
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
        raise EngineError(for_the_log(server.engine.failure))


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
    return Store(root, parse_bytes("--max-files-size", config.max_files_size), limits=config.limits)


async def _stop_with_engine(engine: ServedEngine, server: GracefulServer, deadline: Deadline) -> None:
    """A server whose engine is gone, and gets no other, answers nothing: it ends, so that whoever supervises it starts
    it anew."""
    await engine.closed.wait()
    deadline.start(serving=True, code=1)
    server.should_exit = True


def access_of(config: ServerConfig, sock: socket.socket) -> Access:
    """Who gets in. A server that asks for no key may be reached through any browser near it: it answers to no name that
    a page on the internet can have. With keys, names are its owner's business."""
    keys, given = config.access.all_keys(), config.access.allowed_hosts
    access = Access(
        api_keys=keys,
        allowed_hosts=() if "*" in given else given,
        cors_origins=config.access.cors_origins(),
        root_path=config.listen.prefix,
        is_local=is_local(sock),
    )
    if given or not isinstance(sock.getsockname(), tuple):  # no browser speaks to a Unix socket
        return access
    if is_local(sock):
        return replace(access, allowed_hosts=("localhost",))
    return replace(access, local_names=not access.asks_for_key)


def _limits(config: ServerConfig) -> HttpLimits:
    wanted = config.limits.max_connections
    allowed = allow_connections(wanted)
    if allowed < wanted:
        logger.warning(
            "notice: of --max-connections %d the limit of file descriptors (ulimit -n) leaves %d",
            wanted, allowed,
        )  # fmt: skip
    return HttpLimits.of(config.limits, allowed)


def _announce(model: ServedModel, access: Access, start: Start) -> None:
    name, info = model.name, model.info
    for notice in _notices_of_access(access, start):
        logger.warning("notice: %s", notice)
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
    if start.config.server.page and not start.url.startswith(UNIX):
        logger.info("talk to it in a browser: %s%s/", start.url, access.root_path)
    seconds = time.perf_counter() - start.started_s
    logger.info("ready in %.2f s (engine: %s); %s", seconds, phases, _base(start.url))


def _followed(config: ServerConfig, certificate: Certificate | None, keys: Keys) -> Iterator[FollowedFiles]:
    """What is read again when it changes."""
    if certificate is not None:
        yield certificate.files
    if (path := config.access.api_key_file) is not None:
        yield FollowedFiles("the file of keys", [path], lambda: keys.take(config.access.all_keys()))


def _notices_of_access(access: Access, start: Start) -> Iterator[str]:
    certificate = start.certificate
    if not is_local(start.sock) and not access.asks_for_key and not (certificate and certificate.asks_clients):
        host, port = start.sock.getsockname()[:2]
        yield f"whoever reaches {host} port {port} may use the model: --api-key asks for a key"
    short = [key for key in access.api_keys if len(key.key) < _LEAST_KEY] if not is_local(start.sock) else []
    for key in short:
        yield f"{key.name} of {len(key.key)} characters is guessed soon: `openssl rand -hex 24` makes a better one"
    if "*" in access.cors_origins and not access.asks_for_key:
        yield "any page that somebody near this server opens may use the model: --cors-origin names sites"
    if certificate is not None:
        yield from filter(None, [key_notice(start.config.server.listen)])


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


def _base(url: str) -> str:
    """What clients are told."""
    if url.startswith(UNIX):
        return f"base URL: http://localhost/v1, at the socket {url.removeprefix(UNIX)}"
    return f"base URL: {url}/v1"


def _curl(url: str, path: str, key: str, body: dict[str, object]) -> str:
    shown = json.dumps(body, ensure_ascii=False).replace("'", "\\u0027")  # no quote ends the shell's
    if url.startswith(UNIX):
        where = f"--unix-socket {shlex.quote(url.removeprefix(UNIX))} http://localhost"
    else:  # the certificate is hardly in the name of an address
        where = f"-k {url}" if url.startswith("https:") else url
    return f"curl {where}/v1/{path}{key} -H 'Content-Type: application/json' -d '{shown}'"
