"""What lies in a folder in place of a model's files: pointers of git-lfs, links to nowhere, adapters.

Pointers: https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md
"""

from __future__ import annotations

from pathlib import Path

from ingle.errors import ModelError

_HEAD = b"version https://git-lfs.github.com/spec/v1"


def refuse_pointer(path: Path) -> None:
    """Raises `ModelError` where a pointer, or a link to nowhere, stands in a file's place.

    A file that cannot be read is somebody else's.
    """
    try:
        if path.is_symlink() and not path.exists():
            raise ModelError(
                f"{path}: a link to {path.readlink()}, which is not there: copy or mount what it points to as well "
                "(in a cache of the Hugging Face hub, the model's whole folder with its blobs)"
            )
        if not path.is_file():  # opening a named pipe would wait for a writer
            return
        with path.open("rb") as file:
            head = file.read(len(_HEAD))
    except OSError:
        return
    if head == _HEAD:
        raise ModelError(
            f"{path}: a git-lfs pointer stands in the file's place: run `git lfs pull` in its folder, or download the "
            "file itself"
        )


def refuse_adapter(folder: Path) -> None:
    """Raises `ModelError` for a folder with an adapter, where the model itself was looked for and not found."""
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"{folder}: holds an adapter (LoRA, see its adapter_config.json) without the model that it changes: merge "
            "both, with PEFT's merge_and_unload(), and give the folder of the merged model"
        )
