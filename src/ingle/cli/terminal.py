"""The line at which the user types: editing of wide characters, history with Ctrl-R, blocks that are pasted."""

from __future__ import annotations

import contextlib
import os
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from prompt_toolkit import PromptSession
from prompt_toolkit.data_structures import Size
from prompt_toolkit.filters import has_focus, is_searching
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output.vt100 import Vt100_Output

from ingle.cli.conversation import is_open
from ingle.home import home

PROMPT = ">>> "
_MORE = "... "
_MAX_HISTORY_BYTES = 1 << 20
_PASTES_ARE_MARKED = "\x1b[?2004h"
_PASTES_ARE_NOT = "\x1b[?2004l"


class Terminal:
    """Where the user types. Between two prompts, what is typed or pasted waits for the next one, unseen."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.history = _history()
        self._session: PromptSession[str] = PromptSession(
            history=self.history,
            # Terminals that do not answer where their cursor is would be waited for, and a late answer be seen.
            output=Vt100_Output(stream, self._size, term=os.environ.get("TERM"), enable_cpr=False),
            key_bindings=_keys(),
            multiline=True,
            prompt_continuation=lambda width, line, wrapped: _MORE if not wrapped else " " * width,
        )

    def read(self) -> str:
        """What the user typed until Enter. Raises `EOFError` for Ctrl-D, `KeyboardInterrupt` for Ctrl-C."""
        return self._session.prompt(PROMPT)

    @property
    def half_typed(self) -> str:
        """What stood there when Ctrl-C came."""
        return self._session.default_buffer.text

    @contextlib.contextmanager
    def hushed(self) -> Iterator[None]:
        """While something else is printed: what is typed is not echoed into it, and Ctrl-C is a signal."""
        number = sys.stdin.fileno()
        before = termios.tcgetattr(number)
        quiet = [*before[:6], list(before[6])]
        quiet[0] &= ~termios.ICRNL
        quiet[3] &= ~(termios.ECHO | termios.ICANON)
        termios.tcsetattr(number, termios.TCSANOW, quiet)
        self._write(_PASTES_ARE_MARKED)
        try:
            yield
        finally:
            self._write(_PASTES_ARE_NOT)
            termios.tcsetattr(number, termios.TCSANOW, before)

    def _size(self) -> Size:
        columns, rows = os.get_terminal_size(self._stream.fileno())
        return Size(rows=rows or 24, columns=columns or 80)  # of a terminal that does not know its own

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


class _KeptHistory(FileHistory):
    """In a file. `paused` keeps what is typed out of it."""

    paused = False

    def store_string(self, string: str) -> None:
        if not self.paused:
            with contextlib.suppress(OSError):  # a full disk is no reason not to talk
                super().store_string(string)


def pause(history: History, *, paused: bool) -> None:
    if isinstance(history, _KeptHistory):
        history.paused = paused


def _history() -> History:
    """In ingle's home, for its owner alone; in memory where that cannot be written."""
    path = home() / "chat_history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600))
        path.chmod(0o600)
        _trim(path)
    except OSError:
        return InMemoryHistory()
    return _KeptHistory(str(path))


def _trim(path: Path) -> None:
    """To its newer half when it has grown large. Entries begin with the line of their time."""
    if path.stat().st_size > _MAX_HISTORY_BYTES:
        newer = path.read_bytes()[-_MAX_HISTORY_BYTES // 2 :]
        path.write_bytes(newer[newer.find(b"\n# ") :])


def _keys() -> KeyBindings:
    keys = KeyBindings()
    typing = has_focus("DEFAULT_BUFFER") & ~is_searching

    @keys.add("enter", filter=typing)
    def _(event: KeyPressEvent) -> None:
        if is_open(event.current_buffer.text):
            event.current_buffer.newline(copy_margin=False)
        else:
            event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter", filter=typing)
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    return keys
