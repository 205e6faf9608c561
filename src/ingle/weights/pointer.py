"""Files that git-lfs left as pointers: https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md"""

from __future__ import annotations

from pathlib import Path

from ingle.errors import ModelError

_HEAD = b"version https://git-lfs.github.com/spec/v1"


def refuse_pointer(path: Path) -> None:
    """Raises `ModelError` where a pointer stands in a file's place. A file that cannot be read is somebody else's."""
    try:
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
