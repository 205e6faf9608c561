"""How far two models are apart, one of floats and one of codes: by all their probabilities on the same text."""

from __future__ import annotations

import dataclasses
import gc
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ingle.config import EngineConfig
from ingle.engine.build import build_engine
from ingle.engine.engine import Engine
from ingle.errors import ConfigError, ModelError
from ingle.facts import size
from ingle.request import EngineRequest, SamplingParams, token_ids
from ingle.step import Masks

WINDOW = 512
"""Tokens of the text that are read as one prompt; each window begins anew."""
_ROWS = 64
"""Of logits at once."""
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Apart:
    """Over the tokens of a text, given those before them."""

    num_tokens: int
    mean_kl: float
    """Kullback-Leibler divergence from the model of floats, in nats."""
    largest_kl: float
    same_best: float
    """Share of places where both find the same token the most likely."""
    perplexity: float
    float_perplexity: float
    largest_logit_error: float

    @property
    def perplexity_ratio(self) -> float:
        return self.perplexity / self.float_perplexity


@dataclass(frozen=True)
class Side:
    """One of the two: a model, and how it is run."""

    config: EngineConfig
    path: Path


def measure(
    codes: Side, floats: Side, tokens: Sequence[int], report: Callable[[str], None] = lambda stage: None
) -> Apart:
    """Reads the text by one model, then by the other; what the first says waits in a temporary file.

    Raises `ConfigError` and `ModelError`, also for models of different vocabularies.
    """
    windows = [list(tokens[start : start + WINDOW]) for start in range(0, len(tokens), WINDOW)]
    windows = [window for window in windows if len(window) > 1]
    if not windows:
        raise ConfigError("the text has no two tokens")
    with tempfile.TemporaryFile(prefix="ingle-verify-") as file:
        stored = _stored(floats, windows, Path(tempfile.gettempdir()), file.fileno(), report)
        gc.collect()
        return _compared(codes, windows, stored, report)


def _stored(
    floats: Side, windows: Sequence[list[int]], folder: Path, descriptor: int, report: Callable[[str], None]
) -> Floats:
    """[tokens, vocab], in the file."""
    engine, info = build_engine(_small(floats.config), floats.path, report)
    shape = (sum(map(len, windows)), info.vocab_size)
    needed, free = 4 * shape[0] * shape[1], shutil.disk_usage(folder).free
    if needed > free:
        raise ConfigError(
            f"what {shape[0]} tokens may be followed by takes {size(needed)}, and {size(free)} are free in {folder}: "
            "give fewer with --text-tokens, or another folder with TMPDIR"
        )
    with open(descriptor, "r+b", closefd=False) as file:
        stored: Floats = np.memmap(file, np.float32, "w+", shape=shape)
    for start, logits in _read(engine, windows, report, "the model of floats"):
        stored[start : start + len(logits)] = logits
    return stored


def _compared(codes: Side, windows: Sequence[list[int]], stored: Floats, report: Callable[[str], None]) -> Apart:
    engine, info = build_engine(_small(codes.config), codes.path, report)
    if info.vocab_size != stored.shape[1]:
        raise ModelError(
            f"{codes.path} has {info.vocab_size} tokens, and what it is compared with {stored.shape[1]}: they are "
            "different models"
        )
    following = np.array([token for window in windows for token in [*window[1:], -1]])
    divergences, losses, float_losses, num_same, worst = [], [0.0], [0.0], 0, 0.0
    for start, logits in _read(engine, windows, report, "the model of codes"):
        right = stored[start : start + len(logits)]
        worst = max(worst, float(np.abs(logits - right).max()))
        ours, theirs = _log_softmax(logits), _log_softmax(right)
        divergences.append((np.exp(theirs) * (theirs - ours)).sum(-1))
        num_same += int((logits.argmax(-1) == right.argmax(-1)).sum())
        known = following[start : start + len(logits)]
        rows = np.flatnonzero(known >= 0)
        losses.append(float(-ours[rows, known[rows]].sum()))
        float_losses.append(float(-theirs[rows, known[rows]].sum()))
    divergence, count = np.concatenate(divergences), int((following >= 0).sum())
    return Apart(
        num_tokens=len(following),
        mean_kl=float(divergence.mean()),
        largest_kl=float(divergence.max()),
        same_best=num_same / len(following),
        perplexity=math.exp(sum(losses) / count),
        float_perplexity=math.exp(sum(float_losses) / count),
        largest_logit_error=worst,
    )


def _read(
    engine: Engine, windows: Sequence[list[int]], report: Callable[[str], None], what: str
) -> Iterator[tuple[int, Floats]]:
    """Logits of all tokens of the text, some at a time, and the place of the first."""
    asking, place = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, prompt_logprobs=0), 0
    for number, window in enumerate(windows, 1):
        report(f"{what}: window {number} of {len(windows)}")
        engine.add(EngineRequest(str(number), token_ids(window), asking))
        plan = engine.scheduler.plan()
        assert plan is not None and plan.step.num_tokens == len(window), "a window fits a step"
        plan.step.masked = True  # the draw comes behind the logits, on every rank
        running = engine.worker.forward(plan.step)
        for start in range(0, len(window), _ROWS):
            yield place + start, running.launched.logits(start, min(start + _ROWS, len(window)))
        engine.worker.sample(running, Masks())
        engine.scheduler.retire(plan, engine.worker.result(running))
        place += len(window)


def _log_softmax(logits: Floats) -> npt.NDArray[np.float64]:
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(-1, keepdims=True))
    return wide


def _small(config: EngineConfig) -> EngineConfig:
    """Room for a window, read in one step, and for nothing to be found again."""
    pages = 1 + 2 * (-(-(WINDOW + 1) // config.cache.block_size))
    cache = dataclasses.replace(config.cache, num_gpu_blocks_override=8 * pages, enable_prefix_caching=False)
    return dataclasses.replace(
        config, cache=cache, max_num_batched_tokens=WINDOW, max_num_seqs=1, max_model_len=WINDOW + 1, overlap=False
    )
