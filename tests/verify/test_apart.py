"""The distance of a model of codes from its floats is what its probabilities say."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from ingle.config import EngineConfig
from ingle.errors import ModelError
from ingle.verify import apart
from ingle.verify.apart import Side, measure
from tests.support import random_prompt, reference_model, save_checkpoint


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("floats") / "m", "llama", hidden_size=64, intermediate_size=96)


def side(path: Path, **options: object) -> Side:
    return Side(EngineConfig.of(str(path), device="cpu", dtype="float32", **options), path)


def logits(folder: Path, windows: list[list[int]]) -> torch.Tensor:
    model = reference_model(folder)
    with torch.inference_mode():
        return torch.cat([model(torch.tensor([window])).logits[0] for window in windows]).double()


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_figures(floats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernels: str) -> None:
    """Against another model of the same vocabulary, by transformers, in windows of which the last is shorter."""
    monkeypatch.setattr(apart, "WINDOW", 48)
    other = save_checkpoint(tmp_path / "other", "llama", hidden_size=64, intermediate_size=96, seed=1)
    tokens = random_prompt(5, 110)
    found = measure(side(other, cpu_kernels=kernels), side(floats, cpu_kernels=kernels), tokens)
    windows = [tokens[:48], tokens[48:96], tokens[96:]]
    ours, right = logits(other, windows), logits(floats, windows)
    p, q = right.log_softmax(-1), ours.log_softmax(-1)
    divergence = (p.exp() * (p - q)).sum(-1)
    assert found.num_tokens == 110
    assert found.mean_kl == pytest.approx(float(divergence.mean()), rel=1e-3)
    assert found.largest_kl == pytest.approx(float(divergence.max()), rel=1e-3)
    assert found.same_best == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert found.largest_logit_error == pytest.approx(float((ours - right).abs().max()), rel=1e-3)
    following = torch.tensor([token for window in windows for token in [*window[1:], -1]])
    known = following >= 0
    for value, scores in ((found.perplexity, q), (found.float_perplexity, p)):
        losses = -scores[known].gather(1, following[known][:, None])
        assert value == pytest.approx(math.exp(float(losses.mean())), rel=1e-3)


def test_the_same_model_is_no_distance_away(floats: Path) -> None:
    found = measure(side(floats), side(floats), random_prompt(6, 60))
    assert found.mean_kl == pytest.approx(0, abs=1e-9) and found.same_best == 1 and found.largest_logit_error == 0
    assert found.perplexity_ratio == 1


def test_codes_of_eight_bits_are_nearer_than_those_of_four(floats: Path) -> None:
    tokens = random_prompt(6, 60)
    four, eight = (measure(side(floats, quantization=to), side(floats), tokens) for to in ("int4", "int8"))
    assert 0 < 10 * eight.mean_kl < four.mean_kl


def test_another_vocabulary_is_another_model(floats: Path, tmp_path: Path) -> None:
    other = save_checkpoint(tmp_path / "other", "llama", vocab_size=300)
    with pytest.raises(ModelError, match=r"300 tokens.*different models"):
        measure(side(other), side(floats), random_prompt(6, 30))
