"""`ingle quantize`: a model's folder of floats to one of codes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

from ingle.cli.flags import parse
from ingle.cli.loading import loading
from ingle.errors import ConfigError, printable
from ingle.facts import size

if TYPE_CHECKING:
    from ingle.quantize.run import Quantized


@dataclass(frozen=True)
class Quantize:
    """Write a model's folder anew with the matrices of its layers as codes, in compressed-tensors' layout.

    Embedding, output head, norms and routers stay what they are; tokenizer and templates are copied. No data is
    needed: of each group of weights the scale is taken that leaves the least error. `--quantization` does the same
    while a model is loaded, and writes nothing.
    """

    model: Positional[str] = ""
    """A model's folder, or a name as `ingle serve` takes it, of floats."""
    out: Positional[Path] = Path()
    """The new folder."""
    to: Literal["int4", "int8", "fp8"] = "int4"
    """What weights become: int4 with zeros, int8, each in groups, or fp8 with a scale for each row."""
    group_size: int | None = None
    """Weights that share a scale: 128, or fewer where 128 do not divide a matrix; 0 for those of a row."""
    symmetric: bool = False
    """int4 without zeros: a little less exact, for engines that read nothing else."""


def main(argv: Sequence[str]) -> None:
    flags = parse(Quantize, argv, command="quantize")
    if not flags.model or flags.out == Path():
        raise ConfigError("ingle quantize needs MODEL and OUT: `ingle quantize Qwen/Qwen3-0.6B --to int4 qwen3-int4`")
    from ingle.hub.resolve import ensure_model
    from ingle.quantize.run import quantize

    path = Path(ensure_model(flags.model).path)
    with loading() as report:
        done = quantize(
            path, flags.to, flags.out, group_size=flags.group_size, symmetric=flags.symmetric, report=report
        )
    for notice in done.notices:
        print(f"notice: {printable(notice)}", file=sys.stderr)
    print(printable(told(done), keep="\n"))
    print(f"how far its answers moved: ingle verify {flags.out} --against {printable(flags.model)}", file=sys.stderr)


def told(done: Quantized) -> str:
    """For people."""
    name, worst = done.worst
    return (
        f"{done.path}: {done.num_matrices} matrices as {done.scheme.name}, {size(done.num_bytes)} in place of "
        f"{size(done.num_bytes_before)}\n"
        f"weights are off by {100 * done.loss.relative:.2g} % (root of the mean square), at most by "
        f"{100 * worst.relative:.2g} % ({name})"
    )
