"""The real server against its own OpenAPI document, by schemathesis: valid and invalid requests of every kind.

Each answer must have a status, a type and a body that the document names; none may be a 5xx, and none may hang.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import Server, save_byte_model, start_server

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "unsupported_method",
    "allow_header_conformance",
)
HANGS_S = 30
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A random model that knows every byte, and a chat template."""
    folder = save_byte_model(tmp_path_factory.mktemp("bytes"))
    started = start_server(
        str(folder), "--served-model-name", "tiny", "--kv-cache-memory", "64MiB", "--max-model-len", "512",
        "--chat-template", TEMPLATE,
    )  # fmt: skip
    yield started
    started.stop()


SETTINGS = """
[checks.not_a_server_error]
expected-statuses = ["2xx", "3xx", "4xx", "504"]
"""
"""504 is what a request gets whose own `timeout` is over, such as one of a millisecond."""


def run(server: Server, directory: Path, *options: str) -> None:
    pytest.importorskip("schemathesis")
    (directory / "schemathesis.toml").write_text(SETTINGS)
    command = [
        sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json", "--mode", "all",
        "--checks", ",".join(CHECKS), "--request-timeout", str(HANGS_S), "--suppress-health-check", "all",
        "--warnings", "off", "--no-shrink", *options,
    ]  # fmt: skip
    found = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=1500)
    assert found.returncode == 0, found.stdout[-8000:] + found.stderr[-2000:]
    detail = httpx.get(f"{server.url}/health").raise_for_status().json()["detail"]
    assert detail == "0 requests running, 0 waiting", "a request was left behind"
    assert not [line for line in server.log if re.search(r'" 50[0-3] ', line)]


def test_some_requests_of_every_kind(server: Server, tmp_path: Path) -> None:
    run(server, tmp_path, "--phases", "fuzzing,stateful", "--max-examples", "3", "--seed", "1")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_thousands_of_requests_of_every_kind(server: Server, tmp_path: Path) -> None:
    run(server, tmp_path, "--max-examples", "200")
