"""How the CPU's kernels come to be compiled."""

from __future__ import annotations

import platform

import pytest

from ingle.kernels.cpu import compile


@pytest.mark.skipif(platform.machine() != "x86_64", reason="is about x86-64")
def test_a_processor_that_is_too_old_is_told_so() -> None:
    with pytest.raises(compile.CompileError, match="converts no 16-bit floats"):
        compile.library("-march=x86-64-v2")
