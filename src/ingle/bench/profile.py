"""Where the time of steps goes: device time by kind of kernel, and what the device spends waiting for the host."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import asdict, dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from ingle.bench.throughput import step
from ingle.engine.engine import Engine
from ingle.engine.scheduler import Scheduler
from ingle.errors import ConfigError
from ingle.kv import pages_held
from ingle.request import EngineRequest, SamplingParams, token_ids

COLLECTIVES = "collectives, with waiting"
"""What ranks compute together, and how long they wait for each other in it."""
_KINDS = (
    (
        COLLECTIVES,
        (
            "nccl",
            "_one_shot_kernel",
            "_two_shot_kernel",
            "_sent_kernel",
            "multimem",
            "allreduce",
            "all_reduce",
            "allgather",
            "all_gather",
            "cross_device_reduce",
            "ranks: ",
        ),
    ),
    (
        "sampling",
        (
            "_survey_kernel",
            "_draw_kernel",
            "_tell_kernel",
            "_draw_share_kernel",
            "_mass_kernel",
            "_logprobs_kernel",
            "argmax",
            "softmax",
            "cumsum",
            "aten::sort",
        ),
    ),
    (
        "attention",
        (
            "_decode_kernel",
            "_decode_codes_kernel",
            "_decode_hopper_kernel",
            "_share_kernel",
            "_prefill_kernel",
            "_encode_kernel",
            "scaled_dot_product",
        ),
    ),
    (
        "matmuls",
        ("_vector_kernel", "_few_rows_", "_gated_product", "_gate_up_kernel", "_down_kernel", "_experts_kernel"),
    ),
    (
        "matmuls",
        (
            "_coded_kernel",
            "_coded_row_kernel",
            "_fp8_few_kernel",
            "_planes_kernel",
            "_warpgroups_kernel",
            "_decode_weights_kernel",
        ),
    ),
    (
        "norms, rotation, activation",
        (
            "_rms_norm",
            "_rotate_and_store",
            "_gated",
            "_soft_cap",
            "_fp8_norm",
            "_fp8_rows",
            "_fp8_scale",
            "aten::mul",
            "aten::silu",
            "aten::gelu",
            "aten::tanh",
        ),
    ),
    ("matmuls", ("gemm", "nvjet", "cutlass", "gemv", "splitk", "cublas", "aten::mm", "aten::addmm")),
)


@dataclass(frozen=True)
class Profile:
    """Per step, in microseconds, over `num_steps` steps of which `num_prompt_tokens` were prompt."""

    workload: str
    num_steps: int
    num_prompt_tokens: int
    wall_us: float
    device_us: dict[str, float]
    """By kind of kernel; on a CPU, operators' own time."""
    gap_us: float
    """Wall time in which the device ran nothing."""
    host_us: float
    """Time the host spent planning, launching and retiring, waits for the device included."""
    kernels_us: dict[str, float]
    """The largest single kernels."""

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def profile_decode(engine: Engine, *, num_seqs: int, context: int, num_steps: int = 20) -> Profile:
    """Steady decoding of `num_seqs` sequences of some `context` tokens. Raises `ConfigError` where they do not fit."""
    scheduler, limits = engine.scheduler, engine.scheduler.limits
    num_fitting = scheduler.pages.capacity // pages_held(limits.windows, context, limits.page_size, chunk=1)
    too_much = ConfigError(
        f"{num_seqs} sequences of {context} tokens do not decode together: the engine takes {limits.max_num_seqs} "
        f"sequences (--max-num-seqs) of {limits.max_model_len} tokens (--max-model-len) and holds keys and values "
        f"of {num_fitting} such sequences (--kv-cache-memory); give it more, or ask for less by --num-seqs and "
        "--context"
    )
    if num_seqs > limits.max_num_seqs or num_seqs > num_fitting or context >= limits.max_model_len:
        raise too_much
    _fill(engine, num_seqs, context, limits.max_model_len - context)
    while len(scheduler.running) + scheduler.num_waiting == num_seqs and not _all_decode(scheduler, num_seqs):
        step(engine)
    for _ in range(6):
        step(engine)
    result = _profile_steps(engine, f"decode {num_seqs} x {context}", num_steps)
    is_steady = _all_decode(scheduler, num_seqs)
    for index in range(num_seqs):
        engine.abort(_name(index))
    _drain(engine)
    if not is_steady:  # pages ran out, or the first ones came to the end of the context
        raise too_much
    return result


def _all_decode(scheduler: Scheduler, num_seqs: int) -> bool:
    return len(scheduler.running) == num_seqs and all(s.num_computed >= s.num_prompt_tokens for s in scheduler.running)


def profile_prefill(engine: Engine, *, num_seqs: int, context: int) -> Profile:
    """Reading `num_seqs` prompts of `context` tokens, up to the step that completes the last."""
    for name in ("warm", "measured"):
        _fill(engine, num_seqs, context, 2)
        limits = engine.scheduler.limits
        num_steps = -(-num_seqs * context // limits.max_num_batched_tokens) + limits.num_turns - 1
        if name == "measured":
            result = _profile_steps(engine, f"prefill {num_seqs} x {context}", num_steps)
        _drain(engine)
    return result


def _fill(engine: Engine, num_seqs: int, context: int, num_out: int) -> None:
    generator = torch.Generator().manual_seed(0)
    vocab_size = engine.facts.vocab_size
    for index in range(num_seqs):
        prompt = torch.randint(vocab_size, (context,), generator=generator).tolist()
        params = SamplingParams(temperature=0.6, max_tokens=num_out, ignore_eos=True)
        engine.add(EngineRequest(_name(index), token_ids(prompt), params))


def _name(index: int) -> str:
    return f"profile-{index}"


def _drain(engine: Engine) -> None:
    while engine.has_work:
        step(engine)


def _profile_steps(engine: Engine, name: str, num_steps: int) -> Profile:
    on_gpu = engine.facts.on_gpu
    activities = [ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
    first_prompt_tokens = engine.stats().num_prompt_tokens
    if on_gpu:
        torch.cuda.synchronize()
    with profile(activities=activities) as trace:
        started = time.perf_counter()
        for _ in range(num_steps):
            step(engine)
        host = time.perf_counter() - started
        if on_gpu:
            torch.cuda.synchronize()
        wall = time.perf_counter() - started
    kinds: Counter[str] = Counter()
    kernels: Counter[str] = Counter()
    for event in trace.key_averages():
        duration = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if duration <= 0:
            continue
        kinds[_kind(event.key)] += duration / num_steps
        kernels[event.key[:80]] += duration / num_steps
    rest = max(wall / num_steps * 1e6 - sum(kinds.values()), 0.0)
    return Profile(
        workload=name,
        num_steps=num_steps,
        num_prompt_tokens=engine.stats().num_prompt_tokens - first_prompt_tokens,
        wall_us=wall / num_steps * 1e6,
        device_us=dict(kinds.most_common()) | ({} if on_gpu else {"ingle's kernels, Python": rest}),
        gap_us=rest if on_gpu else 0.0,
        host_us=host / num_steps * 1e6,
        kernels_us=dict(kernels.most_common(14)),
    )


def _kind(name: str) -> str:
    lower = name.lower()
    return next((kind for kind, marks in _KINDS if any(mark in lower for mark in marks)), "other")


def table(result: Profile) -> str:
    """The profile as lines for people."""
    wall = result.wall_us
    lines = [
        f"{result.workload}: {wall:,.0f} us a step; {result.num_prompt_tokens} prompt tokens, {result.num_steps} steps"
    ]
    rows = [*result.device_us.items(), ("device idle", result.gap_us)]
    lines += [f"  {name:<32}{us:>10,.0f} us {us / wall:>6.1%}" for name, us in rows]
    lines += [f"    {name:<70}{us:>10,.1f} us" for name, us in result.kernels_us.items()]
    return "\n".join(lines)
