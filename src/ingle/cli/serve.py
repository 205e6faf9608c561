"""`ingle serve`: one model behind an OpenAI-compatible HTTP API."""

from __future__ import annotations

import gc
import sys
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
    if "-h" in argv or "--help" in argv:
        _config(argv)  # prints, and exits
    with _collector_off(), EngineProcess() as process:  # at once: it imports while this process reads its flags
        config = _config(argv)
        from ingle.cli.local import importing

        with importing():
            from ingle.server.launch import run_server

        run_server(process, config)


def _config(argv: Sequence[str]) -> ServeConfig:
    from ingle.cli.flags import parse
    from ingle.cli.sources import key_file_notice

    config = parse(ServeConfig, argv, command="serve")
    keys = config.server.access.api_key_file
    if keys is not None and (notice := key_file_notice(keys)) is not None:
        print("notice:", notice, file=sys.stderr)
    return config
