"""Suites of others that hold a server against the published APIs. Exceptions have their reason in `docs/api.md`."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.clients.conftest import MODEL, Scripted, node_program
from tests.e2e.conftest import Server

NO_IMAGES = "an image is refused, with the field's name: the model reads none"
NO_NAME = "a request that names no model is answered by the only one that is served"
EXCEPTIONS: Mapping[str, Mapping[str, str]] = {
    "openai-chat": {"chat-image-input": NO_IMAGES, "chat-error-handling": NO_NAME},
    "open-responses": {"image-input": NO_IMAGES},
    "anthropic": {"anth-image-input": NO_IMAGES},
}
"""By the suite's format: its checks that fail, and why."""


@pytest.mark.parametrize("kind", EXCEPTIONS)
def test_llm_comply(kind: str, tiny_talker: Server) -> None:
    results = comply(tiny_talker.url, kind, MODEL)
    failed = {each["id"]: each["errors"] for each in results if each["status"] == "failed"}
    assert failed.keys() == EXCEPTIONS[kind].keys(), json.dumps(failed, indent=1, ensure_ascii=False)
    for check, why in EXCEPTIONS[kind].items():
        assert failed[check][0] == (
            "HTTP 400 (expected [200])" if why == NO_IMAGES else "HTTP 200 (expected [400, 422])"
        )
    warned = {each["id"]: each["warnings"] for each in results if each.get("warnings")}
    assert not warned.keys() - EXCEPTIONS[kind].keys() - {"compact-response"}, warned


@pytest.mark.parametrize(
    ("kind", "model", "check"),
    [
        ("openai-chat", "gpt-5", "chat-reasoning-summary"),
        ("open-responses", "gpt-5", "reasoning-summary"),
        ("anthropic", "claude-sonnet-4", "anth-thinking-display"),
    ],
)
def test_llm_comply_of_a_model_that_thinks(kind: str, model: str, check: str, scripted: Scripted) -> None:
    (result,) = comply(scripted.url, kind, model, "--filter", check)
    assert result["status"] == "passed" and not result.get("warnings"), result


def comply(url: str, kind: str, model: str, *words: str) -> list[dict[str, Any]]:
    command = shutil.which("llm-comply", path=str(Path(sys.executable).parent)) or shutil.which("llm-comply")
    if command is None:
        pytest.skip("llm-comply is not installed: `make test-clients`")
    given = ["--base-url", f"{url}/v1", "--model", model, "--api-key", "none", "--format", kind, "--json", *words]
    done = subprocess.run([command, "run", *given], capture_output=True, text=True, timeout=300)
    results: list[dict[str, Any]] = json.loads(done.stdout)["results"]
    return results


def test_compatcanary(tiny_talker: Server) -> None:
    program = node_program("compatcanary")
    words = ["scan", "--base-url", f"{tiny_talker.url}/v1", "--model", MODEL, "--format", "json", "--timeout", "120"]
    done = subprocess.run([program, *words], capture_output=True, text=True, timeout=600)
    report = json.loads(done.stdout)
    assert report["score"] == 100, json.dumps(report["results"], indent=1, ensure_ascii=False)
