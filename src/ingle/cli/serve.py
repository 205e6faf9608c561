"""`ingle serve`: one model behind an OpenAI-compatible HTTP API."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass

from ingle.config import EngineConfig, ServerConfig
from ingle.server.engine_process import EngineProcess


@dataclass(frozen=True)
class Serve:
    """Serve a model behind an OpenAI-compatible HTTP API.

    MODEL may also be given as --model MODEL. A model that ingle can pull is pulled when it is not on this machine yet.
    """

    engine: EngineConfig
    server: ServerConfig


def main(argv: Sequence[str]) -> None:
    gc.disable()  # until all is loaded: what imports create stays, and is not to be looked through again and again
    with EngineProcess() as process:  # before all else: it imports while this process reads its flags
        from ingle.cli.flags import parse
        from ingle.cli.local import importing

        flags = parse(Serve, argv, command="serve")

        with importing():
            from ingle.server.launch import run_server

        run_server(process, flags.engine, flags.server)
