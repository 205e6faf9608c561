"""What is measured in one process: prefill and decode, accuracy, and the share of the memory's bandwidth."""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch
from cpu_engines.session import ENGINES, OURS, Session, random_prompts

from ingle.hub.resolve import ensure_model
from ingle.text.load import load_tokenizer

MODEL, GEMMA = "smollm2:135m", "gemma3:270m"
SHAPES = ("smollm2-135m", "qwen3-moe-1b-active", "qwen3-moe-100m-active")
_ROOT = Path(__file__).parents[2]
_OUT = 64
_WINDOWS, _WINDOW = 4, 500


def offline(session: Session, index: int) -> None:
    _read_and_write(session, index, MODEL, 512, ("prefill_512", "decode_at_512"))


def gemma(session: Session, index: int) -> None:
    _read_and_write(session, index, GEMMA, 1000, ("gemma_prefill_1000", "gemma_decode_at_1000"))


def _read_and_write(session: Session, index: int, model: str, num_in: int, keys: tuple[str, str]) -> None:
    """Tokens/s of a prompt, and of the tokens after it."""
    path, prompts = ensure_model(model).path, random_prompts(index, 2, num_in)
    for engine in ENGINES:
        (one,) = session.call(engine, "offline", path, prompts=prompts, num_out=_OUT, clock=session.clock)
        session.add(engine, keys[0], num_in / one["first_s"])
        session.add(engine, keys[1], 1 / one["next_s"])


def accuracy(session: Session) -> None:
    """Teacher-forced over this project's own prose, both engines against float32."""
    path = ensure_model(MODEL).path
    text = "\n".join((_ROOT / name).read_text() for name in ("README.md", "docs/architecture.md"))
    tokens = load_tokenizer(path).encode(text)[: _WINDOWS * _WINDOW]
    windows = [list(tokens[start : start + _WINDOW]) for start in range(0, len(tokens), _WINDOW)]
    with tempfile.TemporaryDirectory() as folder:
        files = {name: f"{folder}/{name}.npy" for name in ("exact", *ENGINES)}
        session.call(OURS, "logits", path, windows=windows, output=files["exact"], exact=True)
        for engine in ENGINES:
            session.call(engine, "logits", path, windows=windows, output=files[engine])
            exact, other = (np.load(files[name], mmap_mode="r") for name in ("exact", engine))
            agreement, divergence = _compare(exact, other)
            session.add(engine, "top1_agreement", agreement)
            session.add(engine, "mean_kl", divergence)


def _compare(exact: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """Share of equal most likely tokens, and the mean Kullback-Leibler divergence from `exact`, in nats."""
    equal, divergence = [], []
    for ours, theirs in zip(exact, other, strict=True):
        p, q = (torch.tensor(part).double().log_softmax(-1) for part in (ours, theirs))
        equal.append((p.argmax(-1) == q.argmax(-1)).double().mean().item())
        divergence.append((p.exp() * (p - q)).sum(-1).mean().item())
    return statistics.fmean(equal), statistics.fmean(divergence)


def bandwidth(session: Session) -> None:
    """Of decoding a folder of bfloat16 weights, by shape, for ours alone."""
    for shape in SHAPES:
        session.shares[shape] = session.call(OURS, "bandwidth", _ROOT / "benchmarks" / "shapes" / shape, num_runs=3)
