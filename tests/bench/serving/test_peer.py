"""The same figures as an independent client's, where that is installed: see benchmarks/load_generators.py."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

AIPERF = os.environ.get("TEST_AIPERF") or shutil.which("aiperf")


@pytest.mark.slow
@pytest.mark.skipif(
    AIPERF is None, reason="TEST_AIPERF names no aiperf: pip install aiperf, in an environment of its own"
)
def test_aiperf_measures_the_same(tmp_path: Path) -> None:
    """Both at once on a server whose tokens come at known moments."""
    output = tmp_path / "peer.json"
    command = [sys.executable, "-m", "benchmarks.load_generators", "--aiperf", str(AIPERF), "--concurrency", "8",
               "--requests", "6", "--out", "40", "--output", str(output)]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[3], timeout=280)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert json.loads(output.read_text())["worst_difference"] <= 0.05
