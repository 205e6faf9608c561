"""Layers with a window keep what they read and give the rest back: more sequences fit, and all get the same answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from ingle.config import EngineConfig
from ingle.device.native.device import NativeDevice
from ingle.device.torch.device import TorchDevice
from ingle.engine.memory import MemoryPlan, plan_memory
from ingle.engine.pages import PagePool
from ingle.engine.scheduler import Scheduler
from ingle.kv import KvSpec, one_group, pages_held
from ingle.model.registry import decoder_config
from ingle.request import EngineRequest, SamplingParams
from ingle.step import Limits, StepResult
from tests.support import collect, engine_for, expect_short_answers, greedy, random_prompt, run, save_checkpoint

GEMMA3_4B = decoder_config({
    "model_type": "gemma3_text", "vocab_size": 262208, "hidden_size": 2560, "intermediate_size": 10240,
    "num_hidden_layers": 34, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
    "sliding_window": 1024, "max_position_embeddings": 131072,
})  # fmt: skip
CONTEXT = 32768


def planned(kv: KvSpec, budget: int) -> MemoryPlan:
    config = EngineConfig.of("gemma3", max_model_len=CONTEXT, max_num_seqs=64)
    return plan_memory(config, GEMMA3_4B, kv, on_gpu=True, budget=budget, free=None)


def test_two_and_a_half_times_the_sequences_in_the_same_memory() -> None:
    """Of a Gemma 3 with a context of 32k: by the plan, and as the scheduler then runs them, with none preempted."""
    kv = GEMMA3_4B.kv_spec("bfloat16")
    everything = KvSpec((one_group((None,) * 34),), kv.sides, kv.heads, kv.dim, kv.dtype)
    budget = 3 * CONTEXT * kv.token_bytes + everything.page_bytes(16)
    before, after = planned(everything, budget), planned(kv, budget)
    assert before.num_pages - 1 == 3 * pages_held((None,), CONTEXT, 16, 8192)
    assert after.limits.max_model_len == before.limits.max_model_len == CONTEXT and after.kv_cache_bytes <= budget
    chunk_pages = pages_held(kv.windows, CONTEXT, 16, 8192) - pages_held(kv.windows, CONTEXT, 16, 1)
    num_seqs = (after.num_pages - 1 - chunk_pages) // pages_held(kv.windows, CONTEXT, 16, 1)
    assert num_seqs >= 2.5 * 3

    scheduler = Scheduler(PagePool(after.num_pages), after.limits)
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    for number in range(num_seqs):
        prompt = [number] * (CONTEXT - 40)
        scheduler.add(EngineRequest(str(number), prompt, params), number)
    most_decodes = 0
    while scheduler.has_work:
        plan = scheduler.plan()
        assert plan is not None
        most_decodes = max(most_decodes, plan.step.num_decodes)
        drawn = sum(chunk.samples for chunk in plan.step.chunks)
        scheduler.retire(plan, StepResult([[1]] * drawn, [True] * drawn))
    assert most_decodes >= 2.5 * 3 and scheduler.num_preemptions == 0
    scheduler.check()


def test_pages_given_back_with_broken_numbers_are_zeroed_too() -> None:
    limits = Limits(2, 8, 40, 4, windows=(None, 5))
    scheduler = Scheduler(PagePool(40), limits)
    scheduler.add(EngineRequest("bad", list(range(30)), SamplingParams(max_tokens=3)), 0)
    held: set[int] = set()
    for start in (0, 8, 16, 24):
        plan = scheduler.plan()
        assert plan is not None and plan.step.chunks[0].start == start
        held |= set(scheduler.running[0].pages.held)
        samples = start == 24
        scheduler.retire(plan, StepResult([[1]] * samples, [False] * samples))
    assert not scheduler.has_work and scheduler.pages.num_cached == 0
    scheduler.add(EngineRequest("next", [1], SamplingParams(max_tokens=3)), 0)
    plan = scheduler.plan()
    assert plan is not None and len(held) == 8 + 8
    assert set(plan.step.scrubbed) == held
    scheduler.check()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("gemma3_text", {"head_dim": 16, "sliding_window": 21, "num_hidden_layers": 7}),
        ("gemma2", {"head_dim": 16, "sliding_window": 12, "num_hidden_layers": 4}),
        ("mistral", {"sliding_window": 21}),
    ],
)
def test_long_answers_shared_prefixes_and_preemption(
    model_type: str, options: dict[str, int], dtype: str, tmp_path: Path
) -> None:
    """With pages for little more than one sequence, as alone with pages for all, on both devices."""
    folder = save_checkpoint(tmp_path, model_type, **options)
    cpu_kernels = "torch" if dtype == "float32" else "auto"
    roomy = engine_for(
        folder, dtype=dtype, cpu_kernels=cpu_kernels, block_size=8, kv_cache_memory="4MiB", enable_prefix_caching=False
    )
    limits = {"max_num_batched_tokens": 28, "max_num_seqs": 5, "max_model_len": 160}
    windows = roomy.scheduler.limits.windows
    num_pages = 1 + pages_held(windows, 160, 8, 28)
    tight = engine_for(
        folder, dtype=dtype, cpu_kernels=cpu_kernels, block_size=8, num_gpu_blocks_override=num_pages, **limits
    )
    expect_short_answers(tight.scheduler)
    assert isinstance(tight.worker.device, TorchDevice if cpu_kernels == "torch" else NativeDevice)
    shared = random_prompt(9, 64)
    prompts = [random_prompt(i, 20 + 45 * i) for i in range(3)] + [shared + random_prompt(i, 7) for i in (7, 8)]
    expected = {str(index): greedy(roomy, prompt, 40) for index, prompt in enumerate(prompts)}
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    requests = [EngineRequest(str(index), prompt, params) for index, prompt in enumerate(prompts)]
    assert run(tight, requests) == expected
    assert tight.scheduler.num_preemptions > 0
    assert run(tight, requests[-1:]) == {requests[-1].id: expected[requests[-1].id]}
    next_turn = prompts[-1] + expected[requests[-1].id] + random_prompt(5, 9)
    (output, *_) = collect(tight, [EngineRequest("next", next_turn, SamplingParams(temperature=0.0, max_tokens=1))])[
        "next"
    ]
    assert output.token_ids == greedy(roomy, next_turn, 1)
    assert output.num_cached_tokens == (len(next_turn) - 10) // 8 * 8
