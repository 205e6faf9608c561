"""All that can be known to be wrong before kernels or weights are touched, told at once.

A start goes through the same functions (`open_model`), one after the other, and each thing that does not depend on
another that failed is looked for.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ingle.config import EngineConfig, TextConfig
from ingle.description import Finding, Need
from ingle.engine import native_build
from ingle.engine.memory import DeviceMemory, host_memory, memory_of
from ingle.engine.ranks import layout_of, share_of
from ingle.engine.startup import ModelFiles, OpenModel
from ingle.errors import Collected, ConfigError, IngleError, errors_in
from ingle.kv import pages_held
from ingle.parallel.layout import Layout
from ingle.text.recommended import NOTHING, Recommended

if TYPE_CHECKING:
    from ingle.text.load import TextSide

_GPU_DRIVERS = ("/dev/nvidiactl", "/dev/nvmap", "/dev/dxg", "/dev/kfd")
"""Device files of NVIDIA's drivers (nvmap: Jetson's), of Windows' for its Linux subsystem, and of AMD's."""

DeviceType = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Report:
    """What a start with these configurations would meet."""

    findings: tuple[Finding, ...]
    need: Need | None
    """None where not enough of the model can be read to tell."""
    text: TextSide | None
    """None where it is refused."""

    @property
    def runs(self) -> bool:
        return not any(finding.refused for finding in self.findings)


def check_model(config: EngineConfig, text: TextConfig, path: Path, recommended: Recommended = NOTHING) -> Report:
    """Reads configuration, headers, tokenizer and template of the model at `path`; nothing of it is loaded."""
    found, notices = Collected(), list[str]()
    side = _text_side(text, path, recommended, found, notices)
    device = _device_of(config, found)
    with contextlib.ExitStack() as stack:
        opened = _opened(config, path, device, found)
        need = None
        if opened is not None:
            stack.enter_context(contextlib.closing(opened))
            notices += opened.notices
            if opened.fallback is not None:
                notices += [opened.fallback.notice, *opened.fallback.unknown_keys]
            need = _need(config, opened, device)
    refusals = [Finding(True, error.what, error.alternative) for error in found.errors]
    return Report((*refusals, *(Finding(False, notice) for notice in notices)), need, side)


def open_model(config: EngineConfig, path: Path) -> tuple[DeviceType, OpenModel]:
    """What loading goes on with, and on which device. Raises `ModelError` and `ConfigError`, all at once."""
    found = Collected()
    device = _device_of(config, found)
    opened = _opened(config, path, device, found)
    if found.errors and opened is not None:
        opened.close()
    found.raise_any()
    assert device is not None and opened is not None, "nothing was refused"
    return device, opened


@contextlib.contextmanager
def before_loading(config: EngineConfig, path: Path) -> Iterator[None]:
    """Around the reading of a model's text side: what is wrong there is raised together with what its engine meets."""
    try:
        yield
    except IngleError as error:
        found = Collected()
        for inner in errors_in(error):
            found.add(inner)
        opened = _opened(config, path, _device_of(config, found), found)
        if opened is not None:
            opened.close()
        if len(found.errors) == 1:
            raise
        found.raise_any()


def pick_device(config: EngineConfig) -> DeviceType:
    """Raises `ConfigError` when a GPU is asked for and PyTorch sees none, or is not there to ask."""
    wanted = config.parallel.device
    if wanted == "cpu" or (wanted == "auto" and not _gpu_driver_is_there()):
        return "cpu"
    if importlib.util.find_spec("torch") is None:
        raise ConfigError(
            "there may be a GPU here, and PyTorch, which runs it, is not installed: `make setup` in ingle's source "
            "tree or `pip install torch transformers` brings it; --device cpu does without"
        )
    if wanted == "cuda" and not _gpu_driver_is_there() and not _cuda_library_loads():  # asking PyTorch takes its time
        raise ConfigError(
            "--device cuda: there is no driver of a GPU here", alternative="give --device cpu, or install the driver"
        )
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if wanted == "cuda":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        where = "here" if visible is None else f"here (CUDA_VISIBLE_DEVICES={visible})"
        raise ConfigError(
            f"--device cuda: PyTorch sees no GPU {where}; give --device cpu, or check the driver with nvidia-smi"
        )
    return "cpu"


def _gpu_driver_is_there() -> bool:
    """Without one PyTorch sees no GPU, and need not be asked."""
    return sys.platform not in ("linux", "darwin") or any(Path(file).exists() for file in _GPU_DRIVERS)


def _cuda_library_loads() -> bool:
    """Of a driver whose device files are elsewhere."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def _device_of(config: EngineConfig, found: Collected) -> DeviceType | None:
    with found.apart():
        return pick_device(config)
    return None


def _opened(config: EngineConfig, path: Path, device: DeviceType | None, found: Collected) -> OpenModel | None:
    """The model, as far as what is found lets it be opened. Memory comes last: it needs all that is before."""
    num_before = len(found.errors)
    files = ModelFiles.looked_at(config, path, found)
    if files is None:
        return None
    if not all(isinstance(error, ConfigError) for error in found.errors[num_before:]):
        # The model itself is refused, and so would its tensors be.
        with found.apart():
            files.open(config).close()
        return None
    opened = None
    with found.apart():
        opened = files.opened(config)
    if files.decoder is None and device is not None:
        with found.apart():
            from ingle.engine.torch_build import fallback_plan

            plan = fallback_plan(config, files)
            opened = None if opened is None else replace(opened, fallback=plan)
    if opened is not None and device is not None and len(found.errors) == num_before:
        with found.apart():
            _check_memory(config, opened, device)
    return opened


def _is_native(config: EngineConfig, device: DeviceType, layout: Layout) -> bool:
    return device == "cpu" and config.parallel.cpu_kernels != "torch" and layout.num_ranks == 1


def _check_memory(config: EngineConfig, opened: OpenModel, device: DeviceType) -> None:
    layout = layout_of(config, device, opened)
    opened = share_of(config, opened, layout.place(0))
    if opened.decoder is not None and _is_native(config, device, layout):
        native_build.plan(config, opened, opened.decoder, native_build.numerics(config))
    else:
        from ingle.engine.torch_build import TorchRunner

        TorchRunner(config, device, our_kernels=False).check(opened)


def _need(config: EngineConfig, opened: OpenModel, device: DeviceType | None) -> Need | None:
    decoder, free = opened.decoder, DeviceMemory(None)
    device = device or "cpu"
    if decoder is not None and _is_native(config, device, Layout()):
        numerics = native_build.numerics(config)
    else:
        from ingle.engine.torch_build import TorchRunner

        numerics = TorchRunner(config, device, our_kernels=False).numerics(opened)
    if device == "cpu":
        free = host_memory()
    else:
        import torch

        free = memory_of(torch.device("cuda", 0))
    if decoder is None:
        weights = sum(opened.stored_types.values()) * numerics.float_itemsize
        return Need(device, weights, 0, 0, free.free)
    context, page_size = config.max_model_len or decoder.max_position_embeddings, config.cache.block_size
    kv, chunk = decoder.kv_spec(numerics.kv_dtype), config.max_num_batched_tokens or 512
    kv_bytes = pages_held(kv.windows, context, page_size, chunk) * kv.page_bytes(page_size)
    return Need(device, numerics.weight_bytes(decoder, opened.stored_types), kv_bytes, context, free.free)


def _text_side(
    text: TextConfig, path: Path, recommended: Recommended, found: Collected, notices: list[str]
) -> TextSide | None:
    from ingle.text.load import load_text_side, template_fault

    with found.apart():
        side = load_text_side(path, text, recommended)
        if side.reranker is not None:
            notices.append("it is a reranker: it answers /v1/rerank and /v1/score")
        if side.pooling.declared:
            notices.append(f"it is an embedding model (pooling: {side.pooling.kind}): it answers /v1/embeddings alone")
        elif side.chat_template is None:
            notices.append("the model has no chat template, so /v1/chat/completions needs --chat-template")
        elif (fault := template_fault(side.chat_template)) is not None:
            notices.append(fault)
        return side
    return None
