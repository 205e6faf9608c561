"""Where ingle keeps what it made or fetched: pulled models, compiled kernels, what was measured once."""

from __future__ import annotations

import os
from pathlib import Path

from ingle.errors import ConfigError


def home() -> Path:
    """$INGLE_HOME, or ~/.cache/ingle.

    A user without a home, as containers run programs under any number, has it in /, where Docker puts it too.
    """
    path = Path(os.environ.get("INGLE_HOME") or "~/.cache/ingle")
    try:
        return path.expanduser().absolute()
    except RuntimeError as error:
        if path.parts[0] != "~":
            raise ConfigError(f"INGLE_HOME is {str(path)!r:.100}, and there is no such user") from error
        return Path("/", *path.parts[1:])
