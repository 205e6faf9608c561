"""`ingle serve`: binds the port, starts the engine's process, loads the text side meanwhile, and serves."""

from __future__ import annotations

import asyncio
import errno
import gc
import ipaddress
import json
import logging
import os
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ingle import facts
from ingle.config import ServeConfig, ServerConfig
from ingle.errors import ConfigError, EngineError
from ingle.hub.resolve import ModelSource, ensure_model
from ingle.server.access import Access
from ingle.server.engine_client import EngineClient
from ingle.server.engine_process import EngineProcess
from ingle.server.http_limits import HttpLimits, allow_connections
from ingle.server.logs import BackgroundLog
from ingle.server.models import ModelPool, ServedModel
from ingle.server.queue import RequestQueue
from ingle.server.stopping import Deadline, stop_while_loading
from ingle.text.load import TextSide, load_text_side
from ingle.text.sandbox import sandboxes

if TYPE_CHECKING:
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
    logging.basicConfig(level=config.server.log_level.upper(), format="%(message)s", handlers=[log])
    deadline = Deadline(process)
    stop_while_loading(deadline)
    try:
        _bind_and_serve(process, deadline, config, started)
    finally:
        log.flush()  # before the last words of the command itself


def _bind_and_serve(process: EngineProcess, deadline: Deadline, config: ServeConfig, started: float) -> None:
    with bind(config.server.host, config.server.port) as sock:
        source = ensure_model(config.engine.model)
        process.load(config.engine, Path(source.path))
        import uvloop  # from here on, imports run while the engine's process loads

        uvloop.run(_serve(sock, process, deadline, source, config, started))


async def _serve(
    sock: socket.socket,
    process: EngineProcess,
    deadline: Deadline,
    source: ModelSource,
    config: ServeConfig,
    started: float,
) -> None:
    # Else pydantic looks through all packages there are for plugins, and runs what it finds.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "1")
    from ingle.server.app import create_app
    from ingle.server.graceful import GracefulServer

    try:
        text, engine = await asyncio.gather(
            asyncio.to_thread(load_text_side, source.path, config.text),
            EngineClient.connect(process, lambda stage: logger.info("engine: %s", stage)),
        )
        model = _served(engine, text, config)
        access = Access(config.server.api_key, _allowed_hosts(config.server, sock))
        app = create_app(ModelPool([model]), access, access_log=not config.server.disable_access_log)
        server = GracefulServer(app, engine, _limits(config.server), deadline)
        gc.freeze()
        gc.enable()
        _announce(model, access, sock, time.perf_counter() - started)
        watcher = asyncio.create_task(_stop_with_engine(engine, server, deadline))
        try:
            await server.serve(sockets=[sock])
        finally:
            watcher.cancel()
            await engine.close()
    finally:
        sandboxes.stop()  # what waits in a thread for a template would hold up the end
    if engine.failure is not None:
        raise EngineError(engine.failure)


async def _stop_with_engine(engine: EngineClient, server: GracefulServer, deadline: Deadline) -> None:
    """A server whose engine is gone answers nothing: it ends, so that whoever supervises it starts it anew."""
    await engine.closed.wait()
    deadline.start(serving=True, code=1)
    server.should_exit = True


def bind(host: str, port: int) -> socket.socket:
    """A bound TCP socket. Raises `ConfigError` when the port is taken or the address is not this machine's."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen()  # at once: two sockets may bind one port, but only one can listen; early clients wait their turn
    except OSError as error:
        hint = (
            f"port {port} is taken: stop what uses it, or give another --port"
            if error.errno == errno.EADDRINUSE
            else error
        )
        raise ConfigError(f"cannot listen on {host}:{port}: {hint}") from error
    return sock


def _served(engine: EngineClient, text: TextSide, config: ServeConfig) -> ServedModel:
    return ServedModel(
        engine=engine,
        text=text,
        names=config.server.served_model_name or (config.engine.model,),
        root=config.engine.model,
        queue=RequestQueue(config.server.max_num_queued_reqs, config.server.max_num_queued_tokens),
    )


def _allowed_hosts(config: ServerConfig, sock: socket.socket) -> tuple[str, ...]:
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


def _announce(model: ServedModel, access: Access, sock: socket.socket, seconds: float) -> None:
    name, info = model.name, model.info
    host, port = sock.getsockname()[:2]
    if not _is_loopback(sock) and not access.api_keys:
        logger.warning("notice: whoever reaches %s port %d may use the model: --api-key asks for a key", host, port)
    if ipaddress.ip_address(host).is_unspecified:  # every interface: this machine reaches it by its own name
        host = "::1" if ":" in host else "127.0.0.1"
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    for notice in [*info.notices, *model.text.notices, *model.tokenizer.hold_against(info.vocab_size)]:
        logger.warning("notice: %s", notice)
    phases = ", ".join(f"{phase} {value:.2f} s" for phase, value in info.timings_s.items())
    logger.info("%s: %s", name, facts.started(info, model.default_sampling))
    if model.chat_template is None:
        logger.warning("notice: the model has no chat template, so /v1/chat/completions needs --chat-template")
    logger.info("ready in %.2f s (engine: %s)", seconds, phases)
    key = " -H 'Authorization: Bearer YOUR_KEY'" if access.api_keys else ""
    body = {"model": name, "messages": [{"role": "user", "content": "Hello!"}], "temperature": 0.2, "max_tokens": 64}
    logger.info("base URL: %s/v1\ntry it: curl %s/v1/chat/completions%s -H 'Content-Type: application/json' -d '%s'",
                url, url, key, json.dumps(body, ensure_ascii=False))  # fmt: skip
