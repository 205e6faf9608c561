"""The whole of it: a folder is read, its disk space and its output are checked, and the new folder stands at once."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from ingle.config import EngineConfig
from ingle.engine.startup import ModelFiles, Startup
from ingle.errors import ConfigError, ModelError
from ingle.facts import size
from ingle.kernels.cpu import library, threads
from ingle.model.rounding import TARGETS, plan_rounding
from ingle.quantize.entries import Entry, entries, quantization_config
from ingle.quantize.shards import write_shards
from ingle.weights.checkpoint_files import SAFETENSORS_FILES
from ingle.weights.hf_config import MAX_CONFIG_BYTES, read_json_object
from ingle.weights.quantized.rounding import Loss
from ingle.weights.quantized.rounding_source import RoundingSource
from ingle.weights.quantized.scheme import Scheme, Target
from ingle.weights.safetensors_source import SafetensorsSource
from ingle.weights.source import Files, split_name

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack", ".index.json", ".ot", ".npz")
_MAX_COPIED_BYTES = 64 << 20
"""Of a file beside the weights: tokenizers have some dozen MB."""
_ROOM = 1.01


@dataclass(frozen=True)
class Quantized:
    """What was written."""

    path: Path
    scheme: Scheme
    num_bytes: int
    """Of its tensors."""
    num_bytes_before: int
    num_matrices: int
    loss: Loss
    worst: tuple[str, Loss]
    """The matrix that lost most."""
    notices: tuple[str, ...]


def quantize(
    model: Path,
    target: Target,
    out: Path,
    *,
    group_size: int | None = None,
    symmetric: bool = False,
    report: Callable[[str], None] = lambda stage: None,
) -> Quantized:
    """The folder `model` with the matrices of its layers rounded, into `out`, which must not be there yet, or empty.

    `group_size`: weights that share a scale, 0 for a row; by default what `TARGETS` says. Raises `ConfigError` and
    `ModelError`; whatever happens, there is no folder `out` that is not whole.
    """
    scheme = scheme_for(target, group_size, symmetric=symmetric)
    _check_out(model, out)
    files = ModelFiles.read(EngineConfig.of(str(model)), model)
    if files.gguf is not None or files.quantization is not None:
        is_so = "a GGUF file" if files.quantization is None else f"quantized already: {files.quantization.name}"
        instead = "give the model's folder of floats"
        if files.gguf is not None:
            instead += ", or take a file of it that is quantized, such as Q4_K_M"
        raise ModelError(f"{model} is {is_so}", alternative=instead)
    if files.decoder is None:
        raise ModelError(
            f"{model}: model_type {files.hf_config['model_type']!r} is none of ingle's families: no other is quantized"
        )
    report("readying the kernels")
    library.start(threads.default_count())  # PyTorch rounds where they cannot be had
    opened = files.opened(EngineConfig.of(str(model)))
    with contextlib.closing(opened):
        assert opened.decoder is not None, "it was before"
        plan = plan_rounding(opened.decoder, opened.source, scheme)
        moe, stacks = opened.decoder.moe, [split_name(name)[0] for name in plan.shapes if split_name(name)[1]]
        if moe is not None and moe.expert_biases:  # which lie with their matrices, as gpt-oss has them
            stacks.append("gate_up_proj")
        if stacks:
            raise ModelError(
                f"{model}: its experts lie in one tensor ({stacks[0]}), for which compressed-tensors has no layout",
                alternative=f"--quantization {target} rounds them while they are loaded",
            )
        head = f"{opened.decoder.names.lm_head}.weight"
        tied = opened.decoder.tied_embeddings and files.hf_config["tie_word_embeddings"]
        with contextlib.closing(_files(model)) as stored, _new_folder(out) as folder:
            rounding = RoundingSource(stored, plan)
            made = list(entries(stored, rounding, left_out=(head,) if tied else ()))
            return _written(model, stored, rounding, made, folder, out, report)


def _files(model: Path) -> Files:
    if SAFETENSORS_FILES.are_in(model):
        return SafetensorsSource(model)
    from ingle.weights.tensor_sources import TorchSource

    return TorchSource(model)


def scheme_for(target: Target, group_size: int | None, *, symmetric: bool = False) -> Scheme:
    """Raises `ConfigError` for sizes that no kernel multiplies."""
    scheme = TARGETS[target]
    if group_size is not None:
        if scheme.is_float and group_size:
            raise ConfigError(f"--group-size {group_size}: fp8 has a scale for each row", alternative="leave it out")
        if group_size and (group_size % 16 or group_size < 16 or group_size > 1 << 16):
            raise ConfigError(f"--group-size {group_size} is no multiple of 16", alternative="give 32, 64 or 128")
        scheme = replace(scheme, group_size=group_size or None)
    return replace(scheme, has_zeros=scheme.has_zeros and not symmetric)


def _check_out(model: Path, out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is there already", alternative="remove it first, or give another folder")
    parent = out.absolute().parent
    if not parent.is_dir():
        raise ConfigError(f"{out}: there is no folder {parent}")
    if model.absolute() == out.absolute() or model.resolve() in out.absolute().resolve().parents:
        raise ConfigError(f"{out} lies in the model's own folder", alternative="give one elsewhere")


def _written(
    model: Path,
    files: Files,
    source: RoundingSource,
    made: list[Entry],
    folder: Path,
    out: Path,
    report: Callable[[str], None],
) -> Quantized:
    plan = source.plan
    total, copied = sum(entry.num_bytes for entry in made), list(_beside(model))
    needed = int(total * _ROOM) + sum(file.stat().st_size for file in copied)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ConfigError(f"{out} will take {size(needed)}, and {size(free)} are free there")
    losses: dict[str, Loss] = {}
    stage = f"rounding {len(plan.shapes)} matrices to {plan.scheme.name}"
    report(stage)
    source.watch = losses.__setitem__
    write_shards(folder, made, Startup(report).counter(stage, total))
    for file in copied:
        to = folder / file.relative_to(model)
        to.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, to)
    config = read_json_object(model / "config.json", MAX_CONFIG_BYTES)
    config["quantization_config"] = quantization_config(plan, _kept(files, source))
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return Quantized(
        path=out,
        scheme=plan.scheme,
        num_bytes=total,
        num_bytes_before=sum(path.stat().st_size for path in files.paths),
        num_matrices=len(plan.shapes),
        loss=source.loss,
        worst=max(losses.items(), key=lambda item: item[1].relative),
        notices=plan.notices,
    )


def _kept(files: Files, source: RoundingSource) -> list[str]:
    """Modules with a matrix that is not rounded, embeddings aside, and the head, which may be the embedding."""
    kept = {"lm_head"}
    for name in files.names:
        module, _, suffix = name.rpartition(".")
        if suffix == "weight" and name not in source.plan.shapes and len(files.shape(name) or ()) == 2:
            kept.add(module)
    return sorted(module for module in kept if not module.endswith(("embed_tokens", ".wte")))


def _beside(model: Path) -> Iterator[Path]:
    """What a folder has beside weights and config.json: tokenizer, templates, defaults, licence; a level of folders."""
    for file in sorted([*model.glob("*"), *model.glob("*/*")]):
        hidden = any(part.startswith(".") for part in file.relative_to(model).parts)
        if hidden or not file.is_file() or file.name == "config.json" or file.name.endswith(_WEIGHTS):
            continue
        if file.stat().st_size <= _MAX_COPIED_BYTES:
            yield file


@contextlib.contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its place in the end, and is gone if anything fails.

    It is locked meanwhile: what a process left that was killed is removed by the next.
    """
    parent, prefix = out.absolute().parent, f".{out.name}.partial-"
    for left in parent.glob(f"{prefix}*"):
        with contextlib.suppress(OSError), _locked(left):
            shutil.rmtree(left)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    try:
        with _locked(folder):
            yield folder
            folder.chmod(0o777 & ~_umask())
            folder.rename(out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Raises `OSError` where another process has it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
