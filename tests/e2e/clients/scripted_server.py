"""`ingle serve`, but with an engine that reads its answers from scripts: see `scripted_engine`."""

from __future__ import annotations

import sys

from ingle.server import engine_process


def main() -> int:
    real, ours = "ingle.engine.process", "tests.e2e.clients.scripted_engine"
    assert real in engine_process._BOOT
    engine_process._BOOT = engine_process._BOOT.replace(real, ours)
    from ingle.cli.main import main as ingle

    return ingle(["serve", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
