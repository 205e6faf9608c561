"""The sampler without PyTorch against the one of every other device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ingle.device.native.sampler import NativeSampler, _invert, _nucleus
from ingle.device.native.sampler import logprob_rows as native_rows
from ingle.device.torch.sampler import Sampler
from ingle.engine.masks import pack_mask
from ingle.kernels import reference_sampling
from ingle.kernels.batch import StepInputs
from ingle.kernels.cpu import library
from ingle.request import SamplingParams, TokenLogprobs
from ingle.step import Admission, Chunk, Masks

VOCAB = 700
PARAMS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.3, "top_k": 5},
    {"temperature": 1.3, "top_p": 0.7},
    {"temperature": 0.9, "min_p": 0.1},
    {"temperature": 0.9, "top_k": 40, "top_p": 0.9, "min_p": 0.02},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1e-30},
    {"temperature": 1e-60},
    {"temperature": 0.8, "repetition_penalty": 1.7, "frequency_penalty": 0.6},
    {"temperature": 0.8, "repetition_penalty": 1e-40},
    {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1e-60},
    {"temperature": 0.8, "presence_penalty": 1.5, "logit_bias": {3: 8.0, 4: -100.0}},
    {"temperature": 0.8, "min_tokens": 5},
]


@pytest.fixture(autouse=True)
def kernels() -> None:
    failure = library.start(2)
    if failure is not None:
        pytest.skip(failure)


def samplers(params: list[dict[str, Any]]) -> tuple[NativeSampler, Sampler]:
    """Slot i has the i-th parameters, a prompt and two tokens after it."""
    host, torchs = NativeSampler(VOCAB), Sampler(len(params), VOCAB, torch.device("cpu"))
    rng = np.random.default_rng(2)
    admissions = [
        Admission(slot, rng.integers(0, VOCAB, 12).tolist(), 10, [], SamplingParams(**each), 77 + slot, (8, 9))
        for slot, each in enumerate(params)
    ]
    host.admit(admissions)
    torchs.admit(admissions)
    return host, torchs


def sample(
    sampler: Sampler, logits: torch.Tensor, slots: list[int], positions: list[int], masks: Masks | None = None
) -> tuple[list[int], list]:
    nothing = torch.empty(0, dtype=torch.int64)
    inputs = StepInputs(*[nothing] * 8, nothing, torch.tensor(slots), torch.tensor(positions))
    sampler.set_masks(masks or Masks())
    features = sampler.features([Chunk(slot, 0, 1, True) for slot in slots], masks or Masks())
    samples = sampler.sample(logits, inputs, features)
    return samples.token_ids.tolist(), samples.finite.tolist()


@pytest.mark.parametrize("params", PARAMS, ids=str)
def test_the_same_tokens(params: dict[str, Any]) -> None:
    host, torchs = samplers([params] * 4)
    generator = torch.Generator().manual_seed(3)
    for position in range(12, 40):  # min_tokens ends on the way, and what was drawn counts for the penalties
        slots = [3, 0, 2][: 1 + position % 3]
        logits = torch.randn(len(slots), VOCAB, generator=generator) * 3
        theirs = sample(torchs, logits.clone(), slots, [position] * len(slots))
        assert host.sample(logits.numpy(), slots, [position] * len(slots)) == theirs


def test_rows_of_unlike_requests() -> None:
    host, torchs = samplers(PARAMS)
    slots = list(range(len(PARAMS)))[::-1]
    logits = torch.randn(len(slots), VOCAB, generator=torch.Generator().manual_seed(4)) * 2
    positions = [12 + slot for slot in slots]
    assert host.sample(logits.numpy(), slots, positions) == sample(torchs, logits.clone(), slots, positions)


def test_equal_probabilities_stay_or_go_together() -> None:
    host, torchs = samplers([{"temperature": 1.0, "top_k": 2, "seed": None}, {"temperature": 1.0, "top_p": 0.3}])
    logits = torch.full((2, VOCAB), -5.0)
    logits[:, [10, 20, 30, 40]] = 2.0
    found = set()
    for position in range(12, 60):
        ours, _ = host.sample(logits.numpy(), [0, 1], [position] * 2)
        assert ours == sample(torchs, logits.clone(), [0, 1], [position] * 2)[0]
        found |= set(ours)
    assert found == {10, 20, 30, 40}


@pytest.mark.parametrize("more", [{}, {"logit_bias": {3: 1.5}}])
def test_the_likeliest_token_alone_is_the_greedy_one(more: dict[str, Any]) -> None:
    host, torchs = samplers([{"temperature": 5.0, "top_k": 1, **more}])
    logits = torch.full((1, VOCAB), -5.0)
    logits[:, [20, 30, 690]] = 2.0  # as products in 16 bits give them
    for position in range(12, 30):
        assert host.sample(logits.numpy().copy(), [0], [position])[0] == [20]
        assert sample(torchs, logits.to(torch.bfloat16), [0], [position])[0] == [20]


@pytest.mark.parametrize("params", PARAMS, ids=str)
def test_a_masked_token_is_never_drawn(params: dict[str, Any]) -> None:
    """A mask holds for one draw. Other slots draw as without."""
    host, torchs = samplers([params] * 3)
    plain, _ = samplers([params] * 3)
    allowed = [8, 31, 32, 69, VOCAB - 1]
    mask = pack_mask(np.isin(np.arange(VOCAB), allowed))
    generator = torch.Generator().manual_seed(3)
    drawn: tuple[set[int], set[int]] = (set(), set())
    for position in range(12, 40):
        logits = torch.randn(3, VOCAB, generator=generator) * 3
        masks = Masks([1], bytearray(mask)) if position % 2 else Masks()
        theirs = sample(torchs, logits.clone(), [0, 1, 2], [position] * 3, masks)
        host.set_masks(masks)
        ours = host.sample(logits.numpy(), [0, 1, 2], [position] * 3)
        assert ours == theirs and all(ours[1])
        without, _ = plain.sample(logits.numpy(), [0, 1, 2], [position] * 3)
        assert (without[0], without[2]) == (ours[0][0], ours[0][2])
        drawn[position % 2].add(ours[0][1])
    assert drawn[1] <= set(allowed) and len(drawn[1]) > 1
    assert not drawn[0] <= set(allowed)


def test_what_is_not_finite_is_told_and_gives_a_token_of_the_vocabulary() -> None:
    host, _ = samplers([{"temperature": 1.0, "repetition_penalty": 2.0}] * 3)
    logits = np.zeros((3, VOCAB), np.float32)
    logits[0, 5], logits[2, 6] = np.nan, -np.inf
    token_ids, finite = host.sample(logits, [0, 1, 2], [12, 12, 12])
    assert finite == [False, True, False] and all(0 <= token < VOCAB for token in token_ids)


@given(st.integers(1, 1500), st.floats(0, 1, exclude_max=True), st.integers(0, 2**32 - 1))
def test_a_share_falls_to_a_token_that_is_possible(size: int, share: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    probs = (rng.random(size) ** 9 * (rng.random(size) < 0.5)).astype(np.float32)
    probs[rng.integers(size)] += 1.0
    token = _invert(probs, share)
    cumulative = probs.cumsum(dtype=np.float64)
    assert probs[token] > 0
    assert cumulative[token] >= share * cumulative[-1] * (1 - 1e-12)
    assert token == 0 or cumulative[token - 1] <= share * cumulative[-1] * (1 + 1e-12)


def test_the_largest_share_is_that_of_the_last_possible_token() -> None:
    probs = np.zeros(2000, np.float32)
    probs[[3, 700]] = 0.1, 0.6
    assert _invert(probs, 1 - 2.0**-53) == 700 and _invert(probs, 0.0) == 3


def test_a_flat_nucleus_is_counted_to_its_end() -> None:
    ordered = np.full(3000, 1 / 3000, np.float32)
    for share in (0.01, 0.3, 0.9, 1.0):
        assert abs(_nucleus(ordered, share * ordered.sum()) - np.ceil(3000 * share)) <= 1


def entry(rows: Sequence[Any]) -> TokenLogprobs:
    """As the engine tells of the only one of these rows, arrays or tensors."""
    return TokenLogprobs(*(array.tolist()[0] for array in rows))


@pytest.mark.parametrize("count", [0, 1, 20])
def test_log_probabilities(count: int) -> None:
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(5))
    ours = entry(native_rows(logits[None].numpy(), [17], count))
    theirs = entry(reference_sampling.logprobs(logits[None], torch.tensor([17]), count))
    assert ours.token_ids == theirs.token_ids and ours.rank == theirs.rank
    np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 3, 20])
def test_of_equal_log_probabilities_the_chosen_one_comes_first(count: int) -> None:
    logits = torch.full((VOCAB,), -5.0)
    logits[[3, 20, 30, 690]] = torch.tensor([4.0, 2.0, 2.0, 2.0])
    for chosen in (20, 30, 690):
        ours = entry(native_rows(logits[None].numpy(), [chosen], count))
        theirs = entry(reference_sampling.logprobs(logits[None], torch.tensor([chosen]), count))
        for each in (ours, theirs):
            assert each.rank == 2 and each.token_ids[:3] == [chosen, 3, chosen][: count + 1]
            assert each.logprobs[1:] == sorted(each.logprobs[1:], reverse=True)
            assert len(set(each.token_ids[1:])) == count


def test_more_alternatives_than_there_are_tokens() -> None:
    logits = torch.randn(7, generator=torch.Generator().manual_seed(5))
    ours = entry(native_rows(logits[None].numpy(), [3], 20))
    theirs = entry(reference_sampling.logprobs(logits[None], torch.tensor([3]), 20))
    assert ours.token_ids == theirs.token_ids and sorted(ours.token_ids[1:]) == list(range(7))
