"""`ingle serve`: one model behind an OpenAI-compatible HTTP API."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ingle.config import ServeConfig
from ingle.server.engine_process import EngineProcess


@contextmanager
def _collector_off() -> Iterator[None]:
    """Until all is loaded, when the launcher turns it on.

    What imports create stays: a collector that looks through it again and again takes a seventh of their time.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def main(argv: Sequence[str]) -> None:
    with _collector_off(), EngineProcess() as process:  # at once: it imports while this process reads its flags
        from ingle.cli.flags import parse
        from ingle.cli.local import importing

        config = parse(ServeConfig, argv, command="serve")

        with importing():
            from ingle.server.launch import run_server

        run_server(process, config)
