"""`ingle bench serve` beside NVIDIA's aiperf: both at once on one server, the same requests, the figures of each.

    python -m venv /tmp/aiperf && /tmp/aiperf/bin/pip install aiperf
    python -m benchmarks.load_generators smollm2:135m --aiperf /tmp/aiperf/bin/aiperf [--output FILE] [-- of serve]

They run at the same time, each with as many streams as the level says, so that both see the same server in the same
seconds, whatever else the machine does; what is compared are the requests of those seconds, each as its client measured
it. Two closed loops may fall into step with one another, though, and a client that sends several requests at one moment
has later first tokens and sooner next ones. `--in-turn ROUNDS` measures each alone instead, and holds it against what
the server says of the same requests; the server has a processor of its own then, for aiperf is several processes.
Without a model a server in this process is measured that gives tokens at known moments: there the figures show the
arithmetic alone. Exits with 1 where a figure is apart by more than the tolerance.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ingle.bench.serving import results
from ingle.bench.serving.words import WORDS
from ingle.version import __version__
from tests.bench.serving.fake_server import Script, fake_server

_READY = re.compile(r"base URL: (http://\S+)/v1")
_START_S, _RUN_S = 300, 1200
_NAME = "measured"
_DELAY_S, _GAP_S = 0.4, 0.05
_TOLD = {"ttft_mean_ms": "time_to_first_token_seconds", "latency_mean_ms": "e2e_request_latency_seconds"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--aiperf", type=Path, required=True, help="its command")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4], help="streams of each of the two")
    parser.add_argument("--requests", type=int, default=40, help="of each, for each stream")
    parser.add_argument("--prompt", type=int, default=64, help="words of a prompt, in the mean")
    parser.add_argument("--out", type=int, default=32, help="tokens of each answer")
    parser.add_argument("--in-turn", type=int, metavar="ROUNDS", help="each alone, as often, in place of both at once")
    parser.add_argument("--tokens-per-event", type=int, default=1, help="of the server without a model")
    parser.add_argument("--tolerance", type=float, default=0.05)
    parser.add_argument("--output", type=Path)
    words = sys.argv[1:]
    at = words.index("--") if "--" in words else len(words)
    options = parser.parse_args(words[:at])
    flags = words[at + 1 :]
    if options.in_turn is not None:
        flags, processors = ["--threads", "1", *flags], sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, processors[1:] or processors)
    serving = (
        _paced(options) if options.model is None else _served(options.model, flags, apart=options.in_turn is not None)
    )
    with tempfile.TemporaryDirectory() as made, serving as server:
        run = _level if options.in_turn is None else _level_in_turn
        levels = [run(options, server, count, Path(made) / str(count)) for count in options.concurrency]
    judged = [_TOLD if options.in_turn is not None else level["figures"] for level in levels]
    worst = max(abs(ratio - 1) for level, names in zip(levels, judged, strict=True) for ratio in _ratios(level, names))
    report = {
        "command": "python -m benchmarks.load_generators " + " ".join(_without_folders(words)),
        "date": time.strftime("%Y-%m-%d"),
        "ingle": __version__,
        "aiperf": _version(options.aiperf),
        "python": platform.python_version(),
        "server": f"ingle serve {options.model}" if options.model else _described(options),
        "prompt_words": options.prompt,
        "output_tokens": options.out,
        "both_at_the_same_time": options.in_turn is None,
        "worst_difference": round(worst, 4),
        "levels": levels,
    }
    print(json.dumps(report, indent=1))
    if options.output is not None:
        options.output.write_text(json.dumps(report, indent=1) + "\n")
    return int(worst > options.tolerance)


def _ratios(level: dict[str, Any], names: Iterable[str]) -> Iterator[float]:
    """Of one client's figures to the other's, or of each client's to the server's where that was asked."""
    if "server_says" not in level:
        yield from (level["figures"][name]["ratio"] for name in names)
        return
    for client, told in level["server_says"].items():
        yield from (level["figures"][name][client] / told[name] for name in names)


def _without_folders(words: list[str]) -> list[str]:
    return [Path(word).name if word.startswith("/") else word for word in words]


def _version(aiperf: Path) -> str:
    line = f"import importlib.metadata as m; print(m.version({'aiperf'!r}))"
    return subprocess.run([aiperf.parent / "python", "-c", line], capture_output=True, text=True).stdout.strip()


class Server(NamedTuple):
    url: str
    is_busy: Callable[[], bool]


def _prompts(options: argparse.Namespace, count: int, seed: str, folder: Path) -> Path:
    folder.mkdir(parents=True)
    prompts, rng = folder / "prompts.jsonl", random.Random(seed)
    lengths = (rng.randint(options.prompt // 4, 2 * options.prompt - options.prompt // 4) for _ in iter(int, 1))
    texts = (" ".join(rng.choices(WORDS, k=next(lengths))) for _ in range(options.requests * count))
    prompts.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return prompts


def _level(options: argparse.Namespace, server: Server, count: int, folder: Path) -> dict[str, Any]:
    """Runs both until each has had its answers, and compares requests that each sent while both were at work."""
    prompts = _prompts(options, count, str(count), folder)
    theirs = _start_aiperf(options, server.url, count, prompts, folder)
    try:
        _until_busy(server, theirs, folder / "aiperf.log")
        level = _run_ours(options, server.url, count, prompts, folder)
        _wait_aiperf(theirs, folder)
    finally:
        theirs.kill()
    both = [_ours(level), _theirs(folder)]
    begin = max(min(one.begin for one in each) for each in both)
    end = min(max(one.end for one in each) for each in both)
    within = [[one for one in each if one.begin >= begin and one.end <= end] for each in both]
    return _compared(count, within, (end - begin, end - begin), [level], [folder])


def _level_in_turn(options: argparse.Namespace, server: Server, count: int, folder: Path) -> dict[str, Any]:
    """Each alone, in rounds that begin with the one and the other, of prompts that are the same in a round."""
    found: tuple[list[Request], list[Request]] = ([], [])
    seconds, levels, folders = [0.0, 0.0], [], []
    told = [{name: [0.0, 0.0] for name in _TOLD}, {name: [0.0, 0.0] for name in _TOLD}]
    for round_ in range(options.in_turn):
        for who in (0, 1) if round_ % 2 == 0 else (1, 0):
            before = _told(server.url)
            place = folder / f"{round_}-{who}"
            prompts = _prompts(options, count, f"{count}-{round_}", place)
            if who == 0:
                levels.append(_run_ours(options, server.url, count, prompts, place))
                requests = _ours(levels[-1])
            else:
                _wait_aiperf(_start_aiperf(options, server.url, count, prompts, place), place)
                requests = _theirs(place)
                folders.append(place)
            found[who].extend(requests)
            for name, (total, number) in _told(server.url).items():
                told[who][name][0] += total - before[name][0]
                told[who][name][1] += number - before[name][1]
            seconds[who] += max(one.end for one in requests) - min(one.begin for one in requests)
    return {
        **_compared(count, found, (seconds[0], seconds[1]), levels, folders),
        "server_says": {
            client: {name: round(total / number * 1e3, 3) for name, (total, number) in each.items() if number}
            for client, each in zip(("ingle", "aiperf"), told, strict=True)
        },
    }


def _told(url: str) -> dict[str, tuple[float, float]]:
    """Sums, in seconds, and numbers."""
    text = urllib.request.urlopen(f"{url}/metrics").read().decode()

    def total(name: str) -> float:
        return sum(float(value) for value in re.findall(rf"^vllm:{name}{{[^}}]*}} (\S+)$", text, re.MULTILINE))

    return {name: (total(f"{metric}_sum"), total(f"{metric}_count")) for name, metric in _TOLD.items()}


def _run_ours(options: argparse.Namespace, url: str, count: int, prompts: Path, folder: Path) -> results.LevelResult:
    total, file = str(options.requests * count), str(folder / "ingle.json")
    ours = ["serve", "--base-url", url, "--dataset-path", str(prompts), "--output-len", str(options.out),
            "--concurrency", str(count), "--num-prompts", total, "--num-warmups", "0", "--output", file]  # fmt: skip
    subprocess.run([sys.executable, "-m", "ingle", "bench", *ours], check=True, stdout=sys.stderr, timeout=_RUN_S)
    return results.read(Path(file)).levels[0]


def _start_aiperf(
    options: argparse.Namespace, url: str, count: int, prompts: Path, folder: Path
) -> subprocess.Popen[Any]:
    command = _aiperf(options, url, count, options.requests * count, prompts, folder)
    with (folder / "aiperf.log").open("w") as log:
        return subprocess.Popen(command, env=_offline(), stdout=log, stderr=subprocess.STDOUT)


def _wait_aiperf(process: subprocess.Popen[Any], folder: Path) -> None:
    if process.wait(_RUN_S):
        raise RuntimeError(f"aiperf failed:\n{(folder / 'aiperf.log').read_text()[-3000:]}")


def _aiperf(options: argparse.Namespace, url: str, count: int, total: int, prompts: Path, folder: Path) -> list[str]:
    flags = {
        "--model": _NAME, "--url": url, "--endpoint-type": "chat", "--tokenizer": str(_tokenizer(folder)),
        "--input-file": str(prompts), "--custom-dataset-type": "single_turn", "--concurrency": str(count),
        "--request-count": str(total), "--ui": "none", "--artifact-dir": str(folder), "--export-level": "records",
    }  # fmt: skip
    extra = ("--extra-inputs", "ignore_eos:true", "--extra-inputs", f"max_tokens:{options.out}")
    more = ("--streaming", "--use-server-token-count", "--no-server-metrics", *extra)
    return [str(options.aiperf), "profile", *(word for pair in flags.items() for word in pair), *more]


def _tokenizer(folder: Path) -> Path:
    """It loads one whether it counts by it or not. This one knows bytes alone."""
    from tokenizers import Tokenizer, models
    from tokenizers.pre_tokenizers import ByteLevel

    place = folder / "tokenizer"
    place.mkdir()
    Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(sorted(ByteLevel.alphabet()))}, merges=[])).save(
        str(place / "tokenizer.json")
    )
    (place / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return place


def _offline() -> dict[str, str]:
    return {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "PYTHONPATH": ""}


class Request(NamedTuple):
    """As a client measured it. Times are Unix seconds."""

    begin: float
    end: float
    tokens: int
    ttft_ms: float
    tpot_ms: float


def _ours(level: results.LevelResult) -> list[Request]:
    return [
        Request(level.begun_unix_s + one.sent_s, level.begun_unix_s + one.ended_s, one.output_tokens,
                one.ttft_s * 1e3, one.tpot_s * 1e3)
        for one in level.requests if one.ttft_s is not None and one.tpot_s is not None
    ]  # fmt: skip


def _theirs(folder: Path) -> list[Request]:
    found = []
    for line in next(folder.glob("**/profile_export.jsonl")).read_text().splitlines():
        record = json.loads(line)
        metrics = {name: metric["value"] for name, metric in record["metrics"].items()}
        begin = record["metadata"]["request_start_ns"] / 1e9
        found.append(Request(begin, begin + metrics["request_latency"] / 1e3, metrics["output_sequence_length"],
                             metrics["time_to_first_token"], metrics["inter_token_latency"]))  # fmt: skip
    return found


def _compared(
    count: int, requests: Sequence[list[Request]], seconds: tuple[float, float], levels: Sequence[results.LevelResult],
    folders: Sequence[Path],
) -> dict[str, Any]:  # fmt: skip
    ours, theirs = (_figures(each, took) for each, took in zip(requests, seconds, strict=True))
    reported = [json.loads(next(folder.glob("**/profile_export_aiperf.json")).read_text()) for folder in folders]
    their_errors = sum((each.get("error_request_count") or {}).get("avg", 0) for each in reported)
    return {
        "concurrency_of_each": count,
        "seconds": {"ingle": round(seconds[0], 1), "aiperf": round(seconds[1], 1)},
        "requests": {"ingle": len(requests[0]), "aiperf": len(requests[1])},
        "errors": {"ingle": sum(level.figures.num_errors for level in levels), "aiperf": their_errors},
        "our_client": {
            "cpu_share": round(max(level.client.cpu_share for level in levels), 4),
            "lag_p99_ms": round(max(level.client.lag_p99_s for level in levels) * 1e3, 2),
        },
        "figures": {
            name: {
                "ingle": round(ours[name], 3), "aiperf": round(theirs[name], 3),
                "ratio": round(ours[name] / theirs[name], 4),
            }
            for name in ours
        },
    }  # fmt: skip


def _figures(requests: list[Request], seconds: float) -> dict[str, float]:
    latencies = [(one.end - one.begin) * 1e3 for one in requests]
    return {
        "output_tokens_per_s": sum(one.tokens for one in requests) / seconds,
        "request_tokens_per_s": statistics.fmean(one.tokens / (one.end - one.begin) for one in requests),
        "ttft_mean_ms": statistics.fmean(one.ttft_ms for one in requests),
        "ttft_p50_ms": statistics.median(one.ttft_ms for one in requests),
        "tpot_mean_ms": statistics.fmean(one.tpot_ms for one in requests),
        "tpot_p50_ms": statistics.median(one.tpot_ms for one in requests),
        "latency_mean_ms": statistics.fmean(latencies),
        "latency_p50_ms": statistics.median(latencies),
    }


def _until_busy(server: Server, theirs: subprocess.Popen[Any], log: Path) -> None:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline and theirs.poll() is None:
        if server.is_busy():
            return
        time.sleep(0.05)
    raise RuntimeError(f"aiperf asked nothing:\n{log.read_text()[-3000:]}")


@contextlib.contextmanager
def _paced(options: argparse.Namespace) -> Iterator[Server]:
    each = options.tokens_per_event
    with fake_server(Script(delay_s=_DELAY_S, gap_s=_GAP_S * each, tokens_per_event=each, tokenize=False)) as fake:
        yield Server(fake.url, lambda: fake.open > 0)


def _described(options: argparse.Namespace) -> str:
    each = options.tokens_per_event
    return f"first event after {_DELAY_S} s, then {each} token{'s' * (each > 1)} every {_GAP_S * each} s"


@contextlib.contextmanager
def _served(model: str, flags: list[str], *, apart: bool) -> Iterator[Server]:
    command = [sys.executable, "-m", "ingle", "serve", model, "--port", "0", "--served-model-name", _NAME,
               "--disable-access-log", "--no-enable-prefix-caching", *flags]  # fmt: skip
    with tempfile.NamedTemporaryFile("w+") as log:
        process = subprocess.Popen(
            ["taskset", "-c", "0", *command] if apart else command, stderr=log, stdout=subprocess.DEVNULL
        )
        try:
            deadline = time.monotonic() + _START_S
            while not (found := _READY.search(Path(log.name).read_text())):
                if time.monotonic() > deadline or process.poll() is not None:
                    raise RuntimeError(f"the server did not start: {Path(log.name).read_text()[-3000:]}")
                time.sleep(0.1)
            url = found[1]
            yield Server(url, lambda: not json.load(urllib.request.urlopen(f"{url}/health"))["detail"].startswith("0 "))
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)


if __name__ == "__main__":
    sys.exit(main())
