"""Lines that agents put before their instructions and change with every request, and that tell the model nothing.

A prompt that begins otherwise each time is read anew each time. Claude Code begins its system text with one:

    x-anthropic-billing-header: cc_version=2.1.177.01c; cc_entrypoint=sdk-cli; cch=36ee5;
"""

from __future__ import annotations

import re

_LINES = re.compile(r"\s*(?:x-anthropic-[a-z0-9-]+:[^\n]*(?:\n+|\Z))+")


def without_changing_lines(system: str) -> str:
    """A system text without such lines at its head. Amid a text, they are the text's."""
    found = _LINES.match(system)
    return system if found is None else system[found.end() :]
