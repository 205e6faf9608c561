"""The second turn of a long conversation, after the engine was killed and started anew: its first token comes soon."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import IO

import pytest

from ingle.config import EngineConfig
from ingle.request import EngineRequest, SamplingParams
from ingle.server import engine_process
from ingle.server.engine_client import EngineClient
from ingle.server.engine_process import EngineProcess
from tests.support import random_prompt, save_checkpoint

pytestmark = pytest.mark.anyio


def model_in(folder: Path, num_layers: int) -> Path:
    """Three million parameters a layer: its first turn takes its time."""
    return save_checkpoint(
        folder,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=num_layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=32768,
    )


class Served:
    """An engine's process, which is killed at the end."""

    def __init__(self, folder: Path, memory: IO[bytes] | None = None, **options: object) -> None:
        with pytest.MonkeyPatch.context() as patch:
            if memory is not None:  # as a process has it that follows another
                patch.setattr(engine_process, "_memory", lambda: memory)
            self.process = EngineProcess()
        given = {"device": "cpu", "kv_cache_memory": "1GiB", **options}
        self.process.load(EngineConfig.of(str(folder), **given), folder)

    async def __aenter__(self) -> Served:
        self.client = await EngineClient.connect(self.process)
        await self.turn([3] * 40)
        return self

    async def __aexit__(self, *error: object) -> None:
        self.process.kill()
        self.process._popen.wait()
        await self.client.close()
        self.process.stop()

    async def turn(self, prompt: list[int]) -> tuple[float, int, list[int]]:
        """Seconds to the first token, how many of the prompt's tokens were cached, and the answer."""
        started = time.perf_counter()
        first_s, cached, tokens = 0.0, 0, list[int]()
        params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
        async for output in self.client.generate(EngineRequest(str(started), prompt, params)):
            first_s = first_s or time.perf_counter() - started
            cached, tokens = output.num_cached_tokens, tokens + output.token_ids
        return first_s, cached, tokens


def wait_for_files(folder: Path, count: int) -> None:
    """Until the disk has so many pages."""
    while len(list(folder.rglob("*.kv"))) < count:
        time.sleep(0.05)


async def second_turns(model: Path, cache: Path, num_tokens: int) -> dict[str, float]:
    """Seconds to the first token of a first turn, and of a second one that each tier serves to a new engine."""
    prompt, question = random_prompt(1, num_tokens), random_prompt(2, 30)
    found = {}
    async with Served(model, host_cache="1GiB", disk_cache=str(cache)) as served:
        found["first"], cached, answer = await served.turn(prompt)
        assert cached == 0
        await asyncio.to_thread(wait_for_files, cache, num_tokens // 16)
        memory = served.process.memory
        second = prompt + answer + question
        found["device"], _, expected = await served.turn(second)
    async with Served(model, memory, host_cache="1GiB") as served:
        found["host"], cached, answer = await served.turn(second)
        assert cached >= num_tokens - 16
        assert answer == expected
    async with Served(model, disk_cache=str(cache)) as served:
        found["disk"], cached, answer = await served.turn(second)
        assert cached >= num_tokens - 16
        assert answer == expected
    shares = [
        f"{kind} {found[kind]:.3f} s (1/{found['first'] / found[kind]:.0f})" for kind in ("device", "host", "disk")
    ]
    print(f"\n{num_tokens} tokens: first token after {found['first']:.2f} s; second turn: {', '.join(shares)}")
    return found


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs a file in memory")
async def test_a_second_turn_after_a_kill_is_read_and_not_computed(tmp_path: Path) -> None:
    """Of so short a conversation half of the time goes to the question; other processes may take the rest."""
    found = await second_turns(model_in(tmp_path / "model", 4), tmp_path / "cache", 2_000)
    assert max(found["host"], found["disk"]) <= found["first"] / 3


@pytest.mark.slow
@pytest.mark.timeout(1800)
async def test_a_second_turn_of_25_000_tokens_after_a_kill_is_ten_times_as_fast(tmp_path: Path) -> None:
    found = await second_turns(model_in(tmp_path / "model", 8), tmp_path / "cache", 25_000)
    assert max(found["host"], found["disk"]) <= found["first"] / 10
