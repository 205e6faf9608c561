"""uvicorn's server over connections of our own. It ends with a word to every client whose answer outlasts its grace."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import math
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from ingle.server.http_connection import Connection
from ingle.server.http_limits import Counted, HttpLimits, OpenConnections
from ingle.server.replicas import ServedEngine
from ingle.server.stopping import INTERRUPTED, LAST_WORDS_S, STOPPED, Deadline, hears_hangup
from ingle.server.tls import Certificate, TlsListener

_AGAIN_S = 0.25
"""A signal that comes this soon after the first is the same, told twice: to a process, and to its group."""
logger = logging.getLogger("ingle")


def http_config(
    app: ASGIApp, limits: HttpLimits, counted: OpenConnections, proxies: Sequence[str] = (), **options: Any
) -> uvicorn.Config:
    """How uvicorn serves `app` over connections that keep to `limits`.

    What `proxies`, addresses and networks, say of a request's client is believed.
    """
    connection: Any = functools.partial(Connection, limits=limits, open_connections=counted)
    return uvicorn.Config(
        app,
        http=connection,
        ws="none",
        log_config=None,
        access_log=False,
        lifespan="off",
        proxy_headers=bool(proxies),
        forwarded_allow_ips=list(proxies),
        **options,
    )


class GracefulServer(uvicorn.Server):
    """Stopped, it lets answers end for a while; then they end with an error, as if the engine had gone."""

    def __init__(
        self,
        app: ASGIApp,
        limits: HttpLimits,
        deadline: Deadline,
        certificate: Certificate | None = None,
        proxies: Sequence[str] = (),
    ) -> None:
        self._counted = OpenConnections(limits.max_connections, proxies)
        seconds = math.ceil(deadline.grace_s + LAST_WORDS_S)
        super().__init__(http_config(app, limits, self._counted, proxies, timeout_graceful_shutdown=seconds))
        self.engine: ServedEngine | None = None
        """Once it is loaded. Until then there are no answers to wait for, and the server ends at once."""
        self._deadline = deadline
        self._told_s: float | None = None
        """When it was told to end."""
        self._certificate = certificate

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        if self._certificate is None or sockets is None:
            await super().startup(sockets)
            return
        make: Any = self.config.http_protocol_class

        def connection(place: Counted) -> asyncio.Protocol:
            made: asyncio.Protocol = make(
                config=self.config, server_state=self.server_state, app_state={}, open_connections=place
            )
            return made

        listeners: Any = [TlsListener(sock, connection, self._certificate, self._counted) for sock in sockets]
        self.servers = listeners  # which uvicorn's server closes
        self.started = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """SIGHUP, as when a terminal is closed, ends the server like SIGTERM."""
        previous = signal.signal(signal.SIGHUP, self.handle_exit) if hears_hangup() else signal.SIG_IGN
        try:
            with super().capture_signals():
                yield
        finally:
            signal.signal(signal.SIGHUP, previous)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A second SIGTERM or Ctrl-C waits for nothing. A terminal that is closed may say so twice."""
        now_s = time.monotonic()
        again = self._told_s is not None and now_s - self._told_s >= _AGAIN_S and sig != signal.SIGHUP
        self._told_s = now_s if self._told_s is None else self._told_s
        at_once = again or self.engine is None
        self._deadline.start(serving=not at_once, code=INTERRUPTED if sig == signal.SIGINT else 0)
        super().handle_exit(sig, frame)
        self.force_exit = self.force_exit or at_once

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self.engine is not None:
            self.engine.stopping = True
            logger.info("stopping: answers have %g s to end", self._deadline.grace_s)
        timer = asyncio.get_running_loop().call_later(self._deadline.grace_s, self._give_up)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()
        if self.server_state.tasks:  # a second signal, which waits for nothing
            self._give_up()
            await asyncio.wait(self.server_state.tasks, timeout=LAST_WORDS_S)

    def _give_up(self) -> None:
        if self.engine is not None:
            self.engine.give_up(STOPPED)
