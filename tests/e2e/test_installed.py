"""What a stranger gets: the wheel in an empty environment, installed as the `Dockerfile` does, asked as a server is."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from ingle.kernels.cpu import compile

ROOT = Path(__file__).parents[2]


def run(*command: str | Path, cwd: Path, **options: str) -> str:
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return str(done.stdout)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the stages of the Dockerfile make it, but for PyTorch's own index."""
    try:
        compile.find_compiler()
    except compile.CompileError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("installed")
    source = folder / "source"
    source.mkdir()
    for line in re.findall(r"^COPY (?!--from)(.+)$", (ROOT / "Dockerfile").read_text(), re.M):
        for name in line.split()[:-1]:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
            else:
                shutil.copy(ROOT / name, source)
    run(sys.executable, "-m", "venv", folder / "venv", cwd=folder)
    pip = (folder / "venv" / "bin" / "python", "-m", "pip", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-deps", "--wheel-dir", folder / "wheels", ".", cwd=source)
    (wheel,) = (folder / "wheels").iterdir()
    run(*pip, "install", "-c", source / "constraints.txt", wheel, cwd=folder)
    shutil.rmtree(source)
    return folder


@pytest.mark.slow
def test_the_wheel_in_an_empty_environment(environment: Path, smollm2_gguf: Path) -> None:
    binaries, home = environment / "venv" / "bin", environment / "home"
    assert run(binaries / "python", "-m", "pip", "check", cwd=environment).strip() == "No broken requirements found."
    shown = run(binaries / "python", "-m", "pip", "show", "ingle", cwd=environment)
    assert "Author: The ingle authors" in shown
    variables = {**os.environ, "INGLE_HOME": str(home), "PYTHONPATH": "", "CXX": "none-is-needed"}
    question = "What is the capital of France?"
    ingle = [str(binaries / "ingle"), "chat", str(smollm2_gguf), "--temperature", "0"]
    chatted = subprocess.run(ingle, input=question, env=variables, cwd=environment, capture_output=True, text=True)
    assert chatted.returncode == 0 and "Paris" in chatted.stdout, chatted.stderr
    server = subprocess.Popen(
        [str(binaries / "ingle"), "serve", str(smollm2_gguf), "--port", "0", "--chat-template", "tigerbot"],
        env=variables,
        cwd=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stderr is not None
        said = []
        for line in server.stderr:
            said.append(line)
            if found := re.search(r"base URL: (\S+)", line):
                break
        assert found, "".join(said)
        assert "PyTorch's operators run" not in "".join(said)  # it brought its kernels
        body = {"messages": [{"role": "user", "content": question}], "max_tokens": 8, "temperature": 0}
        answer = httpx.post(f"{found[1]}/chat/completions", json=body, timeout=60)
        assert answer.status_code == 200 and answer.json()["choices"][0]["message"]["content"]
    finally:
        server.terminate()
        server.communicate(timeout=30)
    assert server.returncode == 0
