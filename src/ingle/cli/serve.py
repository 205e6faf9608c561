"""`ingle serve`: one model behind an OpenAI-compatible HTTP API."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ingle.cli.flags import parse
from ingle.cli.local import importing
from ingle.config import EngineConfig, ServerConfig


@dataclass(frozen=True)
class Serve:
    """Serve a model behind an OpenAI-compatible HTTP API.

    MODEL may also be given as --model MODEL. A model that ingle can pull is pulled when it is not on this machine yet.
    """

    engine: EngineConfig
    server: ServerConfig


def main(argv: Sequence[str]) -> None:
    flags = parse(Serve, argv, command="serve")

    with importing():
        from ingle.server.launch import run_server

    run_server(flags.engine, flags.server)
