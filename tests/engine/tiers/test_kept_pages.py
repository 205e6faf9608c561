"""Engines whose pages are kept below the device: what is read back is bit for bit what was computed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ingle.config import EngineConfig
from ingle.device.pages import Bytes
from ingle.engine.arrivals import Load
from ingle.engine.build import build_engine
from ingle.engine.engine import Engine
from ingle.errors import ConfigError
from ingle.request import EngineRequest, SamplingParams
from tests.model.checkpoints import CHECKPOINTS
from tests.support import collect, greedy, random_prompt, run, save_checkpoint

FAMILIES = ["gqa", "gemma3", "mistral-window", "deepseek-v3", "qwen3-moe", "odd-heads"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def memory() -> Iterator[int]:
    file = os.memfd_create("test", os.MFD_CLOEXEC)
    yield file
    os.close(file)


def engine_with(folder: Path, memory: int | None = None, **options: object) -> Engine:
    given = {"dtype": "float32", "device": "cpu", "kv_cache_memory": "8MiB", "block_size": 8, **options}
    engine = build_engine(EngineConfig.of(str(folder), **given), folder, memory=memory)[0]
    assert engine.keeper is not None
    return engine


def request(name: str, prompt: list[int], **options: object) -> EngineRequest:
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    return EngineRequest(name, prompt, params, **options)


def contents(engine: Engine) -> dict[bytes, Bytes]:
    """What the device holds, by name."""
    pages, pool = engine.worker.device.pages(), engine.scheduler.pages
    out = pages.buffer(1)
    found = {}
    for name, page_id in pool._page_of_hash.items():
        pages.read([page_id], out)
        found[name] = out[0].copy()
    return found


def names_read(engine: Engine) -> set[bytes]:
    """Of all pages that are read from a tier from now on."""
    assert engine.keeper is not None
    names, load = set[bytes](), engine.keeper.load

    def noted(each: Load) -> None:
        names.update(name for name, _ in each.entries)
        load(each)

    engine.keeper.load = noted  # type: ignore[method-assign]
    return names


def check_read(engine: Engine, names: set[bytes], computed: dict[bytes, Bytes], least: int) -> None:
    """What was read is bit for bit what another engine computed. No two of these pages are alike, and none is empty."""
    held = contents(engine)
    assert len(names) >= least
    assert len({held[name].tobytes() for name in names}) == len(names)
    assert all(held[name].any() and np.array_equal(held[name], computed[name]) for name in names)


@pytest.mark.parametrize(
    ("case", "cpu_kernels", "kv_cache_dtype"),
    [
        *((case, "auto", "auto") for case in FAMILIES),
        ("mistral-window", "torch", "auto"),
        *(pytest.param(case, "torch", "auto", marks=pytest.mark.slow) for case in FAMILIES if case != "mistral-window"),
        ("mistral-window", "auto", "int8"),
        pytest.param("gqa", "torch", "fp8", marks=pytest.mark.slow),
    ],
)
def test_what_is_read_back_is_what_was_computed(
    tmp_path: Path, case: str, cpu_kernels: str, kv_cache_dtype: str, memory: int
) -> None:
    model_type, overrides = CHECKPOINTS[case]
    folder = save_checkpoint(tmp_path / "model", model_type, **overrides)
    how = {"cpu_kernels": cpu_kernels, "kv_cache_dtype": kv_cache_dtype}
    options = {"disk_cache": str(tmp_path / "cache"), "host_cache": "4MiB"}
    before = engine_with(folder, memory, **how, **options)
    prompt = random_prompt(5, 100)
    (answer,) = collect(before, [request("a", prompt)]).values()
    tokens = [token for output in answer for token in output.token_ids]
    computed = contents(before)
    before.close(30)
    longer = prompt + tokens + random_prompt(6, 9)
    expected = greedy(before, longer, 8)
    for kind, options_after in (("host", {"host_cache": "4MiB"}), ("disk", {"disk_cache": str(tmp_path / "cache")})):
        after = engine_with(folder, memory, **how, **options_after)
        names = names_read(after)
        outputs = collect(after, [request("b", longer)])["b"]
        assert outputs[0].num_cached_tokens >= 96
        assert [token for output in outputs for token in output.token_ids] == expected
        assert after.keeper.counters[kind].num_pages_read == len(names)
        check_read(after, names, computed, 5)
        after.scheduler.check()
        after.close(5)


def test_batched_equals_alone_with_tiers_and_too_few_pages(folder: Path, tmp_path: Path) -> None:
    """Conversations that take turns, in a pool that holds two of them: nearly all comes from below the device."""
    alone = build_engine(EngineConfig.of(str(folder), dtype="float32", device="cpu", kv_cache_memory="8MiB"), folder)[0]
    engine = engine_with(folder, host_cache="1MiB", disk_cache=str(tmp_path), num_gpu_blocks_override=24)
    prompts = [random_prompt(seed, 60) for seed in range(6)]
    expected = [greedy(alone, prompt, 8) for prompt in prompts]
    assert engine.keeper is not None
    for index, prompt in enumerate(prompts):
        run(engine, [request(f"first-{index}", prompt)])
        engine.keeper.flush(30)  # or a page may be needed for something else before it was copied
    for turn in range(3):
        requests = [request(f"{turn}-{index}", prompt) for index, prompt in enumerate(prompts)]
        assert list(run(engine, requests).values()) == expected
    assert engine.keeper.counters["host"].num_pages_read > 30
    assert engine.scheduler.pages.num_available == 23


def test_pages_are_whole_after_an_abort_in_the_midst_of_a_load(folder: Path, memory: int) -> None:
    before = engine_with(folder, memory, host_cache="4MiB")
    prompt = random_prompt(1, 200)
    expected = greedy(before, prompt, 8)
    before.close(30)
    engine = engine_with(folder, memory, host_cache="4MiB")
    assert engine.keeper is not None
    engine.keeper._copies = slow = Slow(engine.keeper._copies)
    engine.add(request("gone", prompt))
    engine.step()
    assert engine.scheduler.arrivals.is_reading
    engine.abort("gone")
    engine.scheduler.check()
    slow.go = True
    assert greedy(engine, prompt, 8) == expected
    assert engine.scheduler.pages.num_available == engine.scheduler.pages.capacity


class Slow:
    """Copies that wait until they may."""

    def __init__(self, copies: object) -> None:
        self.copies, self.go = copies, False

    def read(self, page_ids: list[int], out: Bytes) -> None:
        self.copies.read(page_ids, out)

    def write(self, page_ids: list[int], data: Bytes) -> None:
        while not self.go:
            pass
        self.copies.write(page_ids, data)


def test_a_damaged_disk_cache_costs_time_and_no_answer(folder: Path, tmp_path: Path) -> None:
    before = engine_with(folder, disk_cache=str(tmp_path))
    prompt = random_prompt(1, 200)
    expected = greedy(before, prompt, 8)
    before.close(30)
    for number, path in enumerate(sorted(tmp_path.rglob("*.kv"))):
        if number % 3 == 0:
            path.write_bytes(path.read_bytes()[:-3])
    engine = engine_with(folder, disk_cache=str(tmp_path))
    assert greedy(engine, prompt, 8) == expected
    assert engine.keeper is not None
    assert engine.keeper.tiers["disk"].num_damaged > 5


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "bfloat16"},
        {"block_size": 16},
        {"rope_theta": 5e5},
        {"seed": 1, "load_format": "dummy"},
        {"cpu_kernels": "torch", "dtype": "bfloat16"},
    ],
)
def test_other_numbers_are_another_model(folder: Path, tmp_path: Path, change: dict[str, object]) -> None:
    prompt = random_prompt(1, 100)
    greedy(before := engine_with(folder, disk_cache=str(tmp_path)), prompt, 2)
    before.close(30)
    after = engine_with(folder, **{"disk_cache": str(tmp_path), **change})
    assert collect(after, [request("b", prompt)])["b"][0].num_cached_tokens == 0


def test_other_weights_are_another_model(tmp_path: Path) -> None:
    prompt, cached = random_prompt(1, 100), []
    for seed in (1, 2, 2):
        folder = save_checkpoint(tmp_path / "model", seed=seed) if cached != [0, 0] else tmp_path / "model"
        engine = engine_with(folder, disk_cache=str(tmp_path / "cache"))
        cached.append(collect(engine, [request("b", prompt)])["b"][0].num_cached_tokens)
        engine.close(30)
    assert cached == [0, 0, 96]


def test_users_with_another_salt_read_nothing_of_it(folder: Path, tmp_path: Path) -> None:
    prompt, engine = random_prompt(1, 100), engine_with(folder, disk_cache=str(tmp_path))
    run(engine, [request("a", prompt, cache_salt="a")])
    engine.close(30)
    engine = engine_with(folder, disk_cache=str(tmp_path))
    cached = [
        collect(engine, [request("b", prompt, cache_salt=salt)])["b"][0].num_cached_tokens for salt in ("", "b", "a")
    ]
    assert cached == [0, 0, 96]


def test_what_cannot_be_kept_is_refused_before_anything_is_loaded(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--host-cache 64TiB does not fit the .* that are free"):
        engine_with(folder, host_cache="64TiB")
    with pytest.raises(ConfigError, match=r"--host-cache 1KiB holds not even one page"):
        engine_with(folder, host_cache="1KiB")
    with pytest.raises(ConfigError, match="host_cache 1GiB keeps prefixes, and"):
        engine_with(folder, host_cache="1GiB", enable_prefix_caching=False)
    with pytest.raises(ConfigError, match="disk_cache_size 'much' is not a size"):
        engine_with(folder, disk_cache=str(tmp_path), disk_cache_size="much")


def test_the_start_says_what_is_kept_and_found(folder: Path, tmp_path: Path) -> None:
    config = EngineConfig.of(str(folder), device="cpu", kv_cache_memory="8MiB", disk_cache=str(tmp_path))
    engine, info = build_engine(config, folder)
    assert info.prompt_cache == [f"16.00 GiB of {tmp_path}"]
    greedy(engine, random_prompt(1, 400), 2)
    engine.close(30)
    _, info = build_engine(config, folder)
    assert info.prompt_cache == [f"16.00 GiB of {tmp_path} (0.20 MiB found)"]
