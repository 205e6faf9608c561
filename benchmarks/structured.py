"""What a step costs more whose answers follow a JSON schema: PYTHONPATH=src python benchmarks/structured.py

    python benchmarks/structured.py benchmarks/shapes/qwen3-0.6b --load-format dummy --num-seqs 256   # on a GPU
    python benchmarks/structured.py smollm2:135m --num-seqs 1 8                                      # on a CPU

As many sequences decode freely, then bound by schemas that have no end, eight different ones, turn by turn. Prints
JSON: the median milliseconds of a decode step of each kind, and those for which the thread that steps has a processor,
which with `--threads 1` say the same on a machine that others use too; without jumps over tokens that have to follow
(log probabilities are asked for, of both, so that there are none), and tokens per second with them. A model without a
tokenizer gets a made-up vocabulary.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ingle.config import EngineConfig
from ingle.engine.build import build_engine
from ingle.engine.engine import Engine
from ingle.hub.resolve import ensure_model
from ingle.request import EngineRequest, SamplingParams, token_ids
from ingle.structured import Grammar, StructuredOutputs
from ingle.text.grammar import Vocabulary, grammar_text
from ingle.text.load import load_tokenizer

_PROMPT_TOKENS = 64
_LETTERS = "etaoinshrdlucmfwypvbgkqjxz"


@dataclass(frozen=True)
class MadeUp:
    """A vocabulary of bytes, what JSON often has, and words of random letters, half of them behind a space."""

    def for_grammars(self, vocab_size: int) -> Vocabulary:
        generator = random.Random(0)
        tokens = {b"</s>": 0, **{bytes([byte]): byte + 1 for byte in range(256)}}
        for text in ('{"', '":', '": "', '", "', '"}', '"]', "},", "\n    ", "\n  ", ": ", ", ", "[{", "}]"):
            tokens.setdefault(text.encode(), len(tokens))
        while len(tokens) < vocab_size:
            word = "".join(generator.choices(_LETTERS, range(26, 0, -1), k=generator.randint(2, 9)))
            tokens.setdefault((" " * generator.randint(0, 1) + word).encode(), len(tokens))
        longest = max(map(len, tokens))

        def encode(text: str) -> list[int]:
            data, ids = text.encode(), []
            while data:
                size = next(size for size in range(min(longest, len(data)), 0, -1) if data[:size] in tokens)
                ids.append(tokens[data[:size]])
                data = data[size:]
            return ids

        return Vocabulary(list(tokens), [0], [0], encode)


def schema(number: int) -> dict[str, Any]:
    """One that no answer comes to the end of."""
    record = {
        "type": "object",
        "properties": {
            f"name of {number}": {"type": "string", "minLength": 5, "maxLength": 200},
            "kind": {"enum": [f"kind {number} {i}" for i in range(8)]},
            "count": {"type": "integer", "minimum": 0, "maximum": 10**6},
            "code": {"type": "string", "pattern": "^[A-Z]{2,8}-[0-9]{4}$"},
            "tags": {"type": "array", "items": {"type": "string", "maxLength": 40}, "minItems": 1, "maxItems": 5},
        },
        "required": [f"name of {number}", "kind", "count", "code", "tags"],
        "additionalProperties": False,
    }
    return {"type": "array", "items": record, "minItems": 100_000}


def requests(count: int, run: int, max_tokens: int, vocab_size: int, **options: Any) -> list[EngineRequest]:
    bound = options.pop("bound")
    generator = random.Random(run)
    made = []
    for number in range(count):
        prompt = token_ids([generator.randrange(vocab_size) for _ in range(_PROMPT_TOKENS)])
        params = SamplingParams(temperature=1.0, seed=run * count + number, max_tokens=max_tokens, **options)
        text = grammar_text(StructuredOutputs(json=schema(number % 8)))
        made.append(
            EngineRequest(f"{run}-{number}", prompt, params, (0,), Grammar(text, is_json=True) if bound else None)
        )
    return made


@dataclass
class Measured:
    step_ms: list[float]
    step_cpu_ms: list[float]
    num_tokens: int
    seconds: float
    errors: set[str]


def measure(engine: Engine, wanted: Sequence[EngineRequest]) -> Measured:
    """The steps in which all sequences decode."""
    for each in wanted:
        engine.add(each)
    found = Measured([], [], 0, 0.0, set())
    while engine.has_work:
        before, started, started_cpu = engine.stats(), time.perf_counter(), time.thread_time()
        outputs = engine.step()
        took, took_cpu = time.perf_counter() - started, time.thread_time() - started_cpu
        found.errors |= {output.error for output in outputs if output.error}
        if before.num_running == len(wanted) and engine.stats().num_prompt_tokens == before.num_prompt_tokens:
            found.num_tokens += sum(len(output.token_ids) for output in outputs)
            found.seconds += took
            found.step_ms.append(1e3 * took)
            found.step_cpu_ms.append(1e3 * took_cpu)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", default="smollm2:135m")
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--num-seqs", type=int, nargs="+", default=[256])
    parser.add_argument("--max-tokens", type=int, default=200)
    parser.add_argument("--num-runs", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9)
    given = parser.parse_args()
    path = Path(given.model) if Path(given.model).exists() else Path(ensure_model(given.model).path)
    most = max(given.num_seqs)
    config = EngineConfig.of(
        str(path),
        load_format=given.load_format,
        max_num_seqs=max(most, 8),
        max_model_len=_PROMPT_TOKENS + given.max_tokens + 64,
        gpu_memory_utilization=given.gpu_memory_utilization,
        enable_prefix_caching=False,
        threads=given.threads,
    )
    reader: Any = MadeUp if given.load_format == "dummy" else lambda: load_tokenizer(path)
    engine, info = build_engine(config, path, tokenizer=reader)
    while engine.worker.device.capture_next():  # the CUDA graphs of all sizes
        pass
    for count in given.num_seqs:
        steps: dict[str, list[float]] = {"free": [], "bound": []}
        cpu_steps: dict[str, list[float]] = {"free": [], "bound": []}
        rates: dict[str, list[float]] = {"free": [], "bound": []}
        errors: set[str] = set()
        for run in range(given.num_runs + 1):  # the first warms up: kernels, graphs, grammars
            for kind in ("free", "bound"):
                for options in ({"logprobs": 0}, {}):
                    bound, extra = kind == "bound", {"ignore_eos": kind == "free", **options}
                    made = requests(count, run, given.max_tokens, info.vocab_size, bound=bound, **extra)
                    found = measure(engine, made)
                    errors |= found.errors
                    if run and options:
                        steps[kind] += found.step_ms
                        cpu_steps[kind] += found.step_cpu_ms
                    elif run:
                        rates[kind].append(found.num_tokens / found.seconds)
        medians = {kind: statistics.median(times) for kind, times in steps.items()}
        cpu = {kind: statistics.median(times) for kind, times in cpu_steps.items()}
        print(json.dumps({
            "model": given.model, "device": info.device, "num_seqs": count, "vocab_size": info.vocab_size,
            "free_step_ms": round(medians["free"], 3), "bound_step_ms": round(medians["bound"], 3),
            "cost_of_a_step": round(medians["bound"] / medians["free"] - 1, 4),
            "free_step_cpu_ms": round(cpu["free"], 3), "bound_step_cpu_ms": round(cpu["bound"], 3),
            "cost_of_a_step_in_cpu_time": round(cpu["bound"] / cpu["free"] - 1, 4),
            "free_tokens_per_s": round(statistics.median(rates["free"]), 1),
            "bound_tokens_per_s": round(statistics.median(rates["bound"]), 1),
            "errors": sorted(errors),
        }), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
