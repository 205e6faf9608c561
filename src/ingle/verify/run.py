"""The whole of a verification: our engine first, then the reference, never two copies of a model at a time."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ingle.channel import EngineInfo
from ingle.config import EngineConfig
from ingle.engine.build import build_engine
from ingle.engine.memory import memory_of
from ingle.errors import ConfigError
from ingle.verify.prompts import random_prompts
from ingle.verify.reference import Reference, reference_for
from ingle.verify.scores import Answer, Scores, answer_all, perplexity
from ingle.verify.verdict import Comparison, Distance, Tolerance, compare, distance, tolerance_for

_CHUNK = 64
"""Tokens in a step unless the user says: few, so that longer prompts are read in several chunks."""
_LONGEST_PROMPT = 256
_REFERENCE_SLACK = 1.2
"""Memory a reference takes beside its weights, as a factor on them."""


@dataclass(frozen=True)
class Verification:
    info: EngineInfo
    reference: Reference
    prompts: list[str]
    """What each prompt is, for people."""
    comparisons: list[Comparison]
    tolerance: Tolerance
    distance: Distance
    """Of all tokens."""
    perplexities: tuple[float, float]
    """Ours, and the reference's in float32, of the texts and the answers to them."""

    @property
    def num_wrong(self) -> int:
        return sum(comparison.num_wrong for comparison in self.comparisons)

    @property
    def passed(self) -> bool:
        within = self.distance.mean <= self.tolerance.mean and self.distance.max <= self.tolerance.max
        return within and self.num_wrong == 0


def verify(
    config: EngineConfig,
    path: Path,
    texts: Sequence[tuple[str, list[int]]],
    *,
    num_random: int,
    num_tokens: int,
    seed: int = 0,
    report: Callable[[str], None] = lambda stage: None,
) -> Verification:
    """Asks the engine for greedy answers of `num_tokens` to `texts` (what they are, and their tokens) and to
    `num_random` prompts of random ids, and lets a reference judge every token.

    Raises `ModelError` and `ConfigError`.
    """
    num_prompts = len(texts) + num_random
    engine, info = build_engine(_small(config, num_prompts, num_tokens), path, report)
    longest = min(_LONGEST_PROMPT, info.max_model_len - num_tokens - 1)
    if longest < 1:
        raise ConfigError(f"--num-tokens {num_tokens} leaves no room for a prompt in {info.max_model_len} tokens")
    made_up = [(f"{len(ids)} random ids", ids) for ids in random_prompts(num_random, info.vocab_size, seed)]
    prompts = [(name, ids[:longest]) for name, ids in [*texts, *made_up]]
    report(f"answering {num_prompts} prompts")
    answers = answer_all(engine, [ids for _, ids in prompts], num_tokens)
    device = torch.device("cuda", 0) if engine.facts.on_gpu else torch.device("cpu")
    del engine
    _let_go(device)
    reference = reference_for(config, path, _room_for_reference(info, device))
    tolerance, right = _judge(reference, info.product_dtype, answers, report)
    return Verification(
        info=info,
        reference=reference,
        prompts=[name for name, _ in prompts],
        comparisons=[compare(answer, scores, tolerance) for answer, scores in zip(answers, right, strict=True)],
        tolerance=tolerance,
        distance=distance(answers, right),
        perplexities=(
            perplexity([answer.forced for answer in answers[: len(texts)]]),
            perplexity(right[: len(texts)]),
        ),
    )


def _judge(
    reference: Reference, dtype: str, answers: Sequence[Answer], report: Callable[[str], None]
) -> tuple[Tolerance, list[Scores]]:
    """The tolerance, and the reference's scores in float32."""
    sequences = [answer.sequence for answer in answers]
    right = reference.score(torch.float32, sequences, report)
    gc.collect()
    same_dtype = reference.score(getattr(torch, dtype), sequences, report) if dtype != "float32" else None
    return tolerance_for(dtype, right, same_dtype), right


def _small(config: EngineConfig, num_prompts: int, num_tokens: int) -> EngineConfig:
    """Room for just these prompts, in steps that are small."""
    pages_each = -(-(_LONGEST_PROMPT + num_tokens + 1) // config.cache.block_size)
    return dataclasses.replace(
        config,
        cache=dataclasses.replace(config.cache, num_gpu_blocks_override=1 + num_prompts * pages_each),
        max_num_batched_tokens=config.max_num_batched_tokens or max(_CHUNK, num_prompts),
        max_num_seqs=config.max_num_seqs or num_prompts,
    )


def _let_go(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _room_for_reference(info: EngineInfo, device: torch.device) -> torch.device:
    """Where the model fits in float32: on the engine's device, else on the CPU. Raises `ConfigError` if on neither."""
    needed = int(info.num_parameters * 4 * _REFERENCE_SLACK)
    for place in dict.fromkeys((device, torch.device("cpu"))):
        if (free := memory_of(place).free) is None or free >= needed:
            return place
    raise ConfigError(
        f"the reference computes in float32 and needs {needed / 2**30:.1f} GiB for {info.num_parameters / 1e9:.2f} B "
        "parameters, which are not free here: verify the model on a larger machine"
    )
