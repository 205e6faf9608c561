"""Clients in JavaScript: the scripts in `node/` fail where something is not as they expect."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.e2e.clients.conftest import CLIENTS, MODEL, Scripted, run
from tests.e2e.conftest import Server

SCRIPTS = Path(__file__).parent / "node"


@pytest.mark.parametrize("name", [path.name for path in sorted(SCRIPTS.glob("*.mjs"))])
def test_script(name: str, tmp_path: Path, tiny_talker: Server, scripted: Scripted) -> None:
    packages, node = CLIENTS / "node/node_modules", shutil.which("node")
    if node is None or not packages.exists():
        pytest.skip("no clients in JavaScript are installed: `make test-clients`")
    (tmp_path / "node_modules").symlink_to(packages)
    shutil.copy(SCRIPTS / name, tmp_path)
    done = run(node, str(tmp_path / name), tiny_talker.url, scripted.url, MODEL)
    assert done.stdout.splitlines()[-1] == "ok"
