"""What a prompt cache below the device costs and brings: `python benchmarks/prompt_cache.py MODEL [FLAG=VALUE …]`.

Prints the tokens per second of many short requests without and with tiers, and the seconds to the first token of a
conversation's first turn, and of its second one with the device's pages and with each tier's after a new start.
"""

from __future__ import annotations

import argparse
import gc
import random
import tempfile
import time

from ingle import LLM, SamplingParams


def start(model: str, options: dict[str, object]) -> LLM:
    llm = LLM(model, **options)
    llm.generate({"prompt_token_ids": [5] * 40}, SamplingParams(max_tokens=8, temperature=0.0), use_tqdm=False)
    return llm


def rate(llm: LLM, num_requests: int, num_prompt: int, num_answer: int) -> float:
    """Tokens, read and written, a second."""
    rng = random.Random(0)
    prompts = [
        {"prompt_token_ids": [rng.randrange(10, 30_000) for _ in range(num_prompt)]} for _ in range(num_requests)
    ]
    params = SamplingParams(max_tokens=num_answer, temperature=0.0, ignore_eos=True)
    started = time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False)
    return num_requests * (num_prompt + num_answer) / (time.perf_counter() - started)


def first_token_s(llm: LLM, prompt: list[int]) -> float:
    started = time.perf_counter()
    llm.generate({"prompt_token_ids": prompt}, SamplingParams(max_tokens=1, temperature=0.0), use_tqdm=False)
    return time.perf_counter() - started


def keep(llm: LLM) -> None:
    if llm.engine.keeper is not None and not llm.engine.keeper.flush(600):
        raise SystemExit("pages are not kept in time")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("options", nargs="*", help="of the engine, such as max_model_len=32768")
    parser.add_argument("--tokens", type=int, default=25_000, help="of the conversation")
    parser.add_argument("--host-cache", default="8GiB")
    parser.add_argument("--requests", type=int, default=256)
    args = parser.parse_args()
    given: dict[str, object] = dict(option.split("=", 1) for option in args.options)
    given = {name: int(value) if str(value).isdecimal() else value for name, value in given.items()}
    prompt = [random.Random(1).randrange(10, 30_000) for _ in range(args.tokens)]
    with tempfile.TemporaryDirectory() as folder:
        tiers: dict[str, dict[str, object]] = {
            "none": {},
            "host": {"host_cache": args.host_cache},
            "disk": {"disk_cache": folder},
        }
        for name, tier in tiers.items():
            llm = start(args.model, {**given, **tier})
            print(f"{name}: {rate(llm, args.requests, 512, 128):.0f} tokens/s", flush=True)
            first = first_token_s(llm, prompt)
            again = first_token_s(llm, [*prompt, *prompt[:30]])
            print(f"{name}: first turn {first:.3f} s, second turn from the device {again:.3f} s", flush=True)
            keep(llm)
            if name == "host":  # as if others had taken the device's pages
                llm.engine.scheduler.pages.forget(range(llm.engine.scheduler.pages.num_pages))
                print(f"host: second turn {first_token_s(llm, [*prompt, *prompt[:31]]):.3f} s", flush=True)
            del llm
            gc.collect()
        llm = start(args.model, {**given, **tiers["disk"]})
        print(f"disk: second turn after a new start {first_token_s(llm, [*prompt, *prompt[:32]]):.3f} s")


if __name__ == "__main__":
    main()
