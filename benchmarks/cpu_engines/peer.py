"""llama.cpp as one release of llama-cpp-python carries it, built for a target: its libraries and its server."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ingle.kernels.cpu import targets

PACKAGE, VERSION = "llama-cpp-python", "0.3.36"
CACHE = Path.home() / ".cache" / "ingle" / f"llamacpp-{VERSION}"
INSTRUCTIONS = {
    "native": {"GGML_NATIVE": "ON"},
    "x86-64-v3": {
        "GGML_NATIVE": "OFF",
        **dict.fromkeys(("GGML_AVX", "GGML_AVX2", "GGML_FMA", "GGML_F16C", "GGML_BMI2"), "ON"),
        **dict.fromkeys(
            ("GGML_AVX_VNNI", "GGML_AVX512", "GGML_AVX512_VBMI", "GGML_AVX512_VNNI", "GGML_AVX512_BF16"), "OFF"
        ),
    },
}
"""What CMake is told, by target."""
_PARTS = {
    "CMAKE_BUILD_TYPE": "Release",
    "BUILD_SHARED_LIBS": "ON",
    "CMAKE_BUILD_WITH_INSTALL_RPATH": "ON",
    "CMAKE_INSTALL_RPATH": "$ORIGIN",
    **dict.fromkeys(("LLAMA_BUILD_COMMON", "LLAMA_BUILD_TOOLS", "LLAMA_BUILD_SERVER"), "ON"),
    **dict.fromkeys(
        ("LLAMA_BUILD_TESTS", "LLAMA_BUILD_EXAMPLES", "LLAMA_BUILD_APP", "LLAMA_BUILD_UI", "LLAMA_USE_PREBUILT_UI",
         "LLAMA_OPENSSL"),
        "OFF",
    ),
}  # fmt: skip
"""The server, without its web page, TLS and whatever else would be downloaded."""


@dataclass(frozen=True)
class Peer:
    python: Path
    """Has llama-cpp-python's bindings, which load the libraries of $LLAMA_CPP_LIB_PATH."""
    folder: Path
    """llama.cpp's libraries and `llama-server`, of the target's instructions all."""


def install(target: str, say: Callable[[str], None]) -> Peer:
    """Builds the peer if it is not there yet: some minutes."""
    python = CACHE / "venv" / "bin" / "python"
    folder = CACHE / (f"native-{_processor()}" if target == "native" else target)
    if not folder.is_dir():
        say(f"building llama.cpp for {target} in {CACHE}, which takes minutes")
        _bindings(python)
        _build(python, INSTRUCTIONS[target], folder)
    return Peer(python, folder)


def _processor() -> str:
    """What is built natively is not for other processors that share this folder."""
    return hashlib.blake2b(" ".join(sorted(targets.features())).encode(), digest_size=4).hexdigest()


def _bindings(python: Path) -> None:
    """Those alone: a virtual environment for all targets."""
    done = CACHE / "source"
    if done.is_dir():
        return
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(python.parents[1])], check=True)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    download = [*pip, "download", "-q", "--no-deps", "--no-binary", PACKAGE, "-d", str(CACHE), f"{PACKAGE}=={VERSION}"]
    subprocess.run(download, check=True)
    (archive,) = CACHE.glob("*.tar.gz")
    none = {**os.environ, "CMAKE_ARGS": "-DLLAMA_BUILD=OFF -DLLAVA_BUILD=OFF"}
    subprocess.run([*pip, "install", "-q", str(archive), "cmake", "ninja"], check=True, env=none)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        with tarfile.open(archive) as packed:
            packed.extractall(folder, filter="data")
        (Path(folder) / archive.name.removesuffix(".tar.gz")).rename(done)


def _build(python: Path, instructions: dict[str, str], folder: Path) -> None:
    """All targets share a build folder: only what depends on instructions is compiled again."""
    build, tools = CACHE / "build", python.parent
    settings = [f"-D{name}={value}" for name, value in {**_PARTS, **instructions}.items()]
    source = CACHE / "source" / "vendor" / "llama.cpp"
    environment = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    configure = ["cmake", "-G", "Ninja", "-S", str(source), "-B", str(build), *settings]
    subprocess.run(configure, check=True, env=environment, stdout=subprocess.DEVNULL)
    compile = ["nice", "cmake", "--build", str(build), "--target", "llama-server", "--parallel", str(os.cpu_count())]
    subprocess.run(compile, check=True, env=environment)
    made = folder.with_suffix(".partial")
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    for file in (build / "bin" / "llama-server", *(build / "bin").glob("*.so*")):
        shutil.copy2(file, made, follow_symlinks=False)
    made.rename(folder)
