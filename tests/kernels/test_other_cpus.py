"""The C++ kernels as built for another processor than this one: an emulator runs them, and the numbers are the same."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from ingle.kernels.cpu import compile
from ingle.kernels.cpu.targets import TARGETS, Target

pytestmark = pytest.mark.slow
DRIVER = Path(__file__).parent / "kernels_of_another_cpu.cpp"
HERE = ("g++", TARGETS["x86-64-v3"], ())
"""`test_cpu_kernels.py` checks these against PyTorch."""
ARM = ("aarch64-linux-gnu-g++", ("qemu-aarch64", "-cpu", "max"))
OTHERS = {  # by target, what the kernels say that they multiply with, and the instruction that does
    "armv8-a": ("NEON", "smull"),
    "armv8.2-a+dotprod": ("NEON with dot products", "sdot"),
    "armv8.2-a+dotprod+i8mm": ("NEON with i8mm", "smmla"),
}


def printed(build: tuple[str, Target, tuple[str, ...]], folder: Path) -> list[tuple[str, list[str]]]:
    """Names and values that the driver prints as built by a compiler for a processor, run by an emulator if need be."""
    compiler, target, emulator = build
    for tool in (compiler, *emulator[:1]):
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool}")
    program = folder / compiler
    flags = [*target.flags, *(flag for flag in compile.FLAGS if flag not in ("-shared", "-fPIC"))]
    sources = [DRIVER, *sorted(compile.SOURCES.glob("*.cpp"))]
    command = [compiler, *flags, "-static", f"-I{compile.SOURCES}", *map(str, sources), "-o", str(program)]
    subprocess.run(command, check=True)
    done = subprocess.run([*emulator, str(program)], check=True, capture_output=True, text=True)
    return [(name, values) for name, *values in map(str.split, done.stdout.splitlines())]


@pytest.mark.parametrize("name", OTHERS)
def test_the_same_numbers_as_here(name: str, tmp_path: Path) -> None:
    if not torch.cpu.get_capabilities().get("avx2", False):
        pytest.skip("needs avx2")
    instructions, multiplies = OTHERS[name]
    there = printed((ARM[0], TARGETS[name], ARM[1]), tmp_path)
    assert there[0] == ("instructions", instructions.split())
    for (kind, ours), (_, theirs) in zip(printed(HERE, tmp_path)[1:], there[1:], strict=True):
        # Products sum up the same integers; of what a layer computes before, a number between two may become the other.
        tolerance = {"product": 1e-6, "layers": 1e-4, "layers-16-bit": 4e-3}.get(kind, 2e-5)
        ours, theirs = (torch.tensor([float(value) for value in values]) for values in (ours, theirs))
        torch.testing.assert_close(theirs, ours, atol=tolerance * float(ours.abs().max()), rtol=0, msg=kind)
    listing = ["aarch64-linux-gnu-objdump", "-d", "--no-show-raw-insn", "-C", str(tmp_path / ARM[0])]
    code = subprocess.run(listing, check=True, capture_output=True, text=True).stdout.split("\n\n")
    tiles = [function for function in code if "multiply_tile<4, 3, 32, (ingle::Reading)0>" in function.splitlines()[0]]
    assert len(tiles) == 1 and tiles[0].count(f"\t{multiplies}") >= 96, "a tile's products are not made of it"
