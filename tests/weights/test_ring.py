"""Streaming from files through a few buffers; on a CPU the same code runs, without pinned memory and streams."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ingle.errors import ModelError
from ingle.model.load import load_decoder
from ingle.model.registry import decoder_config
from ingle.weights import ring
from ingle.weights.formats import PlainFormat
from ingle.weights.hf_config import read_config
from ingle.weights.ring import Ring
from ingle.weights.safetensors_source import SafetensorsSource
from ingle.weights.source import in_stack
from tests.support import save_checkpoint

CPU = torch.device("cpu")
FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fewer than there are threads, and no whole number of any matrix's rows."""
    monkeypatch.setattr(Ring.__init__, "__kwdefaults__", {"num_buffers": 3, "buffer_bytes": 1000})
    yield


def streaming(folder: Path) -> SafetensorsSource:
    return SafetensorsSource(folder, streamed=("cpu",))


@pytest.mark.parametrize("stored", FLOATS, ids=str)
@pytest.mark.parametrize("wanted", FLOATS, ids=str)
def test_every_type_from_and_to(stored: torch.dtype, wanted: torch.dtype, tmp_path: Path) -> None:
    values = torch.randn(37, 29).to(stored)
    save_file({"before": torch.ones(3), "w": values}, tmp_path / "model.safetensors")
    out = torch.zeros(40, 29, dtype=wanted)
    streaming(tmp_path).load_into("w", out[2:39])
    assert torch.equal(out[2:39], values.to(wanted))
    assert out[:2].count_nonzero() == out[39:].count_nonzero() == 0


def test_one_of_a_stack_a_vector_and_what_is_not_contiguous(tmp_path: Path) -> None:
    stack, vector = torch.randn(5, 30, 20), torch.randn(1)
    save_file({"stack": stack, "vector": vector}, tmp_path / "model.safetensors")
    source = streaming(tmp_path)
    one, turned, short = torch.empty(30, 20), torch.empty(20, 30).T, torch.empty(1)
    for out in (one, turned):
        source.load_into(in_stack("stack", 3, 5), out)
        assert torch.equal(out, stack[3])
    source.load_into("vector", short)
    assert torch.equal(short, vector)


def test_many_threads_share_few_buffers(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.randn(1 + 97 * i).to(FLOATS[i % 4]) for i in range(60)}
    save_file(tensors, tmp_path / "model.safetensors")
    source, outs = streaming(tmp_path), {name: torch.empty(len(values)) for name, values in tensors.items()}
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda name: source.load_into(name, outs[name]), tensors))
    for name, values in tensors.items():
        assert torch.equal(outs[name], values.float()), name


def test_a_buffer_is_used_again_only_once_it_is_copied(tmp_path: Path) -> None:
    """As far as a CPU can show it: with events that say when they are recorded and waited for."""
    events: list[str] = []

    class Event:
        def synchronize(self) -> None:
            events.append("wait")

        def record(self, stream: object) -> None:
            events.append("record")

    buffers = Ring(CPU, num_buffers=2, buffer_bytes=64)
    for _ in range(2):
        buffers._free.put(ring._Buffer(buffers._free.get().memory, Event()))  # type: ignore[arg-type]
    values = torch.randn(80)
    (tmp_path / "f").write_bytes(values.numpy().tobytes())
    with (tmp_path / "f").open("rb") as file:
        out = torch.empty(80)
        buffers.load(file.fileno(), 0, torch.float32, out)
    assert torch.equal(out, values)
    assert events == ["wait", "record"] * 5


def test_a_file_cut_short_after_it_was_checked(tmp_path: Path) -> None:
    path, whole, cut = tmp_path / "model.safetensors", torch.randn(300), torch.randn(3000)
    save_file({"a": whole, "b": cut}, path)
    source = streaming(tmp_path)
    for name, size in (("a", 300), ("b", 3000)):
        source.load_into(name, torch.empty(size))
    os.truncate(path, path.stat().st_size - 2000)
    for _ in range(5):  # more often than there are buffers: each is given back
        with pytest.raises(
            ModelError, match=r"model\.safetensors: tensor b cannot be read: the file ends at byte \d+, within it"
        ):
            source.load_into("b", torch.empty(3000))
    out = torch.empty(300)
    source.load_into("a", out)
    assert torch.equal(out, whole)


def test_an_error_in_one_of_the_loading_threads_reaches_the_caller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_checkpoint(tmp_path)
    real, failing = os.preadv, iter(range(30))

    def preadv(*arguments: object) -> int:
        if next(failing, None) is None:
            raise OSError(5, "Input/output error")
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(ModelError, match=r"model\.safetensors: tensor .*weight cannot be read: .*Input/output error"):
        parameters(folder, streaming(folder), CPU, torch.float32)


def test_reads_that_give_less_than_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values, real = torch.randn(700), os.preadv
    save_file({"w": values}, tmp_path / "model.safetensors")
    monkeypatch.setattr(os, "preadv", lambda file, views, start: real(file, [views[0][:77]], start))
    out = torch.empty(700)
    streaming(tmp_path).load_into("w", out)
    assert torch.equal(out, values)


def parameters(folder: Path, source: SafetensorsSource, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    config = decoder_config(read_config(folder))
    decoder = load_decoder(
        config, source, matrices=PlainFormat(dtype, device), dtype=dtype, device=device, max_model_len=64
    )
    parts = decoder.parameters()
    return [part if isinstance(part, torch.Tensor) else part.plain for part in parts]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model_type", ["qwen2", "gemma3_text", "qwen3_moe"])
def test_a_decoder_is_what_it_is_without(model_type: str, dtype: torch.dtype, device: str, tmp_path: Path) -> None:
    """Stacked projections, biases, norms that are changed once they are read, experts: bit for bit."""
    folder = save_checkpoint(tmp_path, model_type, head_dim=16)
    expected = parameters(folder, SafetensorsSource(folder, streamed=()), CPU, dtype)
    streamed = parameters(folder, SafetensorsSource(folder, streamed=(device,)), torch.device(device), dtype)
    for ours, theirs in zip(streamed, expected, strict=True):
        assert torch.equal(ours.cpu(), theirs)
