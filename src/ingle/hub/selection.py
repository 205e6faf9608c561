"""Which files of a repository ingle needs, and which repositories it needs nothing of."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from ingle.errors import ModelError
from ingle.hub.listing import Listing, RemoteFile
from ingle.hub.names import quote
from ingle.hub.quantizations import Variant, take, variants
from ingle.weights.checkpoint_files import named_by_quantizers

_SMALL = re.compile(
    r"[^/]+\.(json|txt|model|jinja|tiktoken|py|md)|(LICENSE|LICENCE|NOTICE|USE_POLICY|COPYING)[^/]*"
    r"|additional_chat_templates/[^/]+\.jinja|1_Pooling/config\.json",
    re.IGNORECASE,
)
"""Configuration, tokenizer, templates, terms."""
_LEFT_OUT = re.compile(
    r"\.gitattributes|adapter_.*|consolidated.*|trainer_state\.json|training_args.*|.*results?\.json"
    r"|(flax|tf|rust)_.*|.*\.onnx.*|(?!readme\.md).*\.md",
    re.IGNORECASE,
)
_MAX_SMALL_BYTES = 256 << 20
_SAFETENSORS, _TORCH = "model.safetensors", "pytorch_model.bin"
_TOKENIZERS = re.compile(r"tokenizer\.(json|model)|tokenizer\.model\.v\d|tekken\.json|vocab\.(json|txt)|.*\.tiktoken|"
                         r"spiece\.model|sentencepiece\.bpe\.model", re.IGNORECASE)  # fmt: skip
_VECTORS, _RANKS = "turns texts into vectors", "ranks texts"
_OTHER_TASKS = {
    "feature-extraction": _VECTORS,
    "sentence-similarity": _VECTORS,
    "text-ranking": _RANKS,
    "text-classification": "scores texts",
    "token-classification": "labels words",
    "fill-mask": "fills in words",
    "text-to-image": "makes images",
    "image-to-image": "makes images",
    "text-to-video": "makes videos",
    "text-to-speech": "makes speech",
    "text-to-audio": "makes sounds",
    "automatic-speech-recognition": "writes down speech",
    "image-classification": "names what is in images",
    "object-detection": "finds things in images",
}
_SERVES = "ingle serves models that write text, and decoders that make vectors of texts"
_INSTEAD = "take the model's original repository (.safetensors), or a GGUF of it: `ingle search NAME GGUF`"


@dataclass(frozen=True)
class Selection:
    kind: Literal["folder", "gguf"]
    files: tuple[RemoteFile, ...]
    """For a folder those to begin with, which say which weights there are; for GGUF the file or its parts."""
    note: str = ""
    """What was taken and why, where nobody asked for it by name."""
    label: str = ""
    """Of GGUF."""

    @property
    def main(self) -> RemoteFile:
        """The file by which a GGUF model goes."""
        return self.files[0]


def select(listing: Listing, choice: str | None, free: int | None = None) -> Selection:
    """What to take first. Raises `ModelError` for what ingle cannot serve, by what the hub says of it.

    `free` bytes of memory are what a GGUF file is chosen for; None is this machine's.
    """
    gguf = variants(listing.files)
    has_config = listing.find("config.json") is not None
    if choice is None and has_config and _has_weights(listing.files):
        _refuse_other_kinds(listing)
        return Selection("folder", tuple(filter(_is_small, listing.files)))
    if gguf:
        if choice is None:
            _refuse_other_kinds(listing, gguf=True)
        return _from_gguf(listing.repo, gguf, choice, free)
    if choice is not None:
        raise ModelError(f"{listing.repo} holds no .gguf file, so there is no {quote(choice)}: leave `:{choice}` out")
    raise _nothing_to_serve(listing)


def _from_gguf(where: str, gguf: Sequence[Variant], choice: str | None, free: int | None) -> Selection:
    taken = take(where, gguf, choice, free)
    note = f"taking {taken.variant.label} of {where}, {taken.why}" if taken.why else ""
    return Selection("gguf", taken.variant.files, note, taken.variant.label)


def folder_weights(files: Iterable[RemoteFile]) -> dict[str, tuple[RemoteFile, ...]]:
    """The weights of each format that a folder of transformers may have them in."""
    listed = list(files)
    found = {"safetensors": _of_kind(listed, _SAFETENSORS), "PyTorch (.bin)": _of_kind(listed, _TORCH)}
    return {name: weights for name, weights in found.items() if weights}


def filtered(files: Iterable[RemoteFile], include: Sequence[str], exclude: Sequence[str]) -> tuple[RemoteFile, ...]:
    """By shell patterns over whole paths, as huggingface-cli has them."""
    return tuple(
        file
        for file in files
        if (not include or any(fnmatchcase(file.path, _pattern(each)) for each in include))
        and not any(fnmatchcase(file.path, _pattern(each)) for each in exclude)
    )


def _pattern(text: str) -> str:
    return f"{text}*" if text.endswith("/") else text


def weight_files(listing: Listing, folder: Path) -> tuple[RemoteFile, ...]:
    """The weights, once the index lies in `folder`: safetensors if there are any, else .bin.

    Raises `ModelError` for an index that names what the repository does not hold.
    """
    for single in (_SAFETENSORS, _TORCH):
        names = claimed(folder / f"{single}.index.json")
        if names:
            found = {file.path: file for file in listing.files}
            absent = [name for name in names if name not in found]
            if not absent:
                return tuple(found[name] for name in names)
            if listing.find(single) is None:
                raise ModelError(
                    f"{listing.repo} is not whole: its index lists {quote(absent[0])}, which is not there",
                    alternative="take another revision, or tell its authors",
                )
        if files := _of_kind(listing.files, single):
            return files
    raise _nothing_to_serve(listing)


def claimed(index: Path) -> list[str]:
    """The weight files that an index lists; none where there is no index that can be read."""
    try:
        listed = json.loads(index.read_bytes())["weight_map"].values()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []  # whoever loads the model says what is wrong with it
    return sorted({name for name in listed if isinstance(name, str)})


def is_whole(folder: Path) -> bool:
    """Whether all that a model needs lies in a folder, whoever has put it there."""
    if not (folder / "config.json").is_file():
        return False
    names = {path.name for path in folder.iterdir() if path.is_file()}
    if not any(map(_TOKENIZERS.fullmatch, names)):
        return False
    for single in (_SAFETENSORS, _TORCH):
        if listed := claimed(folder / f"{single}.index.json"):
            if names.issuperset(listed):
                return True
        elif single in names or _are_all_shards(names, single):
            return True
    return len(named_by_quantizers(names)) == 1


def _are_all_shards(names: set[str], single: str) -> bool:
    found = [match for name in names if (match := _shard(single).fullmatch(name))]
    return bool(found) and len(found) == int(found[0][2])


def _shard(single: str) -> re.Pattern[str]:
    stem, _, suffix = single.rpartition(".")
    return re.compile(rf"{stem}-(\d{{5,6}})-of-(\d{{5,6}})\.{suffix}")


def _of_kind(files: Iterable[RemoteFile], single: str) -> tuple[RemoteFile, ...]:
    """The shards, or the single file."""
    shards = tuple(file for file in files if _shard(single).fullmatch(file.path))
    alone = tuple(file for file in files if file.path == single)
    if alone or shards or single != _SAFETENSORS:
        return alone or shards
    by_quantizers = named_by_quantizers(file.path for file in files)
    return tuple(file for file in files if [file.path] == by_quantizers)


def _has_weights(files: Iterable[RemoteFile]) -> bool:
    listed = {file.path for file in files}
    indexed = any(f"{single}.index.json" in listed for single in (_SAFETENSORS, _TORCH))
    return indexed or any(_of_kind(files, single) for single in (_SAFETENSORS, _TORCH))


def _is_small(file: RemoteFile) -> bool:
    return (
        _SMALL.fullmatch(file.path) is not None
        and _LEFT_OUT.fullmatch(file.path) is None
        and (file.size or 0) <= _MAX_SMALL_BYTES
    )


def refuse_config(where: Path, config: dict[str, Any], folder: Path | None = None) -> None:
    """Raises `ModelError` for a model that its config.json, and what lies beside it, show to be of a kind that ingle
    does not run.

    `where` is its folder, or the name of its repository, whose small files are in `folder`.
    """
    from ingle.model.kinds import check_kind, writes_text  # not every start waits for these
    from ingle.model.registry import check_quantization, is_native

    check_kind(where, config, folder)
    check_quantization(where, config)
    if config.get("is_encoder_decoder") is True:
        raise ModelError(f"{where} is an encoder with a decoder, which ingle does not run", alternative=_SERVES)
    if not is_native(config) and not writes_text(config):
        kind = quote(str(next(iter(config.get("architectures") or ()), config.get("model_type"))))
        raise ModelError(f"{where} holds {kind}, which is no model that ingle runs", alternative=_SERVES)


def _refuse_other_kinds(listing: Listing, *, gguf: bool = False) -> None:
    """By its tags and by what its files are called.

    Whether a decoder makes vectors, and how, its modules.json or the header of its GGUF file says.
    """
    names = {file.path for file in listing.files}
    tags = {tag.lower() for tag in listing.tags}
    if "model_index.json" in names:
        raise ModelError(f"{listing.repo} is a pipeline of diffusers, which makes images", alternative=_SERVES)
    pools = "1_Pooling/config.json" in names or "sentence-transformers" in tags
    task = next((_OTHER_TASKS[tag] for tag in sorted(tags) if tag in _OTHER_TASKS), None)
    if pools or (task is not None and "text-generation" not in tags):
        does = task or _VECTORS
        if does != _RANKS and not (does == _VECTORS and (gguf or "modules.json" in names)):
            raise ModelError(f"{listing.repo} {does} and writes none, by its description", alternative=_SERVES)
    packed = next((name for name in ("exl2", "exl3", "exllamav2", "exllamav3") if name in tags), None)
    if packed is not None:
        raise ModelError(
            f"{listing.repo} is quantized for ExLlama ({packed}), which ingle does not read",
            alternative=_original(listing),
        )


def _nothing_to_serve(listing: Listing) -> ModelError:
    names = [file.path for file in listing.files]
    suffixes = {name.rpartition(".")[2].lower() for name in names}
    if "adapter_config.json" in names:
        base = f" for {listing.base_model}" if listing.base_model else ""
        return ModelError(
            f"{listing.repo} is an adapter (LoRA){base}, without the model that it changes",
            alternative="merge both, with PEFT's merge_and_unload(), and give the folder of the merged model",
        )
    try:
        _refuse_other_kinds(listing)
    except ModelError as error:
        return error
    if "onnx" in suffixes:
        what = "holds ONNX files, which ingle does not run"
    elif "params.json" in names or any(name.rpartition("/")[2].startswith("consolidated") for name in names):
        what = "is in its makers' own format (params.json, consolidated…), which ingle does not read"
    elif {"h5", "msgpack", "tflite", "mlmodel", "mlpackage"} & suffixes:
        what = "holds weights for TensorFlow, Flax or Core ML, which ingle does not read"
    elif {"safetensors", "bin", "pt", "pth"} & suffixes:
        what = "has weights, but not as a model of transformers (config.json with model.safetensors)"
    else:
        what = f"holds no model: {len(names)} files, none of which are weights"
    return ModelError(f"{listing.repo} {what}", alternative=_original(listing))


def _original(listing: Listing) -> str:
    if listing.base_model is None or listing.base_model == listing.repo:
        return _INSTEAD
    return f"take {listing.base_model}, which it was made from, or a GGUF of it"
