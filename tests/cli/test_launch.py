"""`ingle launch`: what programs of others are told, by stand-ins that print their command line and environment."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ingle.cli.launch import PROGRAMS
from ingle.cli.main import main
from ingle.server.running import Running, announced, url_of

STAND_IN = """#!{python}
import json, os, sys
print(json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]))
sys.exit(7)
"""


class Servers:
    """Servers that answer `/v1/models`, the first of which says that it runs."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self.keys: list[str | None] = []
        self._announced = False

    def start(self, name: str, context: int = 65_536, key: str | None = None, status: int = 200) -> str:
        keys = self.keys

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                assert self.path == "/v1/models"
                keys.append(self.headers["Authorization"])
                allowed = key is None or keys[-1] == f"Bearer {key}"
                body: Any = {"object": "list", "data": [{"id": name, "object": "model", "max_model_len": context}]}
                if not allowed or status != 200:
                    body = {"error": {"message": "The model is being loaded", "type": "x", "param": None, "code": None}}
                self.send_response(status if allowed else 401)
                self.end_headers()
                self.wfile.write(json.dumps(body).encode())

            def log_message(self, format: str, *args: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        self._stack.callback(server.shutdown)
        if not self._announced:  # a process has one record
            info: Any = SimpleNamespace(weight_bytes=1, kv_cache_bytes=1, device="cpu", max_model_len=context)
            self._stack.enter_context(announced([name], info, url_of(server.socket)))
            self._announced = True
        return f"http://127.0.0.1:{server.server_address[1]}"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("INGLE_HOME", str(tmp_path / "ingle"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("INGLE_API_KEY", raising=False)
    (tmp_path / "home").mkdir()
    return tmp_path / "ingle"


@pytest.fixture
def servers(home: Path) -> Iterator[Servers]:
    with ExitStack() as stack:
        yield Servers(stack)


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in PROGRAMS:
        (folder / name).write_text(STAND_IN.format(python=sys.executable))
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def launch(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ingle", "launch", *words]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=30)


def told(*words: str, **environment: str) -> tuple[list[str], dict[str, str], str]:
    """What the program was told, and what was printed before."""
    done = launch(*words, **environment)
    assert done.returncode == 7, done.stderr  # the program's own
    arguments, variables, folder = json.loads(done.stdout)
    assert Path(folder) == Path.cwd()
    return arguments, variables, done.stderr


def settings(arguments: list[str]) -> dict[str, Any]:
    """Codex's `-c NAME=VALUE`."""
    tomllib = pytest.importorskip("tomllib")
    found: dict[str, Any] = {}
    for flag, line in zip(arguments[::2], arguments[1::2], strict=True):
        assert flag == "-c"
        for name, value in tomllib.loads(line).items():
            found.setdefault(name, {}).update(value) if isinstance(value, dict) else found.update({name: value})
    return found


@pytest.mark.usefixtures("programs")
def test_codex(home: Path, servers: Servers) -> None:
    url = servers.start('odd"name')
    arguments, variables, printed = told("codex", "--", "exec", "--model", "say hi", "--")
    assert arguments[-4:] == ["exec", "--model", "say hi", "--"]
    found = settings(arguments[:-4])
    assert (found["model"], found["model_provider"], found["model_context_window"]) == ('odd"name', "ingle", 65_536)
    assert found["model_providers"]["ingle"] == {
        "name": "ingle",
        "base_url": f"{url}/v1",
        "env_key": "INGLE_API_KEY",
        "wire_api": "responses",
    }
    assert (variables["CODEX_HOME"], variables["INGLE_API_KEY"]) == (str(home / "launch/codex"), "none")
    assert (home / "launch/codex").stat().st_mode & 0o77 == 0
    assert url in printed and "notice" not in printed


@pytest.mark.usefixtures("programs")
def test_claude(home: Path, servers: Servers) -> None:
    url = servers.start("qwen3:8b", context=32_768)
    own = {"ANTHROPIC_API_KEY": "sk-theirs", "CLAUDE_CODE_USE_BEDROCK": "1", "ANTHROPIC_MODEL": "opus"}
    arguments, variables, printed = told("claude-code", "--", "-p", "hi", **own)
    assert arguments == ["-p", "hi"]
    assert not {"ANTHROPIC_API_KEY", "CLAUDE_CODE_USE_BEDROCK"} & variables.keys()
    assert variables["ANTHROPIC_BASE_URL"] == url
    assert {value for name, value in variables.items() if name.endswith("_MODEL")} == {"qwen3:8b"}
    assert (variables["CLAUDE_CODE_AUTO_COMPACT_WINDOW"], variables["CLAUDE_CODE_MAX_OUTPUT_TOKENS"]) == (
        "32768",
        "8192",
    )
    folder = Path(variables["CLAUDE_CONFIG_DIR"])
    assert json.loads((folder / ".claude.json").read_text()) == {"hasCompletedOnboarding": True}
    assert "notice: Claude Code begins with some 20000 tokens" in printed and "32768" in printed

    (folder / ".claude.json").write_text('{"theme": "light"}')  # its own, from now on
    told("claude")
    assert (folder / ".claude.json").read_text() == '{"theme": "light"}'


@pytest.mark.usefixtures("programs")
def test_opencode(home: Path, servers: Servers) -> None:
    url = servers.start("org/model", key="sec ret")
    arguments, variables, _ = told("opencode", "--model", "model", INGLE_API_KEY="sec ret")
    assert arguments == [] and servers.keys == ["Bearer sec ret"]
    config = json.loads(variables["OPENCODE_CONFIG_CONTENT"])
    assert config["model"] == config["small_model"] == "ingle/org/model"
    provider = config["provider"]["ingle"]
    assert provider["options"] == {"baseURL": f"{url}/v1", "apiKey": "{env:INGLE_API_KEY}"}
    assert provider["models"]["org/model"]["limit"] == {"context": 65_536, "output": 16_384}
    assert variables["INGLE_API_KEY"] == "sec ret"


@pytest.mark.usefixtures("programs")
def test_open_webui(home: Path, servers: Servers) -> None:
    url = servers.start("m")
    arguments, variables, _ = told("open-webui", "--", "--port", "9000")
    assert arguments == ["serve", "--host", "127.0.0.1", "--port", "9000"]  # nobody signs in, so nobody else gets in
    assert (variables["OPENAI_API_BASE_URL"], variables["OPENAI_API_KEY"]) == (f"{url}/v1", "none")
    assert (variables["WEBUI_AUTH"], variables["DATA_DIR"]) == ("False", str(home / "launch/open-webui"))
    assert len(variables["WEBUI_SECRET_KEY"]) >= 32


@pytest.mark.usefixtures("programs")
def test_a_key_is_written_nowhere(home: Path, servers: Servers) -> None:
    servers.start("m", key="sec-ret")
    for name in PROGRAMS:
        arguments, _, printed = told(name, INGLE_API_KEY="sec-ret")
        assert "sec-ret" not in printed and not any("sec-ret" in word for word in arguments)
    texts = [path.read_text(errors="replace") for path in home.rglob("*") if path.is_file()]
    assert texts and not any("sec-ret" in text for text in texts)


@pytest.mark.usefixtures("programs")
def test_nothing_of_its_user_is_touched(home: Path, servers: Servers) -> None:
    servers.start("m")
    for name in PROGRAMS:
        told(name)
    assert list(Path.home().iterdir()) == []


@pytest.mark.usefixtures("programs")
def test_a_proxy_does_not_stand_before_this_machine(servers: Servers) -> None:
    servers.start("m")
    proxies = {"HTTP_PROXY": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9", "NO_PROXY": "intra.net"}
    _, variables, _ = told("opencode", **proxies, no_proxy="")
    assert variables["NO_PROXY"] == variables["no_proxy"] == "intra.net,127.0.0.1"


@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize("spelled", ["{}", "{}/", "{}/v1", "{}/v1/"])
def test_a_server_by_its_address(servers: Servers, spelled: str) -> None:
    servers.start("first")
    url = servers.start("second")
    _, variables, _ = told("claude", "--url", spelled.format(url.removeprefix("http://")))
    assert (variables["ANTHROPIC_BASE_URL"], variables["ANTHROPIC_MODEL"]) == (url, "second")


@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["codex"], 1, "no server runs: `ingle serve MODEL` in another terminal starts one, or name one by --url"),
        (["codex", "--model", "a"], 1, "no server for 'a' runs: `ingle serve a` in another terminal starts one"),
        (["codx"], 2, "did you mean `ingle launch codex`?"),
        (["emacs"], 2, "'emacs' is no program that ingle knows how to launch; there are codex, claude,"),
        (["codex", "exec"], 2, "unexpected argument 'exec' (see `ingle launch --help`); what is the program's comes"),
        (["codex", "--url", "ftp://x"], 2, "--url must be a server's address such as http://127.0.0.1:8000"),
        ([], 2, "PROGRAM"),
    ],
)
def test_what_cannot_be(home: Path, words: list[str], code: int, says: str) -> None:
    done = launch(*words)
    assert (done.returncode, done.stdout) == (code, "")
    assert says in done.stderr and done.stderr.startswith("ingle: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_that_is_not_here(servers: Servers, name: str) -> None:
    servers.start("m")
    done = launch(name, PATH=str(Path(sys.executable).parent))
    assert done.returncode == 1
    assert done.stderr == f"ingle: {name} is not installed: `{PROGRAMS[name].install}`, and then this again\n"


@pytest.mark.usefixtures("programs")
def test_servers_that_do_not_answer(servers: Servers) -> None:
    locked = servers.start("m", key="right")
    loading = servers.start("n", status=503)
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{sock.getsockname()[1]}"
    for url, environment, says in [
        (locked, {}, f"{locked} asks for a key: set INGLE_API_KEY"),
        (locked, {"INGLE_API_KEY": "wrong"}, f"{locked} asks for another key than INGLE_API_KEY"),
        (loading, {}, f"{loading} takes no requests: The model is being loaded"),
        (nobody, {}, f"{nobody} does not answer as a server of models: [Errno 111] Connection refused"),
    ]:
        done = launch("codex", "--url", url, **environment)
        assert (done.returncode, done.stderr) == (1, f"ingle: {says}\n")
    done = launch("codex", "--url", locked, "--model", "other", INGLE_API_KEY="right")
    assert done.stderr == f"ingle: {locked} has no model 'other'; it has m\n"


@pytest.mark.usefixtures("programs", "home")
def test_among_several_servers_one_is_to_be_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def running(name: str, port: int) -> Running:
        url = f"http://127.0.0.1:{port}"
        return Running(pid=port, models=[name], url=url, size=1, device="cpu", context=1, started=0.0)

    monkeypatch.setattr("ingle.cli.launch.servers", lambda: [running("a", 1), running("b", 2), running("b", 3)])
    for words, says in [
        ([], "3 servers run, say which by --model or --url: a at http://127.0.0.1:1, b at http://127.0.0.1:2, b at"),
        (["--model", "b"], "2 servers run, say which by --url: b at http://127.0.0.1:2, b at http://127.0.0.1:3"),
        (["--model", "c"], "no server for 'c' runs: `ingle serve c` in another terminal starts one, or name one by "
         "--url; running: a, b, b"),
    ]:  # fmt: skip
        assert main(["launch", "codex", *words]) > 0
        assert says in capsys.readouterr().err
