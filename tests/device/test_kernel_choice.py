"""Which kernels run is measured once for a machine and a model's shapes, and the slower ones do not run."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from ingle.config import EngineConfig
from ingle.device import kernel_choice as choice
from ingle.engine.build import build_engine
from ingle.kernels.cpu import compile, library
from ingle.model.architecture import DecoderConfig
from ingle.model.registry import decoder_config
from ingle.weights.code_types import CODE_TYPES
from ingle.weights.hf_config import read_config
from tests.support import greedy, random_prompt, save_checkpoint


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home, for a process that has started no kernels yet; those of the real one are used."""
    try:
        built = compile.library()
    except compile.CompileError as error:
        pytest.skip(str(error))
    monkeypatch.setenv("INGLE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(library, "_loaded", None)
    monkeypatch.setattr(compile, "library", lambda report=None: built)
    monkeypatch.setattr(choice, "_LEAST_ELEMENTS", 0)
    return tmp_path / "home"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def decoder(checkpoint: Path) -> DecoderConfig:
    return decoder_config(read_config(checkpoint, gguf=None, rope_scaling=None, rope_theta=None))


def test_measured_once_and_kept(home: Path, decoder: DecoderConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    first = choice.choose(decoder, CODE_TYPES["Q4_1"], compile.library(), 2)
    assert first.failure is None and first.ratio is not None and first.ratio > 0
    assert first.ours == (first.ratio >= 1)
    monkeypatch.setattr(choice, "_ask", lambda question: pytest.fail("it is known"))
    assert choice.choose(decoder, CODE_TYPES["Q4_1"], compile.library(), 2) == first
    monkeypatch.setattr(choice, "_ask", lambda question: 0.5)
    other = choice.choose(decoder, CODE_TYPES["Q8_0"], compile.library(), 2)
    assert other == choice.Choice(ours=False, ratio=0.5)


def test_the_slower_do_not_run(home: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_ask", lambda question: 0.25)
    engine, info = build_engine(EngineConfig.of(str(checkpoint), device="cpu", kv_cache_memory="8MiB"), checkpoint)
    assert not library.started() and info.kernels == "PyTorch's"
    assert any("4.0 times as fast on this machine" in notice for notice in info.notices)
    assert len(greedy(engine, random_prompt(0, 20), 8)) == 8


def test_what_could_not_be_measured_is_said(home: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(question: bytes) -> float:
        raise subprocess.CalledProcessError(1, "python", stderr=b"Traceback\nMemoryError: none left")

    monkeypatch.setattr(choice, "_ask", fails)
    _, info = build_engine(EngineConfig.of(str(checkpoint), device="cpu", kv_cache_memory="8MiB"), checkpoint)
    assert library.started() and info.kernels.startswith("ingle's")
    assert any("were not compared with PyTorch's: MemoryError: none left" in notice for notice in info.notices)


def test_small_models_need_no_measurement(home: Path, decoder: DecoderConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_LEAST_ELEMENTS", 1 << 24)
    monkeypatch.setattr(choice, "_ask", lambda question: pytest.fail("it spends its time elsewhere"))
    assert choice.choose(decoder, CODE_TYPES["Q4_1"], compile.library(), 2) == choice.Choice(ours=True)
