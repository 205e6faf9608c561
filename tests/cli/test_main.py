from __future__ import annotations

import os
import pty
import subprocess
import sys
import types

import pytest

from ingle.cli import main as cli
from ingle.errors import ConfigError, EngineError, IngleError, ModelError, RequestError
from ingle.version import __version__
from tests.cli.conftest import Run


@pytest.fixture
def boom(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A command `ingle boom` whose `main` a test sets."""
    module = types.ModuleType("boom")
    monkeypatch.setitem(sys.modules, "boom", module)
    monkeypatch.setitem(cli.COMMANDS, "boom", ("boom", "fails"))
    return module


def raising(error: BaseException) -> object:
    def main(argv: list[str]) -> None:
        raise error

    return main


@pytest.mark.parametrize("argv", [(), ("--help",), ("-h",), ("help",)])
def test_help_lists_every_command_on_one_line(ingle: Run, argv: tuple[str, ...]) -> None:
    result = ingle(*argv)
    lines = result.out.splitlines()
    assert result.code == 0
    assert all(len(line) <= 100 for line in lines)
    for command in ("serve", "chat", "generate", "pull", "list", "catalog", "show", "rm", "run", "ps", "stop", "bench"):
        assert sum(line.startswith(f"  {command} ") for line in lines) == 1


@pytest.mark.parametrize("command", ["serve", "run", "ps", "bench latency"])
def test_help_of_a_command(ingle: Run, command: str) -> None:
    result = ingle("help", *command.split())
    assert (result.code, result.err) == (0, "")
    assert result.out == ingle(*command.split(), "--help").out
    assert result.out.startswith("usage: ingle ")


def test_help_of_no_command(ingle: Run) -> None:
    assert ingle("help", "dance").err == "ingle: there is no command 'dance'; `ingle --help` lists the commands\n"


@pytest.mark.parametrize("argv", ["--version", "-V", "-v", "version"])
def test_version(ingle: Run, argv: str) -> None:
    assert ingle(argv).out == f"ingle {__version__}\n"


@pytest.mark.parametrize("command", ["serve", "chat", "generate", "pull", "list", "show", "rm", "ps", "stop", "launch"])
def test_every_command_has_help_that_fits(ingle: Run, command: str) -> None:
    result = ingle(command, "--help")
    assert result.code == 0
    assert result.out.startswith(f"usage: ingle {command} ")
    assert all(len(line) <= 120 for line in result.out.splitlines())
    assert "None" not in result.out


def test_unknown_command(ingle: Run) -> None:
    assert ingle("serv").err == "ingle: there is no command 'serv'; did you mean `ingle serve`?\n"
    result = ingle("dance")
    assert (result.code, result.out) == (2, "")
    assert result.err == "ingle: there is no command 'dance'; `ingle --help` lists the commands\n"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("no\nsuch flag"), 2),
        (RequestError("no\nsuch flag"), 2),
        (ModelError("no\n such flag"), 1),
        (EngineError("no such\n\nflag"), 1),
    ],
)
def test_errors_are_one_line(ingle: Run, boom: types.ModuleType, error: IngleError, code: int) -> None:
    boom.main = raising(error)  # type: ignore[attr-defined]
    result = ingle("boom")
    assert (result.code, result.out, result.err) == (code, "", "ingle: no such flag\n")
    with pytest.raises(type(error)):
        ingle("boom", "--debug")


def test_interrupted(ingle: Run, boom: types.ModuleType) -> None:
    boom.main = raising(KeyboardInterrupt())  # type: ignore[attr-defined]
    result = ingle("boom")
    assert (result.code, result.out, result.err) == (130, "", "")


def test_a_bug_is_not_hidden(ingle: Run, boom: types.ModuleType) -> None:
    boom.main = raising(ZeroDivisionError())  # type: ignore[attr-defined]
    with pytest.raises(ZeroDivisionError):
        ingle("boom")


def test_interrupted_while_importing() -> None:
    """Even when the module that is imported swallows what the signal raises."""
    code = """
import signal
from ingle.cli.local import importing
with importing():
    try:
        signal.raise_signal(signal.SIGINT)
    except BaseException:
        pass
    print("survived")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_help_imports_nothing_heavy() -> None:
    """What keeps `ingle --help` under 0.3 s and `ingle serve --help` under 0.6 s."""
    code = """
import sys
from ingle.cli.main import main
try:
    main({argv})
except SystemExit:
    pass
print("loaded:", *({modules} & set(sys.modules)))
"""
    heavy = {"torch", "transformers", "fastapi", "rich", "numpy", "safetensors"}
    light = heavy | {"tyro", "msgspec", "ingle.config", "dataclasses"}
    assert python(code.format(argv=["--help"], modules=light)).splitlines()[-1] == "loaded:"
    assert python(code.format(argv=["serve", "--help"], modules=heavy)).splitlines()[-1] == "loaded:"
    assert python(code.format(argv=["bench", "latency", "--help"], modules=heavy)).splitlines()[-1] == "loaded:"
    assert python(code.format(argv=["chat", "--help"], modules=heavy)).splitlines()[-1] == "loaded:"


def test_a_terminal_that_lacks_characters_of_an_answer() -> None:
    code = """
from ingle.cli import main
main._dispatch = lambda words: print("caf\\xe9 \\U0001f600")
main.main([])
"""
    for encoding, written in (("ascii", b"caf? ?\n"), ("latin-1", b"caf\xe9 ?\n"), ("utf-8", "café 😀\n".encode())):
        environment = {**os.environ, "PYTHONIOENCODING": encoding}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
        assert (done.stdout, done.stderr) == (written, b"")


def test_as_a_module() -> None:
    command = [sys.executable, "-m", "ingle", "nonsense"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1


def test_mistakes_are_one_line_on_a_terminal_too() -> None:
    """There tyro colours its messages, and draws its boxes in Unicode."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "ingle", "serve", "m", "--port", "http"]
    done = subprocess.run(command, stdout=theirs, stderr=subprocess.PIPE, text=True, env=os.environ | {"TERM": "xterm"})
    os.close(ours)
    os.close(theirs)
    message = "ingle: Error parsing --port: 'http' is not a whole number; 4k (4000) and 4K (4096) are fine"
    assert done.stderr == f"{message} (see `ingle serve --help`)\n"


def test_reader_that_goes_away() -> None:
    shell = f"{sys.executable} -m ingle serve --help; echo $? >&2"
    done = subprocess.run(["bash", "-c", f"({shell}) | exec true"], capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
