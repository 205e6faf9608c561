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
"""Products in float32 as on every processor without AVX-512; `test_cpu_kernels.py` checks them against PyTorch."""
OTHERS = {"arm64": ("aarch64-linux-gnu-g++", TARGETS["armv8.2-a+dotprod"], ("qemu-aarch64",))}


def printed(build: tuple[str, Target, tuple[str, ...]], folder: Path) -> list[tuple[str, list[str]]]:
    """Names and values that the driver prints as built by a compiler for a processor, run by an emulator if need be."""
    compiler, target, emulator = build
    for tool in (compiler, *emulator):
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
    there = printed(OTHERS[name], tmp_path)
    assert there[0] == ("instructions", ["NEON"])
    for (kind, ours), (_, theirs) in zip(printed(HERE, tmp_path)[1:], there[1:], strict=True):
        # A number between two of 16 bits may become the other one.
        tolerance = 4e-3 if kind == "layers-16-bit" else 2e-5
        ours, theirs = (torch.tensor([float(value) for value in values]) for values in (ours, theirs))
        torch.testing.assert_close(theirs, ours, atol=tolerance * float(ours.abs().max()), rtol=0, msg=kind)
