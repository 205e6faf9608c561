"""Ranks as processes over Gloo: an engine of two gives what one gives."""

from __future__ import annotations

import contextlib
import gc
import os
import queue
import re
import resource
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from ingle.config import EngineConfig
from ingle.engine import ranks
from ingle.engine.engine import Engine
from ingle.engine.pages import PagePool
from ingle.engine.ranks import Crew
from ingle.engine.scheduler import Scheduler
from ingle.engine.startup import ModelFiles, Startup
from ingle.engine.tiers.build import build_tiers
from ingle.engine.worker import Worker
from ingle.errors import ConfigError, EngineError
from ingle.parallel.layout import Layout
from ingle.parallel.team import _Ranks
from ingle.request import NO_TOKENS, EngineRequest, Pooling, SamplingParams
from ingle.verify.apart import _read
from tests.engine.test_engine import mixed_requests
from tests.model.checkpoints import CHECKPOINTS
from tests.model.test_quantized import FORMATS, quantize
from tests.support import (
    collect,
    engine_for,
    expect_short_answers,
    greedy,
    random_prompt,
    reference_greedy,
    reference_model,
    run,
    save_checkpoint,
)

WITHIN_S = 10.0
"""For one clear error, whatever becomes of a rank."""


@contextlib.contextmanager
def crew_of(size: int, stages: int = 1) -> Iterator[Crew]:
    crew = ranks.assemble(Layout(size, stages), ["cpu"] * size * stages, Startup(lambda stage: None))
    with crew.team:
        yield crew


@pytest.fixture(scope="module")
def two() -> Iterator[Crew]:
    with crew_of(2) as crew:
        yield crew


def load(crew: Crew, folder: Path, *, overlap: bool = False, num_pages: int = 200, **options: Any) -> Engine:
    """An engine of all ranks, in place of the one before."""
    options = {"dtype": "float32", "device": "cpu", "num_gpu_blocks_override": num_pages, **options}
    layout = crew.member.place.layout
    config = EngineConfig.of(
        str(folder), tensor_parallel_size=layout.tensor, pipeline_parallel_size=layout.pipeline, **options
    )
    with contextlib.closing(ModelFiles.read(config, folder).opened(config)) as opened:
        numerics, loaded = ranks.load_on(crew, config, folder, opened, Startup(lambda stage: None))
    limits = loaded.memory.limits
    in_flight = max(limits.num_turns, 2 if overlap else 1)
    pool, keeper = PagePool(num_pages), None
    if config.cache.has_tiers:
        with contextlib.closing(ModelFiles.read(config, folder).opened(config)) as opened:
            keeper = build_tiers(config, opened, numerics, loaded, pool, layout=layout)
    scheduler, worker = Scheduler(pool, limits, lower=keeper), Worker(loaded.device)
    return Engine(scheduler, worker, loaded.facts, max_in_flight=in_flight, seed=0, keeper=keeper)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, list[int]]:
    """The answers of one rank."""
    return run(engine_for(folder, cpu_kernels="torch"), requests())


def requests() -> list[EngineRequest]:
    """Greedy and sampled in every way; some share the start of their prompt, some may draw but a few tokens, some tell
    log probabilities."""
    asked = mixed_requests(8)
    for index, changes in ((1, {"allowed_token_ids": (5, 9, 77)}), (2, {"logprobs": 3, "prompt_logprobs": 2})):
        sampling = msgspec.structs.replace(asked[index].sampling, **changes)
        asked[index] = msgspec.structs.replace(asked[index], sampling=sampling)
    return asked


def keep_pages(crew: Crew, folder: Path, kept: Path, num_pages: int) -> None:
    """What the device has no room for is read back from host memory, and by the next engine from a disk."""
    prompts, alone = [random_prompt(seed, 100) for seed in (1, 2)], engine_for(folder, cpu_kernels="torch")
    right = [greedy(alone, prompt, 6) for prompt in prompts]
    for is_first in (True, False):
        engine = load(crew, folder, num_pages=num_pages, host_cache="1MiB", disk_cache=str(kept))
        keeper = engine.keeper
        assert keeper is not None
        for prompt, answer in zip(prompts * 2, right * 2, strict=True):
            assert greedy(engine, prompt, 6) == answer
            assert keeper.flush(60)
        host, disk = keeper.counters["host"], keeper.counters["disk"]
        assert host.num_pages_read > 0 if is_first else disk.num_pages_read > 0
        assert (disk.num_pages_written > 0) == is_first
        engine.close(60)


@pytest.mark.parametrize("overlap", [pytest.param(False, marks=pytest.mark.slow), True])
def test_many_requests_get_what_one_rank_gives(
    two: Crew, folder: Path, alone: dict[str, list[int]], overlap: bool
) -> None:
    """Batched, in chunks, with cached prefixes and few pages, so that some lose theirs and are computed again."""
    engine = load(two, folder, overlap=overlap, num_pages=10, max_num_batched_tokens=48, max_num_seqs=6)
    expect_short_answers(engine.scheduler)
    assert run(engine, requests()) == alone
    assert engine.scheduler.num_preemptions > 0
    prompt = random_prompt(1, 70)
    assert greedy(engine, prompt, 4) == greedy(engine, prompt, 4)
    assert engine.scheduler.num_hit_tokens > 0
    assert engine.facts.weights.total[0] == engine_for(folder).facts.weights.total[0]


def test_vectors_and_log_probabilities_are_those_of_one_rank(two: Crew, folder: Path) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=4, logprobs=3, prompt_logprobs=2)
    asked = [
        EngineRequest("text", random_prompt(1, 70), params),
        EngineRequest("mean", random_prompt(2, 30), NO_TOKENS, pooling=Pooling(kind="mean")),
        EngineRequest("scores", random_prompt(3, 30), NO_TOKENS, pooling=Pooling(kind="logits", token_ids=(17, 5))),
    ]
    ours, theirs = (collect(engine, asked) for engine in (load(two, folder), engine_for(folder, cpu_kernels="torch")))
    for name in ("mean", "scores"):
        pooled = [np.frombuffer(parts[name][0].pooled or b"", "<f4") for parts in (ours, theirs)]
        np.testing.assert_allclose(*pooled, atol=1e-5)
    texts = [parts["text"][0] for parts in (ours, theirs)]
    rows = [[*(text.prompt_logprobs or ())[1:], *(text.logprobs or ())] for text in texts]
    for one, two_ranks in zip(*rows, strict=True):
        assert one is not None and two_ranks is not None and one.token_ids == two_ranks.token_ids
        np.testing.assert_allclose(one.logprobs, two_ranks.logprobs, atol=1e-4)
    read_as_by_one(two, folder)


def read_as_by_one(crew: Crew, folder: Path) -> None:
    """All logits of a text, as `ingle verify --against` compares them."""
    windows = [list(random_prompt(seed, 70)) for seed in (1, 2)]
    engines = load(crew, folder), engine_for(folder, cpu_kernels="torch", enable_prefix_caching=False)
    read = [list(_read(engine, windows, lambda stage: None, "it")) for engine in engines]
    for (place, ours), (same_place, right) in zip(*read, strict=True):
        assert place == same_place
        np.testing.assert_allclose(ours, right, atol=1e-4)


def test_pages_of_all_ranks_are_kept(two: Crew, folder: Path, tmp_path: Path) -> None:
    keep_pages(two, folder, tmp_path, num_pages=10)


def test_drafts_save_steps(two: Crew, folder: Path) -> None:
    prompt = random_prompt(1, 40)
    whole = [*prompt, *greedy(engine_for(folder, cpu_kernels="torch"), prompt, 24)]
    engine = load(two, folder)
    engine.scheduler.drafter = lambda token_ids, most: whole[len(token_ids) :][: min(most, 3)]
    assert greedy(engine, prompt, 24) == whole[40:]
    assert engine.stats().num_steps < 12


def test_a_quantized_folder(two: Crew, tmp_path: Path) -> None:
    plain = save_checkpoint(tmp_path / "plain", "qwen2", intermediate_size=96)
    coded = quantize(plain, tmp_path / "coded", FORMATS["gptq-act-order"])
    prompt = random_prompt(3, 40)
    assert greedy(load(two, coded), prompt, 16) == greedy(engine_for(plain), prompt, 16)


def test_stages_give_what_one_rank_gives(tmp_path: Path) -> None:
    """With a tied head, which is the first stage's embedding, and layers of two kinds, of which one stage has one.

    And pages, of which stages have other layers, are kept, and all logits read."""
    windows = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}
    folder = save_checkpoint(tmp_path, "qwen2", num_hidden_layers=3, tie_word_embeddings=True, **windows)
    asked = requests()[:5]
    with crew_of(1, 2) as crew:
        engine = load(crew, folder, num_pages=100, pipeline_layers="1,2", max_num_batched_tokens=48, max_num_seqs=4)
        assert run(engine, asked) == run(engine_for(folder, cpu_kernels="torch"), asked)
        keep_pages(crew, folder, tmp_path / "kept", num_pages=24)
        read_as_by_one(crew, folder)


EIGHT: dict[str, dict[str, Any]] = {
    "llama": {"num_attention_heads": 16, "num_key_value_heads": 8},
    "qwen2": {"num_attention_heads": 16, "num_key_value_heads": 4},
}
"""Key-value heads that eight ranks divide, and some that they have twice."""


@pytest.mark.slow
@pytest.mark.parametrize(("size", "stages"), [(8, 1), (1, 8), (4, 2)])
def test_eight_ranks(tmp_path: Path, size: int, stages: int) -> None:
    """The layouts of a large model on one host, and the end of one of them: the sixth is killed."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 8, "layer_types": None}
    with crew_of(size, stages) as crew:
        for model_type, heads in EIGHT.items():
            folder = save_checkpoint(tmp_path / model_type, model_type, **sizes, **heads)
            prompt = random_prompt(1, 100)
            assert greedy(load(crew, folder), prompt, 32) == reference_greedy(reference_model(folder), prompt, 32)
            assert run(load(crew, folder), requests()) == run(engine_for(folder, cpu_kernels="torch"), requests())
        said = end_mid_stream(crew, folder, lambda _: os.kill(crew.team.pids[4], signal.SIGKILL))
        assert re.fullmatch(r"rank 5 \(cpu, process \d+\) has died: killed by SIGKILL \(out of memory\?\)", said)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "stages"), [(2, 1), (4, 1), (1, 2), (1, 3), (2, 2)])
def test_every_family_gives_what_transformers_gives(tmp_path: Path, size: int, stages: int) -> None:
    with crew_of(size, stages) as crew:
        for name, (model_type, overrides) in CHECKPOINTS.items():
            if (name, size) == ("odd-heads", 4) or (stages > 2 and "layer_types" in overrides):
                continue
            overrides = {"num_hidden_layers": max(stages, 2), **overrides}
            folder = save_checkpoint(tmp_path / name, model_type, **overrides)
            reference, prompt = reference_model(folder), random_prompt(1, 100)
            engine = load(crew, folder)
            assert greedy(engine, prompt, 32) == reference_greedy(reference, prompt, 32), name


# ---- what cannot work


def no_ranks(folder: Path, **options: Any) -> str:
    """What is said before anything is started."""
    with pytest.raises(ConfigError) as error:
        engine_for(folder, **options)
    return str(error.value)


def test_sizes_that_do_not_work_are_told_with_those_that_do(folder: Path, tmp_path: Path) -> None:
    assert no_ranks(folder, tensor_parallel_size=3) == (
        "--tensor-parallel-size 3: 2 key-value heads and 3 ranks do not divide one another; "
        "these sizes divide it: 1, 2, 4"
    )
    gpt2 = save_checkpoint(tmp_path, "gpt2", n_embd=32, n_head=2, n_layer=1)
    assert "'gpt2' is run by transformers' code, on one device; leave the flag out" in no_ranks(
        gpt2, tensor_parallel_size=2
    )


def test_gpus_that_are_not_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = ModelFiles.read(EngineConfig.of(str(folder)), folder).opened(EngineConfig.of(str(folder)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    with pytest.raises(ConfigError, match=r"sees no GPU here \(CUDA_VISIBLE_DEVICES=7\); --device cpu divides"):
        ranks.layout_of(EngineConfig.of(str(folder), tensor_parallel_size=2), "cpu", opened)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    with pytest.raises(
        ConfigError, match=r"sees 3 GPUs here \(CUDA_VISIBLE_DEVICES=7\), and that takes 4; these sizes work: 1, 2$"
    ):
        ranks.layout_of(EngineConfig.of(str(folder), tensor_parallel_size=4), "cuda", opened)
    for device, size in (("cuda", 2), ("cpu", 1)):
        auto = EngineConfig.of(str(folder), tensor_parallel_size="auto")
        assert ranks.layout_of(auto, device, opened) == Layout(size)


# ---- what becomes of a rank


def is_gone(pid: int, within_s: float = 5.0) -> bool:
    until_s = time.monotonic() + within_s
    while time.monotonic() < until_s:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


def end_mid_stream(crew: Crew, folder: Path, act: Callable[[int], None], **options: Any) -> str:
    """What an engine says that loses a rank while it answers."""
    engine = load(crew, folder, **options)
    for request in requests():
        engine.add(request)
    for _ in range(3):
        engine.step()
    act(crew.team.pids[0])
    begun = time.monotonic()
    with pytest.raises(EngineError) as error:
        while True:
            engine.step()
    assert time.monotonic() - begun < WITHIN_S
    assert not engine.worker.device.usable()
    assert all(is_gone(pid) for pid in crew.team.pids)
    return str(error.value)


@pytest.mark.slow
def test_a_rank_that_is_stopped_ends_all(folder: Path) -> None:
    with crew_of(2) as crew:
        said = end_mid_stream(crew, folder, lambda pid: os.kill(pid, signal.SIGSTOP))
        assert re.fullmatch(r"rank 1 \(cpu, process \d+\) is stopped \(SIGSTOP\?\), and .*", said)


@pytest.mark.slow
def test_a_rank_that_runs_out_of_memory_as_it_loads(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, "llama", vocab_size=60_000, hidden_size=512)
    with crew_of(2) as crew:
        (pid,) = crew.team.pids
        held = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
        resource.prlimit(pid, resource.RLIMIT_AS, (held + (16 << 20),) * 2)
        begun = time.monotonic()
        with pytest.raises(EngineError, match=r"rank 1 \(cpu, process \d+\): there is not enough memory"):
            load(crew, folder)
        assert time.monotonic() - begun < WITHIN_S
        assert is_gone(pid)


@pytest.mark.slow
def test_rank_0_is_killed(folder: Path) -> None:
    """Nobody is left."""
    script = (
        "from ingle.engine import ranks; from ingle.engine.startup import Startup; "
        "from ingle.parallel.layout import Layout; import time\n"
        "crew = ranks.assemble(Layout(3), ['cpu'] * 3, Startup(lambda stage: None))\n"
        "print(*crew.team.pids, flush=True); time.sleep(600)"
    )
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    pids = [int(pid) for pid in child.stdout.readline().split()]
    child.kill()
    child.wait()
    assert len(pids) == 2 and all(is_gone(pid) for pid in pids)


@pytest.mark.slow
def test_a_plain_script(tmp_path: Path) -> None:
    """Without a guard for whoever would import it, and from a thread that ends before its ranks do."""
    script = tmp_path / "script.py"
    script.write_text(
        "import threading\n"
        "from ingle import LLM, SamplingParams\n"
        "llms = []\n"
        "options = dict(tensor_parallel_size=2, device='cpu', dtype='float32', max_model_len=256)\n"
        "start = threading.Thread(target=lambda: llms.append(LLM('smollm2:135m', **options)))\n"
        "start.start(); start.join()\n"
        "params = SamplingParams(temperature=0, max_tokens=8)\n"
        "print(llms[0].generate('The capital of France is', params)[0].outputs[0].text)\n"
        "print(llms[0].info.device)\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert " Paris" in done.stdout and "2 x cpu (TP 2 by TCP on this machine)" in done.stdout


def test_the_thread_that_watches_frees_nothing_at_the_end() -> None:
    """It may outlast the interpreter: then PyTorch's process groups, freed by it, would abort the process."""

    class Computes:
        def end(self) -> None:
            self.ended = True

    computes, said = Computes(), []
    state = _Ranks([], os.memfd_create("rendezvous"), abort=computes.end, let_go=computes.end, last_resort=said.append)
    state.close()
    assert computes.ended
    gone = weakref.ref(computes)
    del computes
    gc.collect()
    assert gone() is None


def test_a_rank_that_is_killed_ends_all(two: Crew, folder: Path) -> None:
    """Also where nobody asks for anything. Comes last: it uses the ranks up."""
    told: queue.SimpleQueue[str] = queue.SimpleQueue()
    two.team.if_stuck(told.put)
    said = end_mid_stream(two, folder, lambda pid: os.kill(pid, signal.SIGKILL))
    assert re.fullmatch(r"rank 1 \(cpu, process \d+\) has died: killed by SIGKILL \(out of memory\?\)", said)
    assert told.get(timeout=60) == said
