"""Damaged files by hypothesis. `python -m tests.fuzz TARGET` goes on for longer, guided by coverage, with atheris."""

from __future__ import annotations

import resource
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import TARGETS, seed_of

ALSO_TRIED = [f"quantized-{name}" for name in ("awq-gemv", "bitsandbytes-int8", "fp8", "nvfp4")]
MAX_TRACED_BYTES = 32 << 20
MAX_GROWTH_KIB = 256 << 10

EXTREMES = [
    b"\xff" * 8,
    b"\x00" * 8,
    b"\xff" * 7 + b"\x7f",
    b"\x00" * 7 + b"\x80",
    b"\xff\xff\xff\x7f",
    b"\x01" * 4,
    b"\x00" * 4,
]


@st.composite
def damaged(draw: st.DrawFn, raw: bytes) -> bytes:
    """The file after a few cuts, copies of pieces, and overwritten bytes."""
    data = bytearray(raw)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        match draw(st.integers(0, 4)):
            case 0:
                del data[at : at + draw(st.integers(1, 64))]
            case 1:
                data[at:at] = data[at : at + draw(st.integers(1, 64))]
            case 2:
                extreme = draw(st.sampled_from(EXTREMES))
                data[at : at + len(extreme)] = extreme
            case 3:
                data[at : at + 4] = draw(st.binary(min_size=1, max_size=8))
            case _:
                data = data[:at]
    return bytes(data)


@pytest.mark.parametrize("name", TARGETS)
def test_whole_files_are_read(name: str) -> None:
    for reader in TARGETS[name].readers:
        TARGETS[name].read_with(reader, seed_of(name))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in ALSO_TRIED else []) for name in TARGETS]
)
def test_damaged_files_give_an_error_soon_and_cheaply(name: str) -> None:
    target, before = TARGETS[name], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @given(damaged(seed_of(name)))
    @settings(max_examples=150, deadline=5000, suppress_health_check=list(HealthCheck))
    def read(raw: bytes) -> None:
        tracemalloc.start()
        try:
            target.read(raw)
            assert tracemalloc.get_traced_memory()[1] < MAX_TRACED_BYTES
        finally:
            tracemalloc.stop()

    read()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MAX_GROWTH_KIB
