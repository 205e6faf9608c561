"""`ingle verify`: proof that a model is computed right, by comparison with transformers."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ingle import facts
from ingle.cli.fields import Hidden
from ingle.cli.flags import parse
from ingle.cli.loading import loading
from ingle.config import CacheConfig, EngineConfig, ParallelConfig, TextConfig, WeightsConfig
from ingle.errors import ConfigError, VerificationError, printable

if TYPE_CHECKING:
    from ingle.verify.apart import Apart
    from ingle.verify.run import Verification

# What shapes the numbers stays. Memory is chosen here, and the reference knows the checkpoint as it is.
_HIDDEN: Hidden = {
    EngineConfig: {"seed"},
    WeightsConfig: {"load_format", "rope_scaling", "rope_factor", "rope_theta"},
    CacheConfig: {"gpu_memory_utilization", "kv_cache_memory", "num_gpu_blocks_override"},
    ParallelConfig: {"data_parallel_size"},
}
_NAME_WIDTH = 40


@dataclass(frozen=True)
class Questions:
    """What the model is asked."""

    num_prompts: int = 12
    """Prompts: half of them texts of many languages, half random token ids."""
    num_tokens: int = 48
    """Tokens of each greedy answer."""
    seed: int = 0
    """Seeds the random prompts."""
    prompts_file: Path | None = None
    """A file with a prompt in each line, in place of the built-in texts."""
    output: Path | None = None
    """Write the figures here as JSON."""
    against: str | None = None
    """The same model in floats: says how far its codes have moved it, and proves nothing else."""
    text_tokens: int = 1024
    """Tokens of a fixed text on which --against, and --quantization int4, int8 or fp8, measure a distance."""


@dataclass(frozen=True)
class Verify:
    """Compare a model as ingle runs it with transformers on the same checkpoint, token by token.

    Log probabilities of every token, read in chunks and decoded, and each greedy choice. The verdict is the exit code:
    0 when all are within the tolerance that the type's arithmetic sets, 1 when not. Needs memory for the model in
    float32.

    With --against it measures a distance instead: of a model of codes, from the same in floats. With --quantization
    it does both.
    """

    engine: EngineConfig
    text: TextConfig
    questions: Questions


def main(argv: Sequence[str]) -> None:
    flags = parse(Verify, argv, command="verify", hide=_HIDDEN)
    questions = flags.questions
    for name in ("num_prompts", "num_tokens", "text_tokens"):
        if getattr(questions, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(questions, name)} is too small: give at least 1")
    texts = _texts(questions)
    from ingle.hub.resolve import ensure_model

    path = Path(ensure_model(flags.engine.model).path)
    if questions.against is not None:
        apart = _distance(flags, path, Path(ensure_model(questions.against).path))
        print(in_words(apart, questions.against))
        _write(questions.output, {"against": questions.against, "distance": asdict(apart)})
        return
    with loading() as report:
        report("starting")
        from ingle.text.load import load_tokenizer
        from ingle.verify.run import verify

        tokenizer = load_tokenizer(path, flags.text)
        prompts = [(_shown(text), tokenizer.encode(text)) for text in texts]
        result = verify(
            flags.engine,
            path,
            [(name, ids) for name, ids in prompts if ids],
            num_random=questions.num_prompts - len(prompts),
            num_tokens=questions.num_tokens,
            seed=questions.seed,
            report=report,
        )
    print(table(result))
    figures = _figures(result)
    if _is_rounded(flags.engine, path):
        print()
        apart = _distance(flags, path, path)
        print(in_words(apart, flags.engine.model))
        figures["distance_from_floats"] = asdict(apart)
    _write(questions.output, figures)
    if not result.passed:
        raise VerificationError(f"{flags.engine.model} is not computed as the reference computes it")


def _write(output: Path | None, figures: dict[str, Any]) -> None:
    if output is not None:
        output.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _is_rounded(config: EngineConfig, path: Path) -> bool:
    from ingle.engine.startup import ModelFiles

    return ModelFiles.read(config, path).rounded_to is not None


def _distance(flags: Verify, path: Path, floats: Path) -> Apart:
    """Of the model at `path` as it is run, from the one at `floats` as it is stored."""
    with loading() as report:
        report("starting")
        from ingle.text.load import load_tokenizer
        from ingle.verify.apart import Side, measure
        from ingle.verify.prompts import PASSAGE

        file = flags.questions.prompts_file or PASSAGE
        try:
            text = file.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--prompts-file {file}: {error}") from error
        tokens = load_tokenizer(path, flags.text).encode(text)[: flags.questions.text_tokens]
        plain = replace(flags.engine, model=str(floats), weights=replace(flags.engine.weights, quantization=None))
        return measure(Side(flags.engine, path), Side(plain, floats), tokens, report)


def in_words(apart: Apart, floats: str) -> str:
    """For people."""
    return "\n".join(
        (
            f"distance from {printable(floats)} in floats, over {apart.num_tokens} tokens of a text:",
            f"  KL divergence   {apart.mean_kl:.4g} nats in the mean, {apart.largest_kl:.3g} at most",
            f"  perplexity      {apart.perplexity:.4g}, in floats {apart.float_perplexity:.4g}: "
            f"{100 * (apart.perplexity_ratio - 1):+.2f} %",
            f"  same most likely token   {100 * apart.same_best:.1f} %",
            f"  largest error of a logit {apart.largest_logit_error:.3g}",
        )
    )


def _texts(questions: Questions) -> list[str]:
    from ingle.verify.prompts import TEXTS

    if questions.prompts_file is None:
        return list(TEXTS[: (questions.num_prompts + 1) // 2])
    try:
        lines = questions.prompts_file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompts-file {questions.prompts_file}: {error}") from error
    texts = [line for line in lines if line.strip()][: questions.num_prompts]
    if not texts:
        raise ConfigError(f"--prompts-file {questions.prompts_file}: no prompt in it")
    return texts


def table(result: Verification) -> str:
    """The figures and the verdict, for people."""
    info, tolerance = result.info, result.tolerance
    lines = [
        facts.loaded(info),
        f"reference: {result.reference.description}, in float32",
        "",
        f"{'prompt':<{_NAME_WIDTH}} {'tokens':>8}  {'mean':>8}  {'max':>8}  {'equal':>7}  {'ties':>5}  {'wrong':>5}",
    ]
    for name, one in zip(result.prompts, result.comparisons, strict=True):
        lines.append(
            f"{_padded(name, _NAME_WIDTH)} {f'{one.num_prompt_tokens}+{one.num_answer_tokens}':>8}  "
            f"{one.distance.mean:8.1e}  {one.distance.max:8.1e}  "
            f"{f'{one.num_equal}/{one.num_answer_tokens}':>7}  {one.num_ties:5}  {one.num_wrong:5}"
        )
    every = result.comparisons
    num_equal, num_ties = sum(one.num_equal for one in every), sum(one.num_ties for one in every)
    worst_gap, (ours, right) = max(one.worst_gap for one in every), result.perplexities
    lines += [
        "",
        f"log probabilities are apart by {result.distance.mean:.2g} in the mean, {result.distance.max:.2g} at most "
        f"(tolerance {tolerance.mean:.2g} and {tolerance.max:.2g})",
        f"greedy tokens: {num_equal} equal, {num_ties} ties, {result.num_wrong} wrong; the reference prefers its own "
        f"by {worst_gap:.2g} at most (a tie up to {tolerance.tie:.2g})",
        f"perplexity of the texts: {ours:.5g}, the reference's {right:.5g} ({100 * (ours / right - 1):+.3f} %)",
        f"tolerance for {tolerance.why}",
        f"verdict: {'PASS' if result.passed else 'FAIL'}",
    ]
    return "\n".join(lines)


def _figures(result: Verification) -> dict[str, Any]:
    return {
        "passed": result.passed,
        "family": result.info.family,
        "dtype": result.info.dtype,
        "kv_dtype": result.info.kv_dtype,
        "product_dtype": result.info.product_dtype,
        "device": result.info.device,
        "num_parameters": result.info.num_parameters,
        "reference": result.reference.description,
        "independent": result.reference.independent,
        "tolerance": asdict(result.tolerance),
        "distance": asdict(result.distance),
        "perplexity": result.perplexities[0],
        "reference_perplexity": result.perplexities[1],
        "prompts": [
            {"prompt": name, **asdict(one)} for name, one in zip(result.prompts, result.comparisons, strict=True)
        ],
    }


def _shown(text: str) -> str:
    """A prompt on one line, cut to fit the table."""
    words = " ".join(text.split())
    while _columns(words) > _NAME_WIDTH:
        words = words[:-2] + "…"
    return words


def _padded(text: str, width: int) -> str:
    return text + " " * max(width - _columns(text), 0)


def _columns(text: str) -> int:
    """Of a terminal: wide characters take two, marks that sit on others none."""
    return sum(
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text
    )
