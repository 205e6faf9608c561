"""uvicorn's server, which ends with a word to every client whose answer outlasts its grace."""

from __future__ import annotations

import asyncio
import socket

import uvicorn
from starlette.types import ASGIApp

from ingle.server.engine_client import EngineClient

_GRACE_S = 5
"""Until answers are given up."""
_LAST_WORDS_S = 2
"""For what is said of that to leave."""


class GracefulServer(uvicorn.Server):
    """Stopped, it lets answers end for a while; then they end with an error, as if the engine had gone."""

    def __init__(self, app: ASGIApp, engine: EngineClient) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                lifespan="off",
                timeout_graceful_shutdown=_GRACE_S + _LAST_WORDS_S,
            )
        )
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
