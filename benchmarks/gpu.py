"""The whole table on one GPU, in one command: python benchmarks/gpu.py

Dummy weights of two shapes, every GPU workload three times, and the start-up; JSON goes to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
SHAPES = ("qwen3-0.6b", "qwen2-7b")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--workload", nargs="+", default=["gpu"])
    parser.add_argument("--num-runs", default="3")
    parser.add_argument("--gpu-memory-utilization", default="0.9")
    parser.add_argument("--commands", nargs="+", default=["throughput", "startup"])
    parser.add_argument("--results", type=Path, default=HERE / "results")
    options = parser.parse_args()
    for shape in options.shapes:
        for command in options.commands:
            output = options.results / f"{time.strftime('%Y-%m-%d')}-gpu-{command}-{shape}.json"
            arguments = [
                command,
                f"benchmarks/shapes/{shape}",
                "--load-format",
                "dummy",
                "--gpu-memory-utilization",
                options.gpu_memory_utilization,
                "--output",
                os.path.relpath(output, HERE.parent),
            ]
            if command == "throughput":
                arguments += ["--num-runs", options.num_runs, "--workload", *options.workload]
            print(f"== {shape}: {command}", flush=True)
            subprocess.run([sys.executable, "-m", "ingle", "bench", *arguments], check=True, cwd=HERE.parent)


if __name__ == "__main__":
    main()
