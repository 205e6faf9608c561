"""What docs/security.md says of the code as a whole, and that the tests it names are there."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from .test_layers import Module, modules

ROOT = Path(__file__).parents[1]
EXECUTES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "multiprocessing", "code", "xmlrpc"}
"""Modules that run what they read, or hand it to one that does."""
CLIENTS = {
    "urllib.request",
    "http.client",
    "httpx",
    "requests",
    "aiohttp",
    "urllib3",
    "ftplib",
    "smtplib",
    "websockets",
}
READS_REQUESTS = {"server", "text", "engine", "device", "events", "channel", "request"}
"""Parts that see what is in a request."""
LISTENERS = {"bind", "listen", "create_server", "create_unix_server", "start_server", "start_unix_server", "TCPServer"}


def imported(module: Module) -> Iterator[str]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def called(module: Module) -> Iterator[str]:
    """`name` and `object.name`."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            yield ast.unparse(node.func)


def test_nothing_is_unpickled() -> None:
    for module in modules().values():
        found = {name for name in imported(module) if name.partition(".")[0] in EXECUTES}
        assert not found, f"{module.name} imports {found}"
        calls = {
            name
            for name in called(module)
            if name in ("eval", "exec", "compile", "torch.load", "numpy.load", "np.load")
        }
        assert not calls, f"{module.name} calls {calls}"


def test_no_address_of_a_request_is_fetched() -> None:
    reading = [module for module in modules().values() if module.part in READS_REQUESTS]
    assert len(reading) > 100
    for module in reading:
        found = {name for name in imported(module) if name in CLIENTS or name.partition(".")[0] in CLIENTS}
        assert not found, f"{module.name} imports {found}"
        assert not {name for name in called(module) if name.rpartition(".")[2] in ("urlopen", "create_connection")}


def test_two_modules_listen() -> None:
    """For clients, and for ranks on other hosts."""
    found = {
        module.name
        for module in modules().values()
        for name in called(module)
        if name.rpartition(".")[2] in LISTENERS and name not in ("bind", "listening.bind")
    }
    assert found == {"server.listening", "parallel.reach"}


def test_the_page_names_tests_that_are_there() -> None:
    page = (ROOT / "docs" / "security.md").read_text()
    named = set(re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", page))
    assert len(named) > 20
    for path, name in named:
        defined = {
            node.name
            for node in ast.walk(ast.parse((ROOT / path).read_text()))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        }
        assert not name or name in defined, f"{path} has no {name}"
    rows = re.findall(r"^\| (?!---|what went wrong)(.+) \|$", page.partition("## Known failures")[2], re.M)
    assert rows and all("tests/" in row for row in rows), "each names what shows it"


def test_what_the_page_says_is_public_is_what_is() -> None:
    from ingle.server.access import PUBLIC

    said = (
        (ROOT / "docs" / "security.md").read_text().partition("Without a key are answered only")[2].partition("\n- ")[0]
    )
    assert set(re.findall(r"`(/[\w/]+)`", said)) == {path for _, path in PUBLIC} - {"/"}
