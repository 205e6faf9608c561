"""A wheel brings the CPU's kernels: who installs it needs no compiler."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

from ingle.kernels.cpu import compile, targets
from tests.support import save_checkpoint

ROOT = Path(__file__).parents[2]


def test_what_builds_the_package_needs_nothing_else() -> None:
    """`setup.py` imports it where only the standard library and setuptools are."""
    script = f"import sys; sys.path.insert(0, {str(ROOT / 'src')!r}); import ingle.kernels.cpu.compile"
    subprocess.run([sys.executable, "-I", "-S", "-c", script], check=True)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a package is built from."""
    if int(version("setuptools").partition(".")[0]) < 77:  # not imported here: it replaces distutils
        pytest.skip("needs setuptools 77")
    folder = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    return folder


def pip(*arguments: str | Path, **environment: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, **environment})


def wheel(source: Path, folder: Path, **environment: str) -> Path:
    pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder, source, **environment)
    (made,) = folder.iterdir()
    return made


SCRIPT = """
import json, sys
from pathlib import Path
import ingle
from ingle.config import EngineConfig
from ingle.engine.build import build_engine
checkpoint = sys.argv[1]
_, info = build_engine(EngineConfig.of(checkpoint, device="cpu", kv_cache_memory="8MiB"), Path(checkpoint))
print(json.dumps([info.kernels, info.notices, ingle.__file__]))
"""


def start(package: Path, checkpoint: Path, home: Path, **environment: str) -> tuple[str, str]:
    """What an engine of an installed package says of its kernels, where there is no compiler."""
    empty = {"PATH": str(home), "PYTHONPATH": str(package), "INGLE_HOME": str(home), **environment}
    command = [sys.executable, "-c", SCRIPT, str(checkpoint)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=empty)
    kernels, notices, file = json.loads(done.stdout)
    assert file.startswith(str(package))
    return kernels, "; ".join(notices)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="packages with kernels are for Linux")
def test_a_wheel_runs_its_kernels_where_no_compiler_is(source: Path, tmp_path: Path) -> None:
    try:
        compile.find_compiler()
    except compile.CompileError as error:
        pytest.skip(str(error))
    made = wheel(source, tmp_path / "wheels")
    assert made.name.endswith(f"-py3-none-linux_{targets.machine()}.whl")
    brought = {Path(name).stem for name in zipfile.ZipFile(made).namelist() if name.endswith(".so")}
    assert {name.rsplit("-", 1)[0] for name in brought} == {
        target.name for target in targets.TARGETS.values() if target.machine == targets.machine()
    }
    package, home = tmp_path / "package", tmp_path / "home"
    pip("install", "--no-deps", "--no-index", "--target", package, made)
    home.mkdir()
    checkpoint = save_checkpoint(tmp_path / "checkpoint")
    kernels, notices = start(package, checkpoint, home)
    assert notices == "" and not list(home.iterdir())
    compiled_here = start(ROOT / "src", checkpoint, tmp_path / "other", PATH=os.environ["PATH"])
    assert kernels == compiled_here[0] and kernels.startswith("ingle's for ")
    for target in targets.suitable(targets.features()):
        assert start(package, checkpoint, home, INGLE_CPU_TARGET=target.name)[0].startswith("ingle's for ")
    assert "no C++ compiler" in start(package, checkpoint, home, INGLE_CPU_TARGET="native")[1]
    with next(package.glob("ingle/kernels/cpu/csrc/*.cpp")).open("a") as changed:
        changed.write("// other sources than they were compiled from\n")
    assert "no C++ compiler" in start(package, checkpoint, home)[1]


@pytest.mark.slow
def test_a_wheel_that_is_built_without_a_compiler(source: Path, tmp_path: Path) -> None:
    made = wheel(source, tmp_path / "wheels", CXX="no-such-compiler")
    assert made.name.endswith("-py3-none-any.whl")
    assert not any(name.endswith(".so") for name in zipfile.ZipFile(made).namelist())


def test_an_editable_install_compiles_nothing(source: Path, tmp_path: Path) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\nexit 1\n")
    compiler.chmod(0o755)
    script = f"from setuptools import build_meta; print(build_meta.build_editable({str(tmp_path)!r}))"
    environment = {**os.environ, "CXX": str(compiler)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, check=True, cwd=source, env=environment, stdout=subprocess.PIPE, text=True)
    assert done.stdout.splitlines()[-1].endswith("-py3-none-any.whl")
    assert not (tmp_path / "ran").exists()
