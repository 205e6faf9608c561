"""How ingle comes onto a machine: make's targets, the script behind them, the Dockerfile, what pages say to type."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import get_type_hints

import pytest

from ingle.cli.catalog import Catalog
from ingle.cli.flags import parse
from ingle.cli.list import List
from ingle.cli.plan import Plan
from ingle.cli.pull import Pull
from ingle.cli.rm import Remove
from ingle.cli.search import Search
from ingle.cli.service_unit import ServiceOptions
from ingle.cli.show import Show
from ingle.config import ServeConfig

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def install() -> ModuleType:
    spec = importlib.util.spec_from_file_location("install", ROOT / "tools" / "install.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- make


def make(*arguments: str, cwd: Path) -> str:
    """What make prints, as for somebody who types it: these tests may run below another make."""
    without = {name: value for name, value in os.environ.items() if name not in ("MAKELEVEL", "MAKEFLAGS", "MFLAGS")}
    done = subprocess.run(["make", *arguments], cwd=cwd, check=True, capture_output=True, text=True, env=without)
    return done.stdout


def would_run(*arguments: str, cwd: Path = ROOT) -> str:
    return make("-n", *arguments, cwd=cwd)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_targets_and_their_variables() -> None:
    last = would_run("run", "PORT=1234", "MODEL=./my model", "ARGS=--seed 1").splitlines()[-1]
    assert last == ".venv/bin/python -m ingle serve './my model' --port '1234' --seed 1"
    assert would_run("run").splitlines()[-1].rstrip() == ".venv/bin/python -m ingle serve 'smollm2:135m'"
    assert "tools/install.py run --venv '/new' --torch 'cu126'" in would_run("run", "VENV=/new", "TORCH=cu126")
    assert "tools/install.py dev --venv '/new'" in would_run("lint", "test", "VENV=/new")
    assert "docker build --target cuda --tag ingle:cuda ." in would_run("image", "KIND=cuda")
    described = set(re.findall(r"'make ([\w-]+)|`make ([\w-]+)", (ROOT / "Makefile").read_text()))
    for target in (one or other for one, other in described):
        assert would_run(target, "VENV=/new")


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_help_comes_first_and_needs_nothing(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    helped = make(cwd=tmp_path)
    assert helped.startswith("make run ") and "PORT=" in helped and "ARGS=" in helped
    assert [path.name for path in tmp_path.iterdir()] == ["Makefile"]


# ---- the script


def test_a_command_that_fails_is_shown(
    install: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(install, "TICK_S", 0.1)
    script = "import sys, time; print('before'); time.sleep(0.5); print('the reason'); sys.exit(3)"
    with pytest.raises(install.Failed, match=r"before\nthe reason\nexit code 3"):
        install.watch("installing something", [sys.executable, "-c", script], tmp_path / "log")
    assert re.fullmatch(r"installing something\.+ \d+ s failed\n", capsys.readouterr().out)


def test_pips_words_in_few(install: ModuleType, tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("Collecting numpy (from ingle)\n  Downloading https://h/numpy-2.4.6-cp311.whl (16.9 MB)\nUsing x\n")
    assert install.newest(log) == "downloading numpy-2.4.6-cp311.whl (16.9 MB)"
    log.write_text("Looking in links: /x\n")
    assert install.newest(log) == ""


def test_uv_takes_from_where_pip_does(install: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = (
        "global.index-url='https://mirror.example/simple'\n"
        "global.find-links='/nowhere'\n"
        "global.timeout='60'\n"
        ":env:.extra-index-url='https://a.example/simple https://b.example/simple'\n"
        ":env:.find-links='/one /two'\n"
    )
    monkeypatch.setattr(
        install.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, stdout=listed, stderr="")
    )
    for name in ("UV_INDEX_URL", "UV_EXTRA_INDEX_URL", "UV_FIND_LINKS", "UV_INDEX_STRATEGY"):
        monkeypatch.delenv(name, raising=False)
    expected = {
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "UV_INDEX_URL": "https://mirror.example/simple",
        "UV_EXTRA_INDEX_URL": "https://a.example/simple https://b.example/simple",
        "UV_FIND_LINKS": "/one,/two",
    }
    assert install.Environment(tmp_path)._sources() == expected
    monkeypatch.setenv("UV_INDEX_URL", "https://uvs.own/simple")  # who tells uv is heard
    del expected["UV_INDEX_URL"]
    assert install.Environment(tmp_path)._sources() == expected


class Recorded:
    """An environment that notes what it is told to install."""

    def __init__(self) -> None:
        self.installed: list[str] = []

    def requirements(self) -> list[str]:
        return ["torch>=2.11", "numpy>=1.26", "transformers>=4.56", "uvloop>=0.21; sys_platform != 'win32'"]

    def install(self, title: str, *arguments: str) -> None:
        self.installed += [each for each in arguments if ">=" in each]

    def has(self, package: str) -> bool:
        return False


class Kernels:
    def __init__(self, there: bool) -> None:
        self._there = there

    def are_there(self) -> bool:
        return self._there


@pytest.mark.parametrize(
    ("has_gpu", "has_kernels", "with_torch"),
    [(False, True, False), (False, False, True), (True, True, True), (True, False, True)],
)
def test_pytorch_is_installed_where_it_is_needed(
    install: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    has_gpu: bool,
    has_kernels: bool,
    with_torch: bool,
) -> None:
    driver = tmp_path / "nvidiactl"
    monkeypatch.setattr(install, "NVIDIA", (str(driver),))
    if has_gpu:
        driver.touch()
    venv, built = Recorded(), []
    install.install_to_run(venv, lambda: built.append("torch"), Kernels(has_kernels))
    assert ("torch>=2.11" in venv.installed) == ("transformers>=4.56" in venv.installed) == with_torch
    assert bool(built) == with_torch
    assert {"numpy>=1.26", "uvloop>=0.21; sys_platform != 'win32'"} <= set(venv.installed)


def test_the_script_needs_nothing_but_python() -> None:
    command = [sys.executable, "-I", "-S", str(ROOT / "tools" / "install.py")]
    assert "--torch" in subprocess.run([*command, "--help"], check=True, capture_output=True, text=True).stdout
    refused = subprocess.run([*command, "run", "--torch", "../x"], capture_output=True, text=True)
    assert refused.returncode == 2 and "such as cu126" in refused.stderr


# ---- the Dockerfile


def test_the_dockerfile_copies_what_is_there_and_let_through() -> None:
    text = (ROOT / "Dockerfile").read_text()
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    let_through = {line[1:] for line in ignored if line.startswith("!")}
    assert ignored[0] == "*" and all((ROOT / name).exists() for name in let_through)
    copied = {word for line in re.findall(r"^COPY (?!--from)(.+)$", text, re.M) for word in line.split()[:-1]}
    assert copied == let_through
    stages = re.findall(r"^FROM \S+ AS (\w+)$", text, re.M)
    assert {"cpu", "cuda"} <= set(stages) and stages[-1] == "cpu"
    for part in re.split(r"^FROM ", text, flags=re.M):
        if " AS cpu" in part or " AS cuda" in part:
            assert re.findall(r"^USER (.+)$", part, re.M) == ["10001"]
    for words in re.findall(r"^CMD \[\"serve\", (.+)\]$", text, re.M):
        assert parse(ServeConfig, re.findall(r'"(.*?)"', words), command="serve").server.host == "0.0.0.0"


# ---- the pages


def shell_lines(page: Path) -> list[str]:
    blocks = re.findall(r"```(?:bash|ini)\n(.*?)```", page.read_text(), flags=re.S)
    return "\n".join(blocks).replace("\\\n", " ").splitlines()


@pytest.mark.parametrize("name", ["install.md", "deploying.md", "models.md"])
def test_what_a_page_says_to_type_is_understood(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INGLE_HUB", "huggingface")  # which --hub changes
    page = ROOT / "docs" / name
    found = 0
    for line in shell_lines(page):
        words = [word.strip("\"'") for word in line.partition(" #")[0].split()]
        if "serve" in words and "ingle" in line:
            parse(ServeConfig, words[words.index("serve") + 1 :], command="serve")
            found += 1
        if "service" in words and (action := words[words.index("service") + 1]) in ("print", "install"):
            parse(ServiceOptions, words[words.index(action) + 1 :], command=f"service {action}")
            found += 1
        if words[:1] == ["ingle"] and words[1] in OTHERS:
            parse(OTHERS[words[1]], words[2:], command=words[1])
            found += 1
        if words[:1] == ["make"] and shutil.which("make"):
            assert would_run(*re.findall(r"\w+=\S+|\b[a-z]+\b", " ".join(words[1:]).partition("ARGS")[0]))
            found += 1
    assert found >= 3
    named = set(re.findall(r"`(--[a-z][\w-]+)", page.read_text())) - {"--build-arg", "--config"}
    assert named <= FLAGS


OTHERS = {"pull": Pull, "list": List, "rm": Remove, "search": Search, "catalog": Catalog, "show": Show, "plan": Plan}


def _flags() -> set[str]:
    """Of these commands, out of their configuration."""
    pending, flags = [ServeConfig, ServiceOptions, *OTHERS.values()], set()
    while pending:
        for name, kind in get_type_hints(pending.pop()).items():
            if dataclasses.is_dataclass(kind):
                pending.append(kind)  # type: ignore[arg-type]
            else:
                flags.add(f"--{name.replace('_', '-')}")
    return flags


FLAGS = _flags()
