"""Draws by ranks that have the logits of parts of the vocabulary, against those of whole logits."""

from __future__ import annotations

import pytest
import torch

from ingle.kernels import gpu, reference
from ingle.kernels.gpu import sampling_shares
from ingle.kernels.group import LogitsShare
from ingle.kernels.sampling import Features, Samples, SamplingTables
from tests.kernels.places import Place
from tests.kernels.test_gpu_sampling import DEVICE, ON_GPU, Cut, tables_of


def parts(logits: torch.Tensor, num_ranks: int) -> list[LogitsShare]:
    """With padding behind the last."""
    vocab_size = logits.shape[1]
    width = -(-vocab_size // num_ranks)
    padded = torch.nn.functional.pad(logits, (0, width * num_ranks - vocab_size), value=1e3)
    places = enumerate(padded.split(width, 1))
    return [LogitsShare(part.contiguous(), Place(place, num_ranks), vocab_size) for place, part in places]


def drawn_by_ranks(
    shares: list[LogitsShare], slots: torch.Tensor, positions: torch.Tensor, tables: SamplingTables
) -> Samples:
    """As `sampling_shares.sample_share`, in whose place sums are made here."""
    told = slots, positions, tables
    owned = [(share, share.own()) for share in shares]
    stats = torch.stack([sampling_shares._survey(share, logits, *told) for share, logits in owned]).sum(0)
    draws = [sampling_shares._draw(share, logits, stats, *told) for share, logits in owned]
    assert all(torch.equal(finite, draws[0][1]) for _, finite in draws), "all ranks know the same"
    tokens = torch.stack([tokens for tokens, _ in draws]).sum(0)[: len(slots)]
    return Samples(tokens.long(), draws[0][1])


SLOW = () if ON_GPU else pytest.mark.slow
CUTS = [Cut(0.0), Cut(1.0), Cut(0.6), Cut(1.3), Cut(5.0)]


@pytest.mark.parametrize(
    ("vocab", "num_ranks"), [(60, 2), pytest.param(9001, 2, marks=SLOW), pytest.param(9001, 4, marks=SLOW)]
)
def test_the_tokens_of_whole_logits(vocab: int, num_ranks: int) -> None:
    torch.manual_seed(vocab)
    logits, tables = 3 * torch.randn(len(CUTS), vocab, device=DEVICE), tables_of(CUTS, vocab)
    slots = torch.arange(len(CUTS), device=DEVICE)
    for position in range(4 if ON_GPU else 2):
        positions = torch.full_like(slots, position)
        whole = gpu.sample(logits, slots, positions, tables, Features())
        ours = drawn_by_ranks(parts(logits, num_ranks), slots, positions, tables)
        assert ours.token_ids.tolist() == whole.token_ids.tolist()
        assert ours.finite.all()


def test_rows_that_are_not_finite() -> None:
    logits, tables = torch.randn(3, 300, device=DEVICE), tables_of([Cut(0.0), Cut(1.0), Cut(1.0)], 300)
    logits[0, 7], logits[1, 250], logits[2] = float("nan"), float("inf"), float("nan")
    slots = torch.arange(3, device=DEVICE)
    ours = drawn_by_ranks(parts(logits, 2), slots, slots, tables)
    assert not ours.finite.any()
    assert all(0 <= token < 300 for token in ours.token_ids.tolist())


def test_equal_logits_are_the_first_rank_s() -> None:
    logits, tables = torch.zeros(1, 300, device=DEVICE), tables_of([Cut(0.0)], 300)
    logits[0, [120, 180]] = 2.0
    slots = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    assert drawn_by_ranks(parts(logits, 2), slots, slots, tables).token_ids.tolist() == [120]


def test_what_is_not_plain_is_drawn_from_whole_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    features = Features(filtered=True)
    torch.manual_seed(0)
    logits, tables = torch.randn(2, 301, device=DEVICE), tables_of([Cut(0.0), Cut(1.0, 0.9)], 301)
    slots = torch.arange(2, device=DEVICE)
    shares = parts(logits, 2)
    gathered = torch.stack([share.logits for share in shares])
    monkeypatch.setattr(Place, "all_gather", lambda self, x: gathered)
    expected = gpu.sample(logits, slots, slots, tables, features).token_ids.tolist()
    for share in shares:
        assert torch.equal(share.whole(), logits)
        assert gpu.sample_share(share, slots, slots, tables, features).token_ids.tolist() == expected
        assert reference.sample_share(share, slots, slots, tables, features).token_ids.tolist() == expected
