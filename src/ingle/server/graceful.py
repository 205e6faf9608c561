"""uvicorn's server over connections of our own. It ends with a word to every client whose answer outlasts its grace."""

from __future__ import annotations

import asyncio
import functools
import socket
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from ingle.server.engine_client import EngineClient
from ingle.server.http_connection import Connection
from ingle.server.http_limits import HttpLimits, OpenConnections

_GRACE_S = 5
"""Until answers are given up."""
_LAST_WORDS_S = 2
"""For what is said of that to leave."""


def http_config(app: ASGIApp, limits: HttpLimits, **options: Any) -> uvicorn.Config:
    """How uvicorn serves `app` over connections that keep to `limits`."""
    connection: Any = functools.partial(
        Connection, limits=limits, open_connections=OpenConnections(limits.max_connections)
    )
    return uvicorn.Config(app, http=connection, ws="none", log_config=None, access_log=False, lifespan="off", **options)


class GracefulServer(uvicorn.Server):
    """Stopped, it lets answers end for a while; then they end with an error, as if the engine had gone."""

    def __init__(self, app: ASGIApp, engine: EngineClient, limits: HttpLimits) -> None:
        super().__init__(http_config(app, limits, timeout_graceful_shutdown=_GRACE_S + _LAST_WORDS_S))
        self._engine = engine

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        timer = asyncio.get_running_loop().call_later(_GRACE_S, self._give_up)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()
        if self.server_state.tasks:  # a second Ctrl-C, which waits for nothing
            self._give_up()
            await asyncio.wait(self.server_state.tasks, timeout=_LAST_WORDS_S)

    def _give_up(self) -> None:
        self._engine.give_up("the server is being stopped")
