"""What lies at a path where a model was looked for and none is: named, and what to give instead."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NoReturn

from ingle.errors import ModelError
from ingle.hub.names import quote
from ingle.weights.pointer import refuse_adapter, refuse_pointer

GGUF_MAGIC = b"GGUF"
_HEAD_BYTES = 512
_MOST_ENTRIES = 2000
"""Of a folder, that are looked at."""
_ARCHIVES = {b"PK\x03\x04": "zip", b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"7z\xbc\xaf": "7-Zip",
             b"Rar!": "RAR", b"\x28\xb5\x2f\xfd": "Zstandard"}  # fmt: skip
_OLD_GGML = (b"lmgg", b"fmgg", b"tjgg", b"ggml", b"ggjt", b"ggla")
_TAR_AT, _TAR = 257, b"ustar"
_TORCH_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_UNFINISHED = (".incomplete", ".part", ".partial", ".crdownload", ".aria2", ".download", ".tmp")
NOT_THE_MODEL = re.compile(r"mmproj|imatrix", re.IGNORECASE)
_LATER_PART = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf$")


def is_gguf(path: Path) -> bool:
    """By its suffix, or by what it holds: Ollama's blobs have no suffix."""
    if path.suffix.lower() == ".gguf":
        return True
    try:
        with path.open("rb") as file:
            return file.read(len(GGUF_MAGIC)) == GGUF_MAGIC
    except OSError:
        return False


def refuse_file(name: str, path: Path) -> NoReturn:
    """Raises `ModelError` for a file that is no GGUF file."""
    refuse_pointer(path)
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError as error:
        raise ModelError(
            f"{name} cannot be read: {error.strerror}", alternative="give the user who runs ingle the right to read it"
        ) from error
    suffix = path.suffix.lower()
    archive = next((kind for magic, kind in _ARCHIVES.items() if head.startswith(magic)), None)
    if head[_TAR_AT:].startswith(_TAR):
        archive = "tar"
    if suffix in _UNFINISHED:
        raise ModelError(f"{name} is a download that has not ended", alternative="go on with it, or download it anew")
    if suffix == ".safetensors" or (suffix in _TORCH_SUFFIXES and not head.startswith(_OLD_GGML)):
        raise ModelError(f"{name} is one of the files of a model", alternative=_its_folder(path.parent))
    if head.startswith(_OLD_GGML):
        raise ModelError(
            f"{name} is a file of llama.cpp from before GGUF, which ingle does not read",
            alternative="download the model as .gguf, or as a Hugging Face folder",
        )
    if archive is not None:
        raise ModelError(
            f"{name} is an archive ({archive})", alternative="unpack it, and give the folder or .gguf file that it held"
        )
    if suffix == ".onnx":
        raise ModelError(f"{name} is an ONNX model, which ingle does not run", alternative=_INSTEAD)
    if path.name in ("config.json", "tokenizer.json", "model.safetensors.index.json", "pytorch_model.bin.index.json"):
        raise ModelError(f"{name} is one of the files of a model", alternative=_its_folder(path.parent))
    if re.match(rb"\s*(#[^\n]*\n\s*)*FROM\s+\S", head, re.IGNORECASE):
        raise ModelError(f"{name} is a Modelfile of Ollama", alternative="give the model that its line FROM names")
    raise ModelError(f"{name} is not a .gguf file: give a .gguf file, or the folder that holds config.json")


_INSTEAD = "give the model's folder with .safetensors files, or a .gguf file of it"


def _its_folder(folder: Path) -> str:
    if (folder / "config.json").is_file():
        return f"give their folder: {folder}"
    return f"give a folder that holds them with config.json and tokenizer.json; {folder} has no config.json"


def refuse_folder(name: str, path: Path) -> NoReturn:
    """Raises `ModelError` for a folder without config.json."""
    refuse_pointer(path / "config.json")
    refuse_adapter(path)
    try:
        entries = sorted(islice(path.iterdir(), _MOST_ENTRIES))
    except OSError as error:
        raise ModelError(
            f"folder {name} cannot be read: {error.strerror}",
            alternative="give the user who runs ingle the right to read it",
        ) from error
    what, alternative = next(_kinds(path, entries), ("so it is not a Hugging Face model folder", None))
    has = "is empty" if not entries else "has no config.json"
    raise ModelError(f"folder {name} {has}{what and f', {what}'}", alternative=alternative)


def _kinds(path: Path, entries: list[Path]) -> Iterator[tuple[str, str | None]]:
    """What a folder may be instead, and what to give; the first is the most telling."""
    names = {entry.name for entry in entries}
    ggufs = [
        entry
        for entry in entries
        if entry.suffix.lower() == ".gguf"
        and not NOT_THE_MODEL.search(entry.name)
        and not _LATER_PART.search(entry.name)
    ]
    if ggufs:
        more = f" (or one of {len(ggufs) - 1} others there)" if len(ggufs) > 1 else ""
        yield "", f"to run a GGUF file give its path: {ggufs[0]}{more}"
    snapshots = sorted(path.glob("snapshots/*/config.json"), key=lambda file: os.lstat(file).st_mtime_ns)
    if snapshots:
        yield "it is a cache of the Hugging Face hub", f"give the model in it: {snapshots[-1].parent}"
    if "model_index.json" in names:
        yield "it is a pipeline of diffusers, which makes images", "ingle serves models that write text"
    inner = [entry for entry in entries if (entry / "config.json").is_file()]
    if inner:
        more = f" (or {', '.join(str(entry) for entry in inner[1:4])})" if len(inner) > 1 else ""
        yield "", f"give the model's folder in it: {inner[0]}{more}"
    if {"manifests", "blobs"} <= names and (path / "blobs").is_dir():
        blobs = [blob for blob in islice((path / "blobs").iterdir(), _MOST_ENTRIES) if blob.is_file() and is_gguf(blob)]
        if blobs:
            largest = max(blobs, key=lambda blob: blob.stat().st_size)
            yield "it is Ollama's store", f"give one of its models: {largest} is the largest"
    if "params.json" in names and any(name.startswith("consolidated") for name in names):
        yield "it is in the makers' own format (params.json, consolidated…)", _INSTEAD
    if any(entry.suffix.lower() == ".onnx" for entry in entries):
        yield "it holds ONNX files, which ingle does not run", _INSTEAD
    if any(entry.suffix.lower() in (".safetensors", *_TORCH_SUFFIXES) for entry in entries):
        yield "though it has weights", "download config.json and the tokenizer's files beside them"


def refuse_missing(name: str, path: Path) -> NoReturn:
    """Raises `ModelError` for a path where nothing lies, with those of near names."""
    refuse_pointer(path)
    near = near_paths(path)
    meant = (
        f"did you mean {' or '.join(near)}?" if near else "give the path of a model's folder or .gguf file, or a name"
    )
    raise ModelError(f"there is no file or folder {quote(name)}", alternative=meant)


def near_paths(path: Path) -> list[str]:
    """What lies beside a path that leads nowhere and has nearly its name; or its first part that there is not."""
    try:
        missing = path
        while not missing.parent.is_dir() and missing.parent != missing:
            missing = missing.parent
        folder = missing.parent
        names = [entry.name for entry in islice(folder.iterdir(), _MOST_ENTRIES)]
    except (OSError, ValueError):
        return []
    lowered = {name.lower(): name for name in names}
    found = difflib.get_close_matches(missing.name.lower(), lowered, n=2, cutoff=0.75)
    rest = path.relative_to(missing)
    near = [folder / lowered[name] / rest if (folder / lowered[name] / rest).exists() else folder / lowered[name]
            for name in found]  # fmt: skip
    return [str(each) for each in near]
