"""What the server costs: tokens/s of streams over HTTP beside the same requests in the offline engine.

    python benchmarks/server_cost.py MODEL --streams 64 [--output FILE] [-- flags of ingle serve]

Engine and server take turns, a run each. MODEL may be a folder with config.json alone (benchmarks/shapes/…): it gets
dummy weights and a made-up byte-level vocabulary. The clients are processes of their own, and share the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ingle.bench.cli import Throughput
from ingle.bench.throughput import run_once, warm_up
from ingle.bench.workloads import Workload
from ingle.cli.flags import parse
from ingle.config import EngineConfig
from ingle.engine.build import build_engine
from ingle.hub.resolve import ensure_model
from ingle.request import Sampling

_START_S, _LOAD_S = 300, 600
_SMALLEST_VOCABULARY = 40_000
_READY = re.compile(r"base URL: http://127\.0\.0\.1:(\d+)/v1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=128, help="tokens in of each")
    parser.add_argument("--out", type=int, default=128, help="tokens out of each")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--clients", type=int, default=4, help="processes")
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--output", type=Path)
    own, flags = _split(sys.argv[1:])
    options = parser.parse_args(own)
    with tempfile.TemporaryDirectory() as made, _model(options.model, Path(made)) as (folder, more):
        report = compare(folder, options, [*more, *flags])
    print(json.dumps(report, indent=1))
    if options.output is not None:
        options.output.write_text(json.dumps({"command": " ".join(sys.argv), **report}, indent=1) + "\n")


def _split(words: list[str]) -> tuple[list[str], list[str]]:
    at = words.index("--") if "--" in words else len(words)
    return words[:at], words[at + 1 :]


@contextmanager
def _model(name: str, made: Path) -> Iterator[tuple[str, list[str]]]:
    """The model, or a folder that has what a shape lacks, and the flags that it needs."""
    folder = Path(name)
    if not (folder / "config.json").is_file() or (folder / "tokenizer.json").is_file():
        yield name, []
        return
    config = json.loads((folder / "config.json").read_text())
    (made / "config.json").write_text(json.dumps(config))
    (made / "tokenizer.json").write_text(json.dumps(_vocabulary(config["vocab_size"])))
    yield str(made), ["--load-format", "dummy"]


def _vocabulary(size: int) -> dict[str, object]:
    """Byte-level BPE: 256 bytes, and words that no merge makes, as long as those of real vocabularies."""
    from tokenizers.pre_tokenizers import ByteLevel

    vocab = {character: index for index, character in enumerate(sorted(ByteLevel.alphabet()))}
    vocab |= {f"Ġw{index:x}": index for index in range(len(vocab), size)}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "vocab": vocab, "merges": [], "byte_fallback": False}
    return {"version": "1.0", "model": model, "pre_tokenizer": level, "decoder": level}


def compare(model: str, options: argparse.Namespace, flags: list[str]) -> dict[str, object]:
    workload = Workload("streams", ((options.prompt, options.out),) * options.streams)
    sampling = Sampling(temperature=options.temperature)
    limits = ["--max-num-seqs", str(options.streams), "--no-enable-prefix-caching"]
    rates: dict[str, list[float]] = {"offline": [], "server": []}
    for _ in range(options.runs):  # each run in a new process, so that neither holds the other's memory
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            rates["offline"].append(pool.apply(_offline, (model, [*limits, *flags], workload, sampling)))
        rates["server"].append(_served(model, [*limits, *flags], workload, options))
        print({name: [round(rate) for rate in found] for name, found in rates.items()}, file=sys.stderr, flush=True)
    medians = {name: statistics.median(found) for name, found in rates.items()}
    return {
        "model": options.model,
        "streams": options.streams,
        "prompt_tokens": options.prompt,
        "output_tokens": options.out,
        "tokens_per_s": rates,
        "median_tokens_per_s": medians,
        "server_share": medians["server"] / medians["offline"],
        "server_cost_us_per_token": 1e6 * (1 / medians["server"] - 1 / medians["offline"]),
    }


def _offline(model: str, flags: list[str], workload: Workload, sampling: Sampling) -> float:
    config: EngineConfig = parse(Throughput, [model, *flags], command="bench throughput").engine
    engine, info = build_engine(config, ensure_model(config.model).path, lambda stage: None)
    warm_up(engine, info.vocab_size, [workload], sampling)
    run_once(engine, workload, info.vocab_size, sampling, seed=99)
    return workload.num_output_tokens / run_once(engine, workload, info.vocab_size, sampling, seed=1).seconds


def _served(model: str, flags: list[str], workload: Workload, options: argparse.Namespace) -> float:
    command = [sys.executable, "-m", "ingle", "serve", model, "--port", "0", "--served-model-name", "m",
               "--disable-access-log", *flags]  # fmt: skip
    with tempfile.NamedTemporaryFile("w+") as log:
        process = subprocess.Popen(command, stderr=log, stdout=subprocess.DEVNULL)
        try:
            port = _wait(process, Path(log.name))
            _load(port, workload, options, seed=99)
            return workload.num_output_tokens / _load(port, workload, options, seed=1)
        finally:
            process.terminate()
            process.wait(30)


def _wait(process: subprocess.Popen[bytes], log: Path) -> int:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline and process.poll() is None:
        if found := _READY.search(log.read_text()):
            return int(found[1])
        time.sleep(0.1)
    raise RuntimeError(f"the server did not start: {log.read_text()[-3000:]}")


def _load(port: int, workload: Workload, options: argparse.Namespace, seed: int) -> float:
    """Seconds from the first request of all clients to the last token."""
    prompts = workload.prompts(_SMALLEST_VOCABULARY, seed)
    shares = [prompts[at :: options.clients] for at in range(options.clients)]
    with multiprocessing.get_context("spawn").Pool(options.clients) as pool:
        pool.map(len, shares)  # all have started
        moment = time.time() + 0.5
        spans = pool.starmap(_client, [(port, share, options.out, options.temperature, moment) for share in shares])
    return max(end for _, end in spans) - min(start for start, _ in spans)


def _client(port: int, prompts: list[list[int]], out: int, temperature: float, moment: float) -> tuple[float, float]:
    async def all_of_them() -> None:
        streams = asyncio.gather(*(_stream(port, prompt, out, temperature) for prompt in prompts))
        counts = await asyncio.wait_for(streams, _LOAD_S)
        if any(count != out for count in counts):
            raise RuntimeError(f"streams of {sorted(set(counts))} tokens, not {out}")

    time.sleep(max(moment - time.time(), 0))
    start = time.time()
    asyncio.run(all_of_them())
    return start, time.time()


async def _stream(port: int, prompt: list[int], out: int, temperature: float) -> int:
    """Reads one completion as it is streamed; the number of its tokens, as the server counts them."""
    body = json.dumps({
        "model": "m", "prompt": prompt, "max_tokens": out, "temperature": temperature, "ignore_eos": True,
        "stream": True, "stream_options": {"include_usage": True},
    }).encode()  # fmt: skip
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    head = ("POST /v1/completions HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json",
            f"Content-Length: {len(body)}", "Connection: close", "", "")  # fmt: skip
    writer.write("\r\n".join(head).encode() + body)
    count = 0
    async for line in reader:
        if line.startswith(b"data: {") and b'"completion_tokens"' in line:
            usage = json.loads(line[6:]).get("usage") or {}
            count = usage.get("completion_tokens", count)
        if line.startswith(b"data: [DONE]"):
            break
    writer.close()
    return count


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
