"""Pages in host memory, and what the next process makes of them."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingle.device.pages import Bytes
from ingle.engine.tiers import NAME_BYTES
from ingle.engine.tiers.host import HostTier, slots_in

PAGE_BYTES = 512
OURS, OTHERS = b"0" * 16, b"1" * 16


def name(number: int) -> bytes:
    return number.to_bytes(NAME_BYTES, "little")


def page(number: int) -> Bytes:
    return np.random.default_rng(number).integers(0, 256, PAGE_BYTES, np.uint8)


def read(tier: HostTier, number: int) -> Bytes | None:
    out = np.zeros(PAGE_BYTES, np.uint8)
    return out if tier.read(name(number), out) else None


def is_there(tier: HostTier, number: int) -> bool:
    return np.array_equal(read(tier, number), page(number))


@pytest.fixture
def memory() -> Iterator[int]:
    file = os.memfd_create("test", os.MFD_CLOEXEC)
    yield file
    os.close(file)


def size_of(num_pages: int) -> int:
    return next(size for size in range(PAGE_BYTES, 1 << 20, 64) if slots_in(size, PAGE_BYTES) == num_pages)


@given(st.lists(st.tuples(st.sampled_from(["read", "write", "touch", "restart"]), st.integers(0, 9)), max_size=60))
@settings(max_examples=60, deadline=None)
def test_it_holds_what_was_asked_for_last(operations: list[tuple[str, int]]) -> None:
    memory = os.memfd_create("test", os.MFD_CLOEXEC)
    try:
        tier, expected = HostTier(size_of(4), PAGE_BYTES, OURS, memory), list[int]()
        for operation, number in operations:
            if operation == "restart":
                tier = HostTier(size_of(4), PAGE_BYTES, OURS, memory)
                assert tier.num_inherited == len(expected)
                continue
            if operation == "read":
                assert is_there(tier, number) == (number in expected)
            elif operation == "write":
                tier.write(name(number), page(number))
            else:
                tier.touch(name(number))
            if number in expected and operation != "write":
                expected.remove(number)
                expected.append(number)
            elif operation == "write" and number not in expected:
                expected = [*expected, number][-4:]
            assert tier.num_bytes == len(expected) * PAGE_BYTES
        assert sorted(number for number in range(10) if name(number) in tier) == sorted(expected)
    finally:
        os.close(memory)


@pytest.mark.parametrize("change", ["identity", "page size", "limit", "head"])
def test_what_another_model_left_is_not_taken_over(memory: int, change: str) -> None:
    HostTier(size_of(4), PAGE_BYTES, OURS, memory).write(name(1), page(1))
    if change == "head":
        os.pwrite(memory, b"x", 3)
    tier = HostTier(
        size_of(5 if change == "limit" else 4),
        PAGE_BYTES // 2 if change == "page size" else PAGE_BYTES,
        OTHERS if change == "identity" else OURS,
        memory,
    )
    assert tier.num_inherited == 0
    assert name(1) not in tier


def test_a_page_that_a_killed_process_was_writing_is_not_taken_over(memory: int) -> None:
    tier = HostTier(size_of(4), PAGE_BYTES, OURS, memory)
    for number in range(3):
        tier.write(name(number), page(number))
    tier._rows["whole"][1] = 0
    after = HostTier(size_of(4), PAGE_BYTES, OURS, memory)
    assert [number for number in range(3) if is_there(after, number)] == [0, 2]
    for number in (5, 6):
        after.write(name(number), page(number))
    assert all(is_there(after, number) for number in (0, 2, 5, 6))


def test_a_page_that_was_altered_is_not_believed(memory: int) -> None:
    tier = HostTier(size_of(4), PAGE_BYTES, OURS, memory)
    tier.write(name(1), page(1))
    os.pwrite(memory, b"altered", os.fstat(memory).st_size - 4 * PAGE_BYTES + 9)
    assert read(tier, 1) is None
    assert name(1) not in tier
    assert tier.num_damaged == 1


def test_memory_is_taken_when_it_is_used(memory: int) -> None:
    tier = HostTier(1 << 33, PAGE_BYTES, OURS, memory)
    tier.write(name(1), page(1))
    assert os.fstat(memory).st_blocks * 512 < 1 << 16
