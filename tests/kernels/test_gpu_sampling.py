"""The sampling kernels against plain PyTorch: under Triton's interpreter where there is no GPU, else on it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from ingle.kernels import gpu, reference
from ingle.kernels.gpu import sampling
from ingle.kernels.reference_sampling import adjust
from ingle.kernels.sampling import (
    FIRST_END,
    NUM_BIASES,
    PROMPT_FLAG,
    Adjustments,
    Features,
    SamplingTables,
    all_allowed,
)
from tests.kernels.interpreted import pairwise

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if ON_GPU else [])
PLAIN, FILTERED = Features(), Features(filtered=True)


@pytest.fixture(autouse=True)
def same_numbers_each_time() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


class Cut(NamedTuple):
    """A slot's draw."""

    temperature: float = 1.0
    top_p: float = 1.0
    min_p: float = 0.0
    top_k: int = 0


def tables_of(cuts: list[Cut], vocab: int) -> SamplingTables:
    tables = SamplingTables.allocate(len(cuts), vocab, DEVICE)
    tables.floats[:, :3] = torch.tensor([cut[:3] for cut in cuts], device=DEVICE)
    tables.ints[:, :2] = torch.tensor([(1000 + i, cut.top_k or vocab) for i, cut in enumerate(cuts)], device=DEVICE)
    return tables


CUTS = [Cut(0.0), Cut(1.0), Cut(0.6, 0.9), Cut(1.3, top_k=5), Cut(0.8, 0.8, top_k=20), Cut(min_p=0.2),
        Cut(2.0, 0.5, 0.01, 40), Cut(1e-6), Cut(0.7, 0.95, top_k=300), Cut(1e-30, 0.9)]  # fmt: skip


@pytest.mark.parametrize(("vocab", "dtype"), [(50, DTYPES[0]), (5000, DTYPES[1]), (9001, DTYPES[0])])
def test_draws_equal_the_reference(vocab: int, dtype: torch.dtype) -> None:
    tables = tables_of([cut._replace(top_k=min(cut.top_k, vocab - 1)) for cut in CUTS], vocab)
    slots = torch.randperm(len(CUTS), device=DEVICE)
    agreed = total = 0
    for position in range(6):
        logits = (torch.randn(len(CUTS), vocab, device=DEVICE) * 3).to(dtype)
        positions = torch.full_like(slots, position * 7)
        for features in (PLAIN, FILTERED):
            ours, finite, _ = gpu.sample(logits, slots, positions, tables, features)
            theirs, _, _ = reference.sample(logits, slots, positions, tables, features)
            assert finite.all()
            agreed += int((ours == theirs).sum())
            total += len(ours)
    # The draw may fall between two tokens whose cumulative masses differ by the order of a sum.
    assert agreed >= total - 1


FLAT = {"narrow": 0.01, "steep": 20.0, "all-equal": 0.0, "rounded": -1.0}


@pytest.mark.parametrize("spread", FLAT.values(), ids=FLAT.keys())
def test_draws_from_flat_and_steep_distributions(spread: float) -> None:
    """Where candidates are too many, or equal, or one alone."""
    vocab = 6000
    logits = (torch.randn(12, vocab, device=DEVICE) * 2).round() if spread < 0 else torch.randn(12, vocab) * spread
    logits = logits.to(DEVICE)
    cuts = [Cut(1.0, 0.9), Cut(1.0, 0.01), Cut(min_p=0.9), Cut(top_k=1000), Cut(top_k=2500), Cut(1.5, 0.7, 0.0, 3000)]
    tables = tables_of(cuts * 2, vocab)
    slots = torch.arange(12, device=DEVICE)
    ours = gpu.sample(logits, slots, slots + 3, tables, FILTERED).token_ids
    theirs = reference.sample(logits, slots, slots + 3, tables, FILTERED).token_ids
    assert int((ours != theirs).sum()) <= 1


PASSING = [
    (Cut(top_k=1), {7}),
    (Cut(top_k=2), {7, 80, 150}),
    (Cut(top_k=4), {7, 80, 150, 299}),
    (Cut(top_p=0.5), {7}),
    (Cut(top_p=0.6), {7, 80, 150}),
    (Cut(top_p=1e-30), {7}),
    (Cut(min_p=0.2), {7, 80, 150}),
]


def drawn(cut: Cut, count: int) -> set[int]:
    logits = torch.full((1, 300), -8.0, device=DEVICE)
    logits[0, [7, 80, 150, 299]] = torch.tensor([3.0, 2.0, 2.0, 1.0], device=DEVICE)
    slots = torch.zeros(count, dtype=torch.int64, device=DEVICE)
    positions = torch.arange(count, device=DEVICE)
    return set(gpu.sample(logits.repeat(count, 1), slots, positions, tables_of([cut], 300), FILTERED)[0].tolist())


@pytest.mark.parametrize(("cut", "passing"), PASSING, ids=str)
def test_filters_are_exact(cut: Cut, passing: set[int]) -> None:
    """Over many draws exactly the tokens that pass are seen: ties at the threshold stay together."""
    assert drawn(cut, 60) == passing


@pytest.mark.parametrize(("cut", "passing"), PASSING, ids=str)
def test_filters_are_exact_by_passes_over_the_row(cut: Cut, passing: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "_CAPACITY", 1)
    assert drawn(cut, 12) <= passing


def test_broken_rows_are_reported_and_forbidden_tokens_are_not_drawn() -> None:
    logits = torch.zeros(3, 5000, device=DEVICE)
    logits[0, 4999] = torch.nan
    logits[1, 3] = torch.inf
    logits[2, 1:] = -1e30
    slots = torch.arange(3, device=DEVICE)
    for cut in (Cut(), Cut(top_k=5), Cut(top_p=0.5), Cut(0.0)):
        tokens, finite, _ = gpu.sample(logits, slots, slots, tables_of([cut] * 3, 5000), FILTERED)
        assert finite.tolist() == [False, False, True]
        assert tokens[2] == 0 and ((tokens >= 0) & (tokens < 5000)).all()


# ---- what changes logits


def adjusted_tables(cuts: list[Cut], vocab: int) -> SamplingTables:
    """Slots with every kind of adjustment, and some with none."""
    tables = tables_of(cuts, vocab)
    rows = tables.adjustments = Adjustments.allocate(len(cuts), vocab, DEVICE)
    tables.masks = all_allowed(len(cuts), vocab, DEVICE)
    for slot in range(len(cuts)):
        if slot % 3 == 1:
            tables.floats[slot, 3:] = torch.tensor([1.3, 0.4, 0.2])
            rows.counts[slot, torch.randint(vocab, (20,), device=DEVICE)] = 2
            rows.counts[slot, torch.randint(vocab, (20,), device=DEVICE)] = PROMPT_FLAG
            rows.counts[slot, torch.randint(vocab, (20,), device=DEVICE)] = PROMPT_FLAG + 1
        if slot % 4 == 2:
            count = min(vocab, 200)
            tables.ints[slot, NUM_BIASES] = count
            rows.bias_ids[slot, :count] = torch.randperm(vocab, device=DEVICE)[:count].int()
            rows.biases[slot, :count] = torch.randn(count, device=DEVICE) * 9
        if slot % 5 == 3:
            tables.ints[slot, FIRST_END] = 40
            rows.end_words[slot] = torch.randint(-(2**31), 2**31, rows.end_words[slot].shape, device=DEVICE).int()
        if slot % 6 == 4:
            tables.masks[slot] = torch.randint(-(2**31), 2**31, tables.masks[slot].shape, device=DEVICE).int()
    return tables


ALL = Features(filtered=True, adjusted=True, masked=True)


@pytest.mark.parametrize(("vocab", "dtype"), [(50, DTYPES[0]), (4097, DTYPES[1])])
def test_adjusted_draws_equal_the_reference(vocab: int, dtype: torch.dtype) -> None:
    cuts = [CUTS[i % len(CUTS)] for i in range(31)]
    cuts = [cut._replace(top_k=min(cut.top_k, vocab - 1)) for cut in cuts]
    ours_tables, theirs_tables = (adjusted_tables(cuts, vocab) for _ in same_twice())
    slots = torch.randperm(len(cuts), device=DEVICE)[:24]
    agreed = total = 0
    for position in (38, 39, 40):  # end tokens are possible from 40 on
        logits = (torch.randn(len(slots), vocab, device=DEVICE) * 3).to(dtype)
        positions = torch.full_like(slots, position)
        ours = gpu.sample(logits, slots, positions, ours_tables, ALL)
        theirs = reference.sample(logits, slots, positions, theirs_tables, ALL)
        assert ours.finite.all() and theirs.finite.all()
        agreed += int((ours.token_ids == theirs.token_ids).sum())
        total += len(slots)
        assert ours_tables.adjustments is not None and theirs_tables.adjustments is not None
        changed = ours_tables.adjustments.counts != theirs_tables.adjustments.counts
        assert int(changed.sum()) <= 2 * int((ours.token_ids != theirs.token_ids).sum())
        theirs_tables.adjustments.counts.copy_(ours_tables.adjustments.counts)
    assert agreed >= total - 1


def same_twice() -> Iterator[None]:
    for _ in range(2):
        torch.manual_seed(1)
        yield


def test_a_row_that_wants_nothing_is_drawn_as_in_a_batch_without() -> None:
    """Bit for bit, whatever its neighbours want, and beside padding."""
    vocab, count = 4103, 20
    tables = adjusted_tables([CUTS[i % len(CUTS)] for i in range(count)], vocab)
    logits = (torch.randn(count, vocab, device=DEVICE) * 3).half()
    slots = torch.arange(count, device=DEVICE)
    together = gpu.sample(logits, slots, slots + 50, tables, ALL).token_ids
    assert tables.adjustments is not None
    for slot in range(count):
        if slot % 3 == 1 or slot % 4 == 2 or slot % 6 == 4:
            continue
        row = slice(slot, slot + 1)
        cut = CUTS[slot % len(CUTS)]
        features = Features(filtered=cut.top_k > 0 or cut.top_p < 1 or cut.min_p > 0)
        assert gpu.sample(logits[row], slots[row], slots[row] + 50, tables, features).token_ids == together[slot]


@pytest.mark.parametrize("cut", [Cut(0.0), Cut(), Cut(top_k=50), Cut(0.8, 0.9), Cut(1.0, 0.9, 0.0, 50)], ids=str)
def test_masked_tokens_are_never_drawn(cut: Cut) -> None:
    vocab, count = 4100, 12
    tables = tables_of([cut], vocab)
    allowed = [5, 31, 32, 4095, 4096, 4099]
    words = np.zeros(tables_words(vocab), np.uint32)
    for token in allowed:
        words[token // 32] |= np.uint32(1 << token % 32)
    tables.masks = torch.from_numpy(words.view(np.int32))[None].to(DEVICE)
    logits = torch.randn(count, vocab, device=DEVICE)
    slots = torch.zeros(count, dtype=torch.int64, device=DEVICE)
    features = Features(filtered=True, masked=True)
    for kernels in (gpu, reference):
        tokens, finite, _ = kernels.sample(logits, slots, torch.arange(count, device=DEVICE), tables, features)
        assert set(tokens.tolist()) <= set(allowed) and len(set(tokens.tolist())) > 2
        assert finite.all()
    tables.masks = torch.zeros_like(tables.masks)
    tokens, finite, _ = gpu.sample(logits, slots, slots, tables, features)
    assert finite.all() and ((tokens >= 0) & (tokens < vocab)).all()


def tables_words(vocab: int) -> int:
    return -(-vocab // 32)


def test_padding_counts_nothing() -> None:
    tables = adjusted_tables([Cut(), Cut(), Cut(0.0)], 100)
    tables.floats[2] = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0, 0.0])
    assert tables.adjustments is not None
    before = tables.adjustments.counts.clone()
    slots = torch.tensor([1, 2, 2, 2], device=DEVICE)
    tokens = gpu.sample(torch.randn(4, 100, device=DEVICE), slots, slots, tables, ALL).token_ids
    before[1, tokens[0]] += 1
    assert torch.equal(tables.adjustments.counts, before)


def test_a_penalty_next_to_nothing_makes_no_row_infinite() -> None:
    tables = adjusted_tables([Cut(), Cut()], 200)
    tables.floats[1, 3:] = torch.tensor([0.0, 0.0, 0.0])  # what 1e-60 is in float32
    assert tables.adjustments is not None
    tables.adjustments.counts[1] = PROMPT_FLAG
    logits, slots = torch.randn(2, 200, device=DEVICE), torch.arange(2, device=DEVICE)
    expected = adjust(logits, slots, slots + 90, tables, ALL)
    assert not expected.isnan().any() and (expected < torch.inf).all()
    ours = gpu.sample(logits, slots, slots + 90, tables, ALL)
    assert ours.finite.all()
    assert torch.equal(ours.token_ids, reference.sample(logits, slots, slots + 90, tables, ALL).token_ids)


# ---- log probabilities


def equal_logprobs(ours: Any, theirs: Any) -> None:
    assert torch.equal(ours.token_ids[:, 0], theirs.token_ids[:, 0]) and torch.equal(ours.ranks, theirs.ranks)
    torch.testing.assert_close(ours.values, theirs.values, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(("vocab", "count", "dtype"), pairwise([7, 50, 9001], [0, 1, 5, 20], DTYPES))
def test_log_probabilities_equal_the_reference(vocab: int, count: int, dtype: torch.dtype) -> None:
    logits = (torch.randn(9, vocab, device=DEVICE) * 3).to(dtype)
    token_ids = torch.randint(vocab, (9,), device=DEVICE)
    token_ids[0] = logits[0].argmax()
    ours, theirs = (k.logprobs(logits, token_ids, count) for k in (gpu, reference))
    equal_logprobs(ours, theirs)
    if dtype == torch.float32:  # without equals
        assert torch.equal(ours.token_ids, theirs.token_ids)


@pytest.mark.parametrize("count", [1, 2, 3, 20])
def test_of_equal_log_probabilities_the_chosen_one_comes_first(count: int) -> None:
    logits = torch.full((3, 700), -5.0, device=DEVICE)
    logits[:, [3, 20, 30, 690]] = torch.tensor([4.0, 2.0, 2.0, 2.0], device=DEVICE)
    chosen = torch.tensor([20, 30, 690], device=DEVICE)
    for kernels in (gpu, reference):
        found = kernels.logprobs(logits, chosen, count)
        assert found.ranks.tolist() == [2, 2, 2]
        for token, ids, values in zip(chosen.tolist(), found.token_ids.tolist(), found.values.tolist(), strict=True):
            assert ids[:3] == [token, 3, token][: count + 1]
            assert values[1:] == sorted(values[1:], reverse=True)
            assert len(set(ids[1:])) == count


def test_log_probabilities_are_those_before_adjustments() -> None:
    tables = adjusted_tables([CUTS[i % len(CUTS)] for i in range(12)], 5000)
    logits, slots = torch.randn(12, 5000, device=DEVICE), torch.arange(12, device=DEVICE)
    token_ids, _, found = gpu.sample(logits, slots, slots, tables, ALL._replace(num_logprobs=5))
    assert found is not None and torch.equal(found.token_ids[:, 0], token_ids.int())
    equal_logprobs(found, reference.logprobs(logits, token_ids, 5))
