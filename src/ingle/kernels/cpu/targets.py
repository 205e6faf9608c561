"""The processors that the C++ kernels are compiled for: what the compiler is told, and which of them this one is.

Of the standard library alone: the package's build reads it as well as the engine.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_MACHINES = {"x86_64": "x86_64", "amd64": "x86_64", "aarch64": "aarch64", "arm64": "aarch64"}
"""Names of an architecture, by system, and the one that is used here."""


@dataclass(frozen=True)
class Target:
    name: str
    machine: str
    flags: tuple[str, ...]
    """For GCC and clang."""
    features: frozenset[str]
    """What a processor needs to execute it, as Linux lists features in /proc/cpuinfo."""


def _targets(machine: str, *rows: tuple[str, str, str]) -> dict[str, Target]:
    """Of a name, flags and features each."""
    return {name: Target(name, machine, tuple(flags.split()), frozenset(needs.split())) for name, flags, needs in rows}


_V3 = "abm avx avx2 bmi1 bmi2 cx16 f16c fma lahf_lm movbe popcnt sse4_1 sse4_2 ssse3 xsave"
_V4 = f"{_V3} avx512bw avx512cd avx512dq avx512f avx512vl"
_V82 = "fp asimd atomics crc32 asimdrdm asimddp"
TARGETS = {
    **_targets(
        "x86_64",
        ("x86-64-v3", "-march=x86-64-v3", _V3),
        ("x86-64-v3+avxvnni", "-march=x86-64-v3 -mavxvnni", f"{_V3} avx_vnni"),
        ("x86-64-v4", "-march=x86-64-v4", _V4),
        ("x86-64-v4+vnni", "-march=x86-64-v4 -mavx512vnni", f"{_V4} avx512_vnni"),
        ("x86-64-v4+vnni+bf16", "-march=x86-64-v4 -mavx512vnni -mavx512bf16", f"{_V4} avx512_vnni avx512_bf16"),
    ),
    **_targets(
        "aarch64",
        ("armv8-a", "-march=armv8-a", "fp asimd"),
        ("armv8.2-a+dotprod", "-march=armv8.2-a+dotprod", _V82),
        ("armv8.2-a+dotprod+i8mm", "-march=armv8.2-a+dotprod+i8mm", f"{_V82} i8mm"),
    ),
}
"""Of each architecture, from what the most processors execute to what is fastest."""


def suitable(features: Iterable[str]) -> list[Target]:
    """What a processor with these features executes, the fastest first."""
    return [target for target in reversed(TARGETS.values()) if target.features.issubset(features)]


def native() -> Target:
    """This very processor, whatever it is."""
    flag = "-mcpu=native" if machine() == "aarch64" else "-march=native"
    return Target("native", machine(), (flag,), frozenset())


def machine() -> str:
    """This machine's architecture; lower case, where it is none that kernels are written for."""
    name = platform.machine().lower()
    return _MACHINES.get(name, name)


def features(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Of this machine's processor, as Linux lists them; none elsewhere."""
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith(("flags", "Features")):
                return frozenset(line.partition(":")[2].split())
    return frozenset()
