"""The whole engine on a tiny random model: what a request gets does not depend on what else is in the batch."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from ingle.config import EngineConfig
from ingle.engine import torch_build
from ingle.engine.build import build_engine
from ingle.engine.engine import Engine
from ingle.errors import ConfigError, RequestError
from ingle.request import EngineOutput, EngineRequest, SamplingParams
from tests.support import collect, engine_for, greedy, random_prompt, reference_model, restrict, run, save_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("tiny"), num_attention_heads=4, num_key_value_heads=2)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return engine_for(folder, block_size=8, enable_prefix_caching=False)


def sampled(seed: int, **options: object) -> SamplingParams:
    return SamplingParams(**{"temperature": 1.0, "top_p": 0.9, "top_k": 50, "seed": seed, "max_tokens": 24, **options})


def mixed_requests(count: int) -> list[EngineRequest]:
    """Greedy and seeded requests of mixed lengths; some share a prefix, some bring penalties, bias and min_tokens."""
    rng, shared = random.Random(0), random_prompt(99, 40)
    variants = [
        lambda i: SamplingParams(temperature=0.0, max_tokens=rng.randint(1, 40)),
        lambda i: sampled(i, max_tokens=rng.randint(1, 40)),
        lambda i: sampled(i, top_p=1.0, top_k=0, min_p=0.05, repetition_penalty=1.3),
        lambda i: sampled(i, frequency_penalty=0.7, presence_penalty=0.2, min_tokens=9, logit_bias={5: 4.0, 9: -50.0}),
    ]
    requests = []
    for i in range(count):
        prompt = random_prompt(i, rng.randint(1, 90))
        if i % 3 == 0:
            prompt = shared[: rng.randint(1, 40)] + prompt[:20]
        requests.append(EngineRequest(str(i), prompt, variants[i % 4](i), (2,)))
    return requests


def run_at_random_moments(engine: Engine, requests: list[EngineRequest]) -> dict[str, list[int]]:
    rng, queue = random.Random(1), list(requests)
    tokens: dict[str, list[int]] = {request.id: [] for request in requests}
    while queue or engine.has_work:
        for _ in range(rng.choice([0, 0, 1, 2, 8])):
            if queue:
                engine.add(queue.pop(0))
        if engine.has_work:
            for output in engine.step():
                tokens[output.id] += output.token_ids
    engine.scheduler.check()
    return tokens


@pytest.fixture(scope="module")
def alone(engine: Engine) -> dict[str, list[int]]:
    """What each of `mixed_requests` gets when nothing else runs."""
    tokens: dict[str, list[int]] = {}
    for request in mixed_requests(64):
        tokens |= run(engine, [request])
    return tokens


@pytest.mark.parametrize("prefix_caching", [False, True])
@pytest.mark.parametrize("overlap", [False, True])
def test_batched_equals_alone(folder: Path, alone: dict[str, list[int]], overlap: bool, prefix_caching: bool) -> None:
    requests = mixed_requests(64)
    tight = restrict(engine_for(folder, block_size=8), num_pages=33, max_num_batched_tokens=24, max_num_seqs=12,
                     enable_prefix_caching=prefix_caching, overlap=overlap)  # fmt: skip
    assert run_at_random_moments(tight, requests) == alone
    assert tight.scheduler.num_preemptions > 0, "the page budget was not tight"
    assert (sum(len(r.prompt_token_ids) for r in requests) > tight.stats().num_prompt_tokens) <= prefix_caching


def test_same_seed_same_tokens_other_seed_other_tokens(engine: Engine) -> None:
    prompt = random_prompt(5, 12)
    requests = [EngineRequest(name, prompt, sampled(seed)) for name, seed in (("a", 1), ("b", 1), ("c", 2))]
    tokens = run(engine, requests)
    assert tokens["a"] == tokens["b"] != tokens["c"]


def test_unseeded_requests_differ(engine: Engine) -> None:
    prompt = random_prompt(5, 12)
    params = SamplingParams(temperature=1.0, max_tokens=20)
    tokens = run(engine, [EngineRequest(name, prompt, params) for name in "ab"])
    assert tokens["a"] != tokens["b"]


def only(
    engine: Engine, params: SamplingParams, eos: tuple[int, ...] = (), prompt: list[int] | None = None
) -> EngineOutput:
    """One request's outputs joined."""
    parts = collect(engine, [EngineRequest("x", prompt or random_prompt(7, 20), params, eos)])["x"]
    last = parts[-1]
    return EngineOutput("x", [t for p in parts for t in p.token_ids], last.finish_reason, last.stop_token_id,
                        logprobs=[e for p in parts for e in p.logprobs or ()],
                        prompt_logprobs=parts[0].prompt_logprobs)  # fmt: skip


def test_end_tokens_stop_and_can_be_ignored(engine: Engine) -> None:
    greedy = SamplingParams(temperature=0.0, max_tokens=30)
    free = only(engine, greedy).token_ids
    end = free[5]
    first = free.index(end)
    stopped = only(engine, greedy, eos=(end,))
    assert (stopped.token_ids, stopped.finish_reason, stopped.stop_token_id) == (free[: first + 1], "stop", None)
    ignoring = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
    assert only(engine, ignoring, eos=(end,)).token_ids == free
    named = only(engine, SamplingParams(temperature=0.0, max_tokens=30, stop_token_ids=(end,)))
    assert (named.token_ids, named.finish_reason, named.stop_token_id) == (free[: first + 1], "stop", end)


def test_min_tokens_forbids_every_end(engine: Engine) -> None:
    free = only(engine, SamplingParams(temperature=0.0, max_tokens=30)).token_ids
    params = SamplingParams(temperature=0.0, max_tokens=30, min_tokens=12, stop_token_ids=(free[2],))
    assert free[2] not in only(engine, params, eos=(free[0],)).token_ids[:12]


def test_max_tokens_and_context_end_a_text(engine: Engine) -> None:
    output = only(engine, SamplingParams(temperature=0.0, max_tokens=3))
    assert (len(output.token_ids), output.finish_reason) == (3, "length")
    prompt = random_prompt(1, 500)
    output = only(engine, SamplingParams(temperature=0.0, max_tokens=None), prompt=prompt)
    assert (len(output.token_ids), output.finish_reason) == (12, "length")


def test_logprobs_are_those_of_transformers(folder: Path, engine: Engine) -> None:
    prompt = random_prompt(7, 20)
    params = SamplingParams(
        temperature=0.7, seed=3, max_tokens=5, logprobs=4, prompt_logprobs=2, repetition_penalty=1.5
    )
    output = only(engine, params, prompt=prompt)
    tokens = prompt + output.token_ids
    with torch.inference_mode():
        expected = reference_model(folder)(torch.tensor([tokens])).logits[0].log_softmax(-1)
    assert output.prompt_logprobs is not None and output.logprobs is not None
    entries = [*output.prompt_logprobs, *output.logprobs]
    assert entries[0] is None and len(entries) == len(tokens)
    for position, entry in enumerate(entries[1:], start=1):
        row, count = expected[position - 1], 2 if position < len(prompt) else 4
        assert entry is not None and entry.token_ids[0] == tokens[position]
        assert entry.token_ids[1:] == row.topk(count).indices.tolist()
        torch.testing.assert_close(torch.tensor(entry.logprobs), row[entry.token_ids], atol=1e-4, rtol=0)
        assert entry.rank == int((row > row[tokens[position]]).sum()) + 1


def test_prompt_logprobs_survive_chunks_and_preemption(folder: Path, engine: Engine) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=30, prompt_logprobs=1)
    requests = [EngineRequest(str(i), random_prompt(i, 50), params) for i in range(3)]
    alone = {r.id: collect(engine, [r])[r.id][0].prompt_logprobs for r in requests}
    tight = restrict(engine_for(folder, block_size=8), num_pages=17, max_num_batched_tokens=9)
    for name, parts in collect(tight, requests).items():
        assert parts[0].prompt_logprobs is not None and alone[name] is not None
        for ours, theirs in zip(parts[0].prompt_logprobs, alone[name] or (), strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None and theirs is not None:
                assert ours.token_ids == theirs.token_ids
    assert tight.scheduler.num_preemptions > 0


@pytest.mark.parametrize("overlap", [False, True])
def test_a_prompt_is_scored_up_to_the_whole_context(folder: Path, engine: Engine, overlap: bool) -> None:
    small = restrict(engine_for(folder, block_size=8), num_pages=7, overlap=overlap, max_num_batched_tokens=20)
    prompt = random_prompt(4, small.scheduler.limits.max_model_len)
    (entry,) = collect(small, [EngineRequest("all", prompt, SamplingParams(max_tokens=0, prompt_logprobs=0))])["all"]
    assert (entry.token_ids, entry.finish_reason, entry.logprobs) == ([], "length", None)
    longer = EngineRequest("more", prompt, SamplingParams(max_tokens=1, prompt_logprobs=0))
    wanted = collect(engine, [longer])["more"][0].prompt_logprobs
    assert entry.prompt_logprobs is not None and wanted is not None and len(wanted) == len(prompt)
    for ours, theirs in zip(entry.prompt_logprobs[1:], wanted[1:], strict=True):
        assert ours is not None and theirs is not None and ours.token_ids == theirs.token_ids
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)


def test_cached_tokens_are_reported(folder: Path) -> None:
    engine, prompt = engine_for(folder, block_size=8), random_prompt(3, 33)
    params = SamplingParams(temperature=0.0, max_tokens=2)
    first = collect(engine, [EngineRequest("a", prompt, params)])["a"][0]
    again = collect(engine, [EngineRequest("b", prompt, params)])["b"][0]
    assert (first.num_cached_tokens, again.num_cached_tokens) == (0, 32)
    assert first.token_ids == again.token_ids


def test_generated_pages_serve_the_next_turn(folder: Path) -> None:
    engine, prompt = engine_for(folder, block_size=8), random_prompt(4, 10)
    answer = run(engine, [EngineRequest("a", prompt, SamplingParams(temperature=0.0, max_tokens=30))])["a"]
    turn = EngineRequest("b", prompt + answer + [9], SamplingParams(temperature=0.0, max_tokens=1))
    assert collect(engine, [turn])["b"][0].num_cached_tokens == 32  # 39 tokens of the first turn have keys and values


def test_an_abort_leaves_the_batch_within_a_step(folder: Path) -> None:
    engine = engine_for(folder, block_size=8, enable_prefix_caching=False)
    for name in "ab":
        engine.add(EngineRequest(name, random_prompt(1, 10), SamplingParams(temperature=0.0, max_tokens=50)))
    engine.step()
    engine.abort("a")
    assert {output.id for output in engine.step()} == {"b"}
    engine.abort("b")
    assert not engine.has_work
    engine.scheduler.check()
    assert engine.scheduler.pages.num_available == engine.scheduler.pages.capacity


def test_nan_fails_its_request_alone_and_does_not_linger(folder: Path) -> None:
    engine = engine_for(folder, block_size=8, num_gpu_blocks_override=12, max_model_len=64, cpu_kernels="torch")
    poisoned, healthy = [250] * 9, random_prompt(2, 9, vocab_size=200)
    expected = run(engine, [EngineRequest("ref", healthy, SamplingParams(temperature=0.0, max_tokens=12))])["ref"]
    engine.worker.device.model.embedding.plain[250] = torch.nan
    params = SamplingParams(temperature=0.0, max_tokens=12)
    outputs = collect(engine, [EngineRequest("bad", poisoned, params), EngineRequest("good", healthy, params)])
    assert outputs["bad"][-1].finish_reason == "error"
    assert [t for o in outputs["good"] for t in o.token_ids] == expected
    for turn in range(4):  # over pages that held NaN
        assert run(engine, [EngineRequest(str(turn), healthy, params)])[str(turn)] == expected


@pytest.mark.parametrize(
    ("prompt", "params", "match"),
    [
        ([], {}, "the prompt is empty"),
        ([3] * 512, {}, "maximum context length is 512 tokens, but the prompt has 512 tokens"),
        ([3, 256], {}, "token id 256 is not in the model's vocabulary of 256 tokens"),
        ([3], {"logit_bias": {400: 1.0}}, "logit_bias names token 400"),
        ([3], {"stop_token_ids": (256,)}, "stop_token_ids names token 256"),
    ],
)
def test_requests_that_cannot_be_served_are_refused(
    engine: Engine, prompt: list[int], params: dict, match: str
) -> None:
    with pytest.raises(RequestError, match=match):
        engine.add(EngineRequest("x", prompt, SamplingParams(**params)))
    assert not engine.has_work


def test_a_kv_cache_larger_than_the_memory_is_refused(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, max_position_embeddings=1000)
    with pytest.raises(ConfigError, match=r"does not fit the .* free beside the weights: .* --kv-cache-memory"):
        engine_for(folder, kv_cache_memory="64TiB", max_num_seqs=10**8, max_num_batched_tokens=10**8)
    with pytest.raises(ConfigError, match="--num-gpu-blocks-override"):
        engine_for(folder, num_gpu_blocks_override=1 << 40)


def test_memory_that_the_kv_cache_leaves_is_reported(folder: Path) -> None:
    _, info = build_engine(EngineConfig.of(str(folder), device="cpu", kv_cache_memory="1GiB", max_num_seqs=2), folder)
    assert any("1.00 GiB: 2 sequences of" in notice and "need no more" in notice for notice in info.notices)


def test_tables_are_no_longer_than_any_sequence_could_be(tmp_path: Path) -> None:
    """A configuration may claim two billion tokens of context: the KV cache decides before memory is taken for them."""
    engine = engine_for(save_checkpoint(tmp_path, max_position_embeddings=1 << 31), kv_cache_memory="1MiB")
    most = engine.scheduler.limits.max_model_len
    assert len(engine.worker.device.model.cos_sin[0]) == most < 3000
    assert len(greedy(engine, random_prompt(1, 20), 4)) == 4


@pytest.mark.parametrize(
    ("stored", "notices"),
    [("float32", []), ("bfloat16", ["dtype bfloat16 -> float32: this CPU does not multiply it natively"])],
)
def test_a_type_that_stays_what_it_is_is_no_notice(
    stored: str, notices: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    picked = torch_build.pick_dtype(EngineConfig.of("any"), {"torch_dtype": stored}, None)
    assert picked == (torch.float32, notices)


def test_a_small_model_that_claims_any_context_does_not_fill_memory(tmp_path: Path) -> None:
    """Rotations and page tables are as long as a sequence may be: of 16 million tokens they took gigabytes."""
    save_checkpoint(tmp_path, max_position_embeddings=1 << 31)
    config = EngineConfig.of(str(tmp_path), device="cpu", kv_cache_memory="4GiB")
    engine, info = build_engine(config, tmp_path)
    assert info.max_model_len < 500_000
    assert any("tables for more take more memory" in notice for notice in info.notices)
    assert greedy(engine, random_prompt(0, 9), 2)
