"""lm-eval, with the tasks of `examples/lm-eval`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.e2e.clients.conftest import ROOT
from tests.e2e.conftest import Server


@pytest.mark.parametrize(
    ("kind", "path", "task", "metric", "least"),
    [
        ("local-completions", "completions", "word_choice", "acc,none", 0.8),
        ("local-completions", "completions", "one_word", "exact_match,first-word", 0.05),
        ("local-chat-completions", "chat/completions", "one_word", "exact_match,first-word", 0.3),
    ],
)
def test_tasks(server: Server, tmp_path: Path, kind: str, path: str, task: str, metric: str, least: float) -> None:
    command = shutil.which("lm_eval", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if command is None:
        pytest.skip("`make test-clients` installs lm-eval")
    model = httpx.get(f"{server.url}/v1/models").json()["data"][0]["id"]
    arguments = f"base_url={server.url}/v1/{path},model={model},num_concurrent=4"
    chat = ["--apply_chat_template"] if "chat" in kind else []
    where = ["--include_path", ".", "--output_path", str(tmp_path)]
    subprocess.run(
        [command, "--model", kind, "--model_args", arguments, "--tasks", task, *chat, *where],
        cwd=ROOT / "examples/lm-eval",
        env={**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"},
        check=True,
        timeout=240,
        capture_output=True,
    )
    (found,) = tmp_path.rglob("results_*.json")
    assert json.loads(found.read_text())["results"][task][metric] >= least
