"""The shipped cases, put to the default model, which `ingle eval` serves meanwhile."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CASES = ROOT / "examples/eval/cases.jsonl"
EVAL = [sys.executable, "-m", "ingle", "eval", str(CASES), "--model", "smollm2:135m", "--output"]
pytestmark = pytest.mark.slow


def test_fifty_cases_in_two_minutes(smollm2_gguf: Path, tmp_path: Path) -> None:
    started = time.monotonic()
    done = subprocess.run([*EVAL, str(tmp_path)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - started < 120
    (model,) = json.loads((tmp_path / "results.json").read_text())["models"]
    assert model["cases"] == 50 and 10 < model["right"] < 45 and model["errors"] == 0
    assert "<title>cases.jsonl: smollm2:135m</title>" in (tmp_path / "report.html").read_text()


def test_interrupted_and_resumed(smollm2_gguf: Path, tmp_path: Path) -> None:
    answers = tmp_path / "answers.jsonl"
    process = subprocess.Popen([*EVAL, str(tmp_path), "--concurrency", "1"], stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (answers.exists() and answers.stat().st_size):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    some = json.loads((tmp_path / "results.json").read_text())
    assert not some["whole"] and 0 < some["models"][0]["missing"] < 50
    before = answers.read_bytes()
    done = subprocess.run([*EVAL, str(tmp_path), "--resume"], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert answers.read_bytes().startswith(before)
    assert json.loads((tmp_path / "results.json").read_text())["whole"]
