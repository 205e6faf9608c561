"""Clients of others: where they are, and the servers that they talk to."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from tests.e2e.clients.scripted_engine import LOG, MISSING, SCRIPTS, Asked
from tests.e2e.clients.scripts import SCRIPTED
from tests.e2e.conftest import PYTHON, Server, start_server

MODEL = "smollm2:135m"
NAMES = (MODEL, "gpt-5", "claude-sonnet-4")
"""Of the scripted model: what some clients ask of models that think, they ask by name."""
ROOT = Path(__file__).parents[3]
CLIENTS = Path(os.environ.get("TEST_CLIENTS", ROOT / ".cache/clients"))
TEMPLATE = ROOT / "tests/text/families/qwen3.jinja"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("clients")


@dataclass
class Scripted:
    """A server whose model says what scripts tell it to."""

    server: Server
    log: Path

    @property
    def url(self) -> str:
        return self.server.url

    def asked(self, script: str) -> list[Asked]:
        """Requests in the conversation of a script, in which tools were offered."""
        lines = self.log.read_bytes().splitlines() if self.log.exists() else []
        asked = [msgspec.json.decode(line, type=Asked) for line in lines]
        return [each for each in asked if f"[script:{script}]" in each.prompt and "<tools>" in each.prompt]


def start_scripted(folder: Path, *arguments: str, scripts: Mapping[str, Sequence[object]] = SCRIPTED) -> Scripted:
    (folder / "scripts.json").write_text(json.dumps(scripts))
    variables = {SCRIPTS: str(folder / "scripts.json"), LOG: str(folder / "log.jsonl")}
    variables["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    serve = (PYTHON, "-m", "tests.e2e.clients.scripted_server")
    server = start_server(MODEL, "--chat-template", str(TEMPLATE), *arguments, serve=serve, **variables)
    return Scripted(server, folder / "log.jsonl")


@pytest.fixture(scope="session")
def scripted(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scripted]:
    found = start_scripted(tmp_path_factory.mktemp("scripted"), "--served-model-name", *NAMES)
    yield found
    assert found.server.stop() == 0, found.server.text()
    if found.log.exists():
        assert MISSING not in found.log.read_text()
    assert "Traceback" not in found.server.text()


@pytest.fixture(scope="session")
def tiny_talker(smollm2_gguf: Path) -> Iterator[Server]:
    """The default model, as its users start it."""
    running = start_server(MODEL, "--kv-cache-memory", "1GiB", "--seed", "1")
    yield running
    assert running.stop() == 0, running.text()


def node_program(name: str) -> str:
    path = CLIENTS / "node/node_modules/.bin" / name
    if not path.exists():
        pytest.skip(f"{name} is not installed: `make test-clients`")
    return str(path)


def run(*command: str, seconds: float = 120.0, **options: object) -> subprocess.CompletedProcess[str]:
    """Shows what a program printed, if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, stdin=subprocess.DEVNULL, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done
