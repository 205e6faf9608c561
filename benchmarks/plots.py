"""The two pictures of docs/performance.md, from the JSON under benchmarks/results/: python benchmarks/plots.py

Needs matplotlib (`pip install -e '.[bench]'`), as nothing else here does. The same files give the same bytes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

HERE = Path(__file__).parent
RESULTS = HERE / "results"
SHAPES = {"qwen3-0.6b": "Qwen3-0.6B", "qwen2-7b": "Qwen2-7B"}
TARGETS = {"native": ("AVX-512", "#2166ac"), "x86-64-v3": ("AVX2", "#92c5de")}
MEASURES = {
    "prefill_512": "prefill, 512 tokens",
    "decode_at_512": "decode behind 512 tokens",
    "server_c1": "server, 1 stream",
    "server_c4": "server, 4 streams",
    "server_c16": "server, 16 streams",
    "gemma_prefill_1000": "Gemma 3: prefill, 1,000 tokens",
    "gemma_decode_at_1000": "Gemma 3: decode behind them",
}
OURS, PEER = "#2166ac", "#b35806"


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def newest(pattern: str) -> list[Path]:
    """Files of that pattern, the newest first: their names begin with their date."""
    return sorted((path for path in RESULTS.glob(pattern) if not path.stem.endswith("-earlier")), reverse=True)


def throughput(shape: str, device: str, workloads: set[str]) -> dict[str, float]:
    """Output tokens/s by workload, of the newest file of that device that has all of them."""
    for path in newest(f"*-gpu-throughput-{shape}.json"):
        found = read(path)
        rates = {one["workload"]: one["output_tokens_per_s"] for one in found["results"]}
        if found["device"] == device and workloads <= rates.keys():
            return rates
    raise SystemExit(f"no throughput of {shape} on {device} with all of {sorted(workloads)}")


def gpu() -> Figure:
    """Output tokens/s at rising concurrency beside the newest peer's, on that peer's device."""
    peer = read(newest("*-gpu-peer-*.json")[0])
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    axes = figure.subplots(1, len(SHAPES))
    for panel, (shape, title) in zip(axes, SHAPES.items(), strict=True):
        theirs = {name: rate for name, rate in peer["results"][shape].items() if name[0] == "c" and name[1:].isdigit()}
        ours = throughput(shape, peer["device"], set(theirs))
        counts = [int(name[1:]) for name in theirs]
        _line(panel, counts, [ours[name] for name in theirs], "ingle", OURS, above=True)
        _line(panel, counts, list(theirs.values()), peer["benchmark"].split(": ")[1].split(",")[0], PEER, above=False)
        panel.set_title(title)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(counts, [str(count) for count in counts])
        panel.tick_params(axis="x", which="minor", bottom=False)
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        panel.set_ylim(0.6 * min(theirs.values()), 2 * max(ours[name] for name in theirs))
        panel.set_xlim(0.7 * counts[0], 1.6 * counts[-1])
        panel.set_xlabel("requests at once (128 tokens in, 256 out)")
        panel.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("output tokens/s")
    axes[0].legend(loc="upper left")
    figure.suptitle(f"One {peer['device']}, bfloat16")
    return figure


def _line(panel: Axes, counts: list[int], rates: list[float], label: str, color: str, *, above: bool) -> None:
    panel.plot(counts, rates, marker="o", markersize=4, color=color, label=label)
    for count, rate in ((counts[0], rates[0]), (counts[-1], rates[-1])):
        offset, anchor = ((0, 8), "bottom") if above else ((0, -8), "top")
        panel.annotate(f"{rate:,.0f}", (count, rate), offset, textcoords="offset points", color=color, fontsize=9,
                       ha="center", va=anchor)  # fmt: skip


def cpu() -> Figure:
    """How many times llama.cpp's rate ingle's is, both built for the same instructions."""
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    panel = figure.subplots()
    height = 0.8 / len(TARGETS)
    for index, (target, (label, color)) in enumerate(TARGETS.items()):
        medians = read(newest(f"*-cpu-peer-{target}.json")[0])["medians"]
        ratios = [medians["ingle"][key] / medians["llama.cpp"][key] for key in MEASURES]
        places = [row + (index - (len(TARGETS) - 1) / 2) * height for row in range(len(MEASURES))]
        panel.barh(places, ratios, 0.92 * height, color=color, label=f"ingle, both for {label}")
        for place, ratio, key in zip(places, ratios, MEASURES, strict=True):
            rates = f"{medians['ingle'][key]:,.0f} : {medians['llama.cpp'][key]:,.0f} tokens/s"
            panel.annotate(f"{ratio:.1f}×  ({rates})", (ratio, place), (4, 0), textcoords="offset points",
                           va="center", fontsize=8)  # fmt: skip
    panel.axvline(1, color=PEER, linewidth=2, label="llama.cpp")
    panel.set_yticks(range(len(MEASURES)), list(MEASURES.values()))
    panel.invert_yaxis()
    panel.set_xlim(0, panel.get_xlim()[1] * 1.25)
    panel.set_xlabel("times llama.cpp's rate on the same file")
    panel.grid(axis="x", alpha=0.3)
    panel.set_axisbelow(True)
    panel.legend(loc="lower right")
    panel.set_title("Two cores of an AMD EPYC (Zen 5): SmolLM2-135M Q4_1, Gemma 3 270M Q4_K_M")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=HERE.parent / "docs")
    parser.add_argument("--format", default="svg", choices=("svg", "png"))
    options = parser.parse_args()
    mpl.rcParams["svg.hashsalt"] = "ingle"
    for name, draw in (("gpu", gpu), ("cpu", cpu)):
        metadata = {"Date": None} if options.format == "svg" else None
        draw().savefig(options.folder / f"performance-{name}.{options.format}", metadata=metadata, dpi=110)


if __name__ == "__main__":
    main()
