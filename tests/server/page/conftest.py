from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ingle.text.tokenizer import Tokenizer

from .browser import Browser, executable
from .scripted import ScriptedServer, scripted_server


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    path = executable()
    if path is None:
        pytest.skip("there is no Chromium here: apt-get install chromium")
    running = Browser(path, tmp_path_factory.mktemp("browser"))
    yield running
    running.close()


@pytest.fixture(scope="session")
def site(tokenizer: Tokenizer) -> Iterator[ScriptedServer]:
    with scripted_server(tokenizer) as server:
        yield server


@pytest.fixture(scope="session")
def pictures(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pictures")
