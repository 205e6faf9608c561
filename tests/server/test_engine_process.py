"""The engine's process as its parent has it."""

from __future__ import annotations

import asyncio
import socket
import time
from pathlib import Path

import pytest

from ingle.channel import Channel, Failed
from ingle.config import EngineConfig
from ingle.errors import EngineError
from ingle.request import EngineRequest, SamplingParams
from ingle.server.engine_client import EngineClient
from ingle.server.engine_process import EngineProcess
from tests.test_facts import info as engine_info

pytestmark = pytest.mark.anyio


async def test_one_that_died_before_it_was_told_what_to_load_is_an_error_with_the_reason() -> None:
    with EngineProcess() as process:
        process._popen.kill()
        process._popen.wait()
        process.load(EngineConfig.of("any"), Path("any"))
        with pytest.raises(EngineError, match="ended while it was loading: killed by SIGKILL"):
            await EngineClient.connect(process)


def test_one_that_was_never_told_ends_at_once() -> None:
    started = time.monotonic()
    with EngineProcess() as process:
        pass
    assert process._popen.returncode is not None and time.monotonic() - started < 2


class _Gone:
    """In place of the process at the other end."""

    pid, has_ended = 1, True

    def __init__(self) -> None:
        self.socket, self.theirs = socket.socketpair()

    def exit_text(self) -> str:
        return "exit code 1"

    def stop(self) -> None:
        self.theirs.close()


async def test_a_traceback_of_the_engine_is_for_the_log_alone(caplog: pytest.LogCaptureFixture) -> None:
    process, traceback = _Gone(), 'Traceback:\n  File "/opt/engine.py", line 1\nIndexError: index 5'
    theirs = Channel(process.theirs)
    theirs.send(engine_info({}))
    client = await EngineClient.connect(process)  # type: ignore[arg-type]
    theirs.send(Failed(traceback, expected=False))
    await asyncio.wait_for(client.closed.wait(), 5)
    with pytest.raises(EngineError) as caught:
        await anext(client.generate(EngineRequest("a", [1], SamplingParams())))
    for text in (str(caught.value), client.health().detail):
        assert text == "the engine failed; the server's log has the reason"
    assert traceback in caplog.text and "server's log" not in caplog.text
    await client.close()
