"""What lies in a folder in place of a model's files: pointers of git-lfs, web pages, links to nowhere, adapters.

Pointers: https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md
"""

from __future__ import annotations

import re
import reprlib
from pathlib import Path

from ingle.errors import ModelError

_HEAD = b"version https://git-lfs.github.com/spec/v1"
_HEAD_BYTES = 256
_PAGE = re.compile(rb"\s*(<!doctype html|<html|<\?xml)", re.IGNORECASE)
_REFUSAL = re.compile(rb'\s*(\{"(error|message|detail|Code)"\s*:\s*["{]|(Entry|Repository|Revision) not found|Not Found'
                      rb"|Invalid (username or password|credentials)|Access to model|Unauthorized)")  # fmt: skip
"""How hubs and proxies begin what they say in a file's place."""


def refuse_pointer(path: Path) -> None:
    """Raises `ModelError` where a pointer, a link to nowhere or a server's answer stands in a file's place.

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
            head = file.read(_HEAD_BYTES)
    except OSError:
        return
    if _PAGE.match(head):
        raise ModelError(
            f"{path}: a web page stands in the file's place",
            alternative="download the file itself: of a model hub the address with /resolve/, not the page with /blob/",
        )
    if _REFUSAL.match(head):
        raise ModelError(
            f"{path}: in the file's place stands what a server said: {reprlib.repr(head.decode(errors='replace'))}",
            alternative="download it again, with the right address and, if the model asks for it, your token",
        )
    if head.startswith(_HEAD):
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
