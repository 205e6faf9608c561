"""`LLM(data_parallel_size=2)`: two engines beside this process say what one in it says."""

from __future__ import annotations

import gc
import os
import signal
import weakref
from pathlib import Path

import pytest

from ingle import LLM, SamplingParams
from ingle.config import EngineConfig
from ingle.engine.build import build_engine
from ingle.errors import ConfigError, EngineError, RequestError
from ingle.request import EngineRequest
from ingle.server.offline import OfflineReplicas
from tests.e2e.conftest import save_byte_model

from .fakes import TEMPLATE

DRAWN = SamplingParams(max_tokens=20, temperature=0.9, n=2)


def gone(pids: list[int]) -> bool:
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_two_engines_say_what_one_says_and_end_with_their_llm(tmp_path: Path) -> None:
    options = {"kv_cache_memory": "32MiB", "device": "cpu", "chat_template": TEMPLATE, "threads": 1, "seed": 3,
               "dtype": "float32"}  # fmt: skip
    folder = str(save_byte_model(tmp_path))
    one, two = LLM(folder, **options), LLM(folder, data_parallel_size=2, **options)  # type: ignore[arg-type]
    replicas = two._shared._engine
    assert isinstance(replicas, OfflineReplicas)
    pids = [engine.pid for engine in replicas._engines]
    prompts = [f"{number} and some more words" * 5 for number in range(12)]
    for params in (SamplingParams(max_tokens=12, temperature=0.0), DRAWN):
        first, second = (
            [
                [choice.token_ids for choice in output.outputs]
                for output in llm.generate(prompts, params, use_tqdm=False)
            ]
            for llm in (one, two)
        )
        assert first == second
    replicas.settle()
    assert min(stats.num_steps for stats in replicas._told.stats.values()) > 0, "both of them computed"
    assert "".join(two.stream_chat("Hello", SamplingParams(max_tokens=5, temperature=0.0)))
    assert len(two.embed(["a", "b"], use_tqdm=False)) == 2
    for llm in (one, two):
        with pytest.raises(RequestError, match="vocabulary"):
            llm.generate([[300]], use_tqdm=False)
    with pytest.raises(AttributeError, match="data_parallel_size"):
        _ = two.engine
    unread = two.stream_chat("Hello", SamplingParams(max_tokens=300, ignore_eos=True))
    next(unread)
    unread.close()  # type: ignore[attr-defined]
    assert not replicas.has_work

    os.kill(pids[1], signal.SIGKILL)
    for _ in range(2):
        with pytest.raises(EngineError, match="replica 1 died: killed by SIGKILL"):
            two.generate(prompts, DRAWN, use_tqdm=False)
    end = weakref.ref(replicas)
    del two, replicas, unread, llm
    gc.collect()  # errors hold frames
    assert end() is None and gone(pids)


def test_what_both_refuse_is_said_once(tmp_path: Path) -> None:
    folder = save_byte_model(tmp_path)
    config = EngineConfig.of(str(folder), device="cpu", kv_cache_memory="1", data_parallel_size=2)
    with pytest.raises(ConfigError, match="the KV cache gets"):
        OfflineReplicas(config, folder)
    with pytest.raises(ConfigError, match="this command has one engine; leave the flag out"):
        build_engine(config, folder)


def test_a_request_that_cannot_be_served_is_refused_before_it_is_sent() -> None:
    class Info:
        vocab_size, max_model_len = 10, 4

    replicas = OfflineReplicas.__new__(OfflineReplicas)
    replicas.info = Info()  # type: ignore[assignment]
    with pytest.raises(RequestError, match="context length"):
        replicas.add(EngineRequest("a", [1] * 9, SamplingParams()))  # type: ignore[arg-type]
