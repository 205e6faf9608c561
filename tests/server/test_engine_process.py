"""The engine's process as its parent has it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from ingle.config import EngineConfig
from ingle.errors import EngineError
from ingle.server.engine_client import EngineClient
from ingle.server.engine_process import EngineProcess

pytestmark = pytest.mark.anyio


async def test_one_that_died_before_it_was_told_what_to_load_is_an_error_with_the_reason() -> None:
    with EngineProcess() as process:
        process._popen.kill()
        process._popen.wait()
        process.load(EngineConfig("any"), Path("any"))
        with pytest.raises(EngineError, match="ended while it was loading: killed by SIGKILL"):
            await EngineClient.connect(process)


def test_one_that_was_never_told_ends_at_once() -> None:
    started = time.monotonic()
    with EngineProcess() as process:
        pass
    assert process._popen.returncode is not None and time.monotonic() - started < 2
