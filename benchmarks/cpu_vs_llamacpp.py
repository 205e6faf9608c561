"""ingle beside llama.cpp on one machine's CPU, the same GGUF file: python benchmarks/cpu_vs_llamacpp.py

Installs the peer from PyPI into a virtual environment (llama-cpp-python is built there, natively, once: minutes), runs
both engines in turn, prints the table of ratios and writes JSON to benchmarks/results/. The machine should be idle.
"""

from __future__ import annotations

import argparse
import asyncio
import compileall
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

import ingle
from ingle import __version__
from ingle.hub.resolve import ensure_model
from ingle.kernels.cpu import threads as cpu_threads
from ingle.text.load import load_text_side

HERE = Path(__file__).parent
PACKAGES = ("llama-cpp-python==0.3.36", "xllamacpp==2026.10.11549")
MODEL = "smollm2:135m"
ENGINES = ("llama.cpp", "ingle")
PORT, MAX_SEQS, MAX_LEN = 18473, 16, 256
PROMPT, OUT = 128, 64
WINDOWS, WINDOW = 4, 500
KV_BYTES = 2 * 30 * 192 * 2 * MAX_SEQS * MAX_LEN
VOCABULARY = 48_000  # above it are tokens with a meaning of their own

# Measure, unit, whether more is better, and the ratio to reach.
GOALS = {
    "prefill_512": ("tokens/s", True, 4.0),
    "decode_at_512": ("tokens/s", True, 1.6),
    "server_c1": ("tokens/s", True, 1.5),
    "server_c4": ("tokens/s", True, 3.0),
    "server_c16": ("tokens/s", True, 5.0),
    "ready_s": ("s", False, 1.0),
    "resident_mib": ("MiB, KV aside", False, 1.5),
    "top1_agreement": ("share", True, 1.0),
    "mean_kl": ("nats", False, 1.0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer-venv", type=Path, default=Path.home() / ".cache" / "ingle" / "llamacpp-venv")
    parser.add_argument("--threads", type=int, default=cpu_threads.default_count())
    parser.add_argument("--num-runs", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=("offline", "server", "accuracy"))
    parser.add_argument("--output", type=Path, default=HERE / "results" / f"{time.strftime('%Y-%m-%d')}-cpu-peer.json")
    options = parser.parse_args()
    only = options.only or ["offline", "server", "accuracy"]
    pythons = dict(zip(ENGINES, (install_peer(options.peer_venv), sys.executable), strict=True))
    path = str(ensure_model(MODEL).path)
    compileall.compile_dir(Path(ingle.__file__).parent, quiet=1)  # as pip does to a package that it installs
    runs: dict[str, dict[str, list[float]]] = {name: {} for name in ENGINES}
    for part, measure in (("offline", offline), ("server", server), ("accuracy", accuracy)):
        if part in only:
            measure(pythons, path, options.threads, options.num_runs, runs)
    results = {name: {key: statistics.median(values) for key, values in runs[name].items()} for name in ENGINES}
    print(table(results))
    report = {
        "benchmark": "cpu_vs_llamacpp",
        "command": "python benchmarks/cpu_vs_llamacpp.py",
        "num_runs": options.num_runs,
        "date": time.strftime("%Y-%m-%d"),
        "model": Path(path).name,
        "processor": processor(),
        "num_threads": options.threads,
        "ingle": __version__,
        "torch": torch.__version__,
        "peer": PACKAGES,
        "medians": results,
        "runs": runs,
    }
    options.output.write_text(json.dumps(report, indent=1) + "\n")


def install_peer(venv: Path) -> str:
    """The peer's Python."""
    python = venv / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    native = {**os.environ, "CMAKE_ARGS": "-DGGML_NATIVE=ON"}
    install = [str(python), "-m", "pip", "install", "-q", "--no-binary", "llama-cpp-python", *PACKAGES]
    subprocess.run(install, check=True, env=native)
    return str(python)


def command(engine: str, python: str, name: str, **arguments: object) -> list[str]:
    script = HERE / "cpu_engines" / ("llamacpp.py" if engine == "llama.cpp" else "ingle_engine.py")
    return [python, str(script), name, json.dumps(arguments)]


def call(engine: str, python: str, name: str, **arguments: object) -> list[dict[str, float]]:
    done = subprocess.run(command(engine, python, name, **arguments), stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def add(runs: dict[str, list[float]], key: str, value: float) -> None:
    runs.setdefault(key, []).append(value)


def random_prompts(seed: int, count: int, length: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(VOCABULARY) for _ in range(length)] for _ in range(count)]


# ---- in one process


def offline(pythons: dict[str, str], path: str, threads: int, num_runs: int, runs: dict) -> None:
    for engine, python in pythons.items():
        prompts = random_prompts(1, num_runs + 1, 512)
        for one in call(engine, python, "offline", path=path, threads=threads, prompts=prompts, num_out=OUT):
            add(runs[engine], "prefill_512", 512 / one["first_s"])
            add(runs[engine], "decode_at_512", 1 / one["next_s"])


# ---- servers


def server(pythons: dict[str, str], path: str, threads: int, num_runs: int, runs: dict) -> None:
    for index in range(num_runs):  # in turn, so that whatever the machine does meets both
        for engine, python in pythons.items():
            with running(engine, python, path, threads) as (process, ready_s):
                add(runs[engine], "ready_s", ready_s)
                asyncio.run(load(2, seed=99))  # warm-up
                for concurrency in (1, 4, 16):
                    seconds = asyncio.run(load(concurrency, seed=100 * index + concurrency))
                    add(runs[engine], f"server_c{concurrency}", concurrency * OUT / seconds)
                resident = sum(map(proportional_bytes, family(process.pid)))
                add(runs[engine], "resident_mib", (resident - KV_BYTES) / 2**20)
                print(f"{engine}, server run {index + 1}: { ({k: round(v[-1], 2) for k, v in runs[engine].items()}) }")


def serve_command(path: str, threads: int) -> list[str]:
    """ingle's own command; its KV cache is as large as the peer's."""
    return [
        sys.executable, "-m", "ingle", "serve", path, "--device", "cpu", "--threads", str(threads), "--port", str(PORT),
        "--max-num-seqs", str(MAX_SEQS), "--max-model-len", str(MAX_LEN), "--kv-cache-memory", str(KV_BYTES),
        "--served-model-name", MODEL, "--disable-access-log",
    ]  # fmt: skip


@contextmanager
def running(engine: str, python: str, path: str, threads: int) -> Iterator[tuple[subprocess.Popen, float]]:
    """A server, and the seconds until its /health said that it takes requests."""
    arguments = {"path": path, "threads": threads, "port": PORT, "max_seqs": MAX_SEQS, "max_len": MAX_LEN}
    starts = serve_command(path, threads) if engine == "ingle" else command(engine, python, "serve", **arguments)
    with tempfile.TemporaryFile() as log:
        started = time.perf_counter()
        process = subprocess.Popen(starts, stdout=log, stderr=log, start_new_session=True)
        try:
            while not healthy():
                if process.poll() is not None or time.perf_counter() - started > 60:
                    log.seek(0)
                    raise RuntimeError(f"{engine} did not start: {log.read().decode(errors='replace')[-2000:]}")
                time.sleep(0.01)
            yield process, time.perf_counter() - started
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def healthy() -> bool:
    """Asked without an event loop: making one each time would take the processor from those that start."""
    try:
        with socket.create_connection(("127.0.0.1", PORT)) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
            return b" 200 " in connection.recv(64)
    except OSError:
        return False


async def load(concurrency: int, seed: int) -> float:
    """Seconds from the first of so many simultaneous streams to the end of the last."""
    started = time.perf_counter()
    counts = await asyncio.gather(*(stream(prompt) for prompt in random_prompts(seed, concurrency, PROMPT)))
    seconds = time.perf_counter() - started
    if any(count != OUT for count in counts):
        raise RuntimeError(f"streams of {counts} tokens, not {OUT}")
    return seconds


async def stream(prompt: list[int]) -> int:
    """Reads one completion as it is streamed; the number of its tokens, as the server counts them."""
    body = json.dumps({
        "model": MODEL, "prompt": prompt, "max_tokens": OUT, "temperature": 0, "ignore_eos": True, "stream": True,
        "stream_options": {"include_usage": True},
    }).encode()  # fmt: skip
    reader, writer = await asyncio.open_connection("127.0.0.1", PORT, limit=1 << 20)
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


def family(pid: int) -> list[int]:
    """A process and its descendants."""
    threads = Path(f"/proc/{pid}/task").glob("*/children")
    children = [child for thread in threads for child in thread.read_text().split()]
    return [pid, *(each for child in children for each in family(int(child)))]


def proportional_bytes(pid: int) -> int:
    """Resident memory; pages shared by several processes are shared out among them."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0


# ---- accuracy


def accuracy(pythons: dict[str, str], path: str, threads: int, num_runs: int, runs: dict) -> None:
    """Teacher-forced over this project's own prose, both engines against float32."""
    text = "\n".join((HERE.parent / name).read_text() for name in ("README.md", "docs/architecture.md"))
    tokens = load_text_side(Path(path), None).tokenizer.encode(text)[: WINDOWS * WINDOW]
    windows = [list(tokens[start : start + WINDOW]) for start in range(0, len(tokens), WINDOW)]
    with tempfile.TemporaryDirectory() as folder:
        files = {name: f"{folder}/{name}.npy" for name in ("exact", *ENGINES)}
        common = {"path": path, "threads": threads, "windows": windows}
        call("ingle", pythons["ingle"], "logits", **common, output=files["exact"], exact=True)
        for engine, python in pythons.items():
            call(engine, python, "logits", **common, output=files[engine])
            agreement, divergence = compare(
                np.load(files["exact"], mmap_mode="r"), np.load(files[engine], mmap_mode="r")
            )
            add(runs[engine], "top1_agreement", agreement)
            add(runs[engine], "mean_kl", divergence)


def compare(exact: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """Share of equal most likely tokens, and the mean Kullback-Leibler divergence from `exact`, in nats."""
    equal, divergence = [], []
    for ours, theirs in zip(exact, other, strict=True):
        p, q = (torch.tensor(part).double().log_softmax(-1) for part in (ours, theirs))
        equal.append((p.argmax(-1) == q.argmax(-1)).double().mean().item())
        divergence.append((p.exp() * (p - q)).sum(-1).mean().item())
    return statistics.fmean(equal), statistics.fmean(divergence)


# ---- report


def table(results: dict[str, dict[str, float]]) -> str:
    lines = [f"{'':<16}{'llama.cpp':>12}{'ingle':>12}{'ratio':>8}{'goal':>9}"]
    for key, (unit, more_is_better, goal) in GOALS.items():
        if key not in results["ingle"]:
            continue
        theirs, ours = (results[name][key] for name in ENGINES)
        reached = ours >= goal * theirs if more_is_better else ours <= goal * theirs
        sign = ">=" if more_is_better else "<="
        numbers = f"{theirs:>12.4g}{ours:>12.4g}{ours / theirs:>8.3g}{sign + format(goal, 'g'):>9}"
        lines.append(f"{key:<16}{numbers}  {'yes' if reached else 'NO':<4}{unit}")
    return "\n".join(lines)


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return "unknown"


if __name__ == "__main__":
    main()
