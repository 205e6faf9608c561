"""Products of one row with coded matrices on a CPU, out of its caches: bytes a second by kind of codes.

    python benchmarks/cpu_codes.py [--output FILE]

One thread, in the time for which it had the processor, kinds in turn: ratios hold on a machine that others use.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from cpu_engines import report

from ingle.kernels.cpu import library
from ingle.weights.code_types import CODE_TYPES, CODED
from ingle.weights.packed_matrix import PackedPart

SIZE, COPIES = 2048, 40
_GROUPS = replace(CODED["int4"], group_size=128)
KINDS = {
    "GPTQ int4, groups of 128": _GROUPS,
    "the same with zeros": replace(_GROUPS, has_minima=True, minima_in_scales=True),
    **{name: CODE_TYPES[name] for name in ("Q4_K", "Q5_K", "Q6_K", "Q4_0", "Q4_1", "Q5_0", "Q8_0")},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="native", help="the instructions, such as x86-64-v3")
    parser.add_argument("--num-runs", type=int, default=9)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    os.environ["INGLE_CPU_TARGET"] = options.target
    failure = library.start(1)
    if failure is not None:
        raise SystemExit(failure)
    parts = {name: [PackedPart.empty(kind, SIZE, SIZE) for _ in range(COPIES)] for name, kind in KINDS.items()}
    times_s: dict[str, list[float]] = {name: [] for name in KINDS}
    x = np.random.default_rng(0).standard_normal((1, SIZE)).astype(np.float32)
    out = np.empty((1, SIZE), np.float32)
    for _ in range(options.num_runs):
        for name, copies in parts.items():
            started = time.process_time()
            for part in copies:
                part.multiply_into(x.ctypes.data, 1, out.ctypes.data, SIZE)
            times_s[name].append(time.process_time() - started)
    found = {}
    for name, copies in parts.items():
        num_bytes, num_weights = sum(part.data.nbytes for part in copies), COPIES * SIZE**2
        rates = sorted(num_bytes / seconds for seconds in times_s[name])
        found[name] = {
            "bits": 8 * num_bytes / num_weights,
            "bytes_per_s": statistics.median(rates),
            "least": rates[0],
            "most": rates[-1],
        }
        print(f"{name:<26} {found[name]['bits']:6.3f} bits  {statistics.median(rates) / 1e9:6.1f} GB/s")
    if options.output is not None:
        about = {
            "benchmark": "cpu_codes",
            "date": time.strftime("%Y-%m-%d"),
            "processor": report.processor(),
            "kernels": library.instructions(),
            "num_runs": options.num_runs,
        }
        options.output.write_text(json.dumps({**about, "kinds": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
