"""`ingle chat`: a conversation in the terminal."""

from __future__ import annotations

import contextlib
import re
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, Protocol, cast

from ingle.cli.flags import parse
from ingle.cli.local import HIDDEN, Sampling, load_llm
from ingle.config import EngineConfig, TextConfig
from ingle.errors import ConfigError, RequestError
from ingle.request import SamplingParams

PROMPT = ">>> "
HELP = """\
/clear        forget the conversation
/system TEXT  set the system message (alone: show it)
/help         this list
/exit         leave, as Ctrl-D does
Ctrl-C stops an answer; at the empty prompt it leaves."""

_COMMAND = re.compile(r"/[a-z]+")


@dataclass(frozen=True)
class Chat:
    """Talk to a model in the terminal, or send it the lines of a pipe one after the other."""

    engine: EngineConfig
    text: TextConfig
    sampling: Sampling
    system: str | None = None
    """System message at the beginning of the conversation."""


class ChatModel(Protocol):
    """The part of `ingle.LLM` that a conversation needs. `stream_chat` is a generator; closing it aborts the answer."""

    @property
    def default_sampling(self) -> Mapping[str, Any]: ...

    def stream_chat(
        self, messages: Sequence[dict[str, Any]], sampling_params: SamplingParams | None = None
    ) -> Iterator[str]: ...


def main(argv: Sequence[str], load: Callable[[EngineConfig, TextConfig], ChatModel] = load_llm) -> None:
    flags = parse(Chat, argv, command="chat", hide=HIDDEN)
    flags.sampling.params({}, max_tokens=None)  # complains before the model is loaded
    interactive = sys.stdin.isatty()
    model = load(flags.engine, flags.text)
    conversation = Conversation(model, flags.sampling.params(model.default_sampling, max_tokens=None), flags.system)
    if interactive:
        print(f"{flags.engine.model} is listening. /help lists the commands, Ctrl-D leaves.")
    for line in _lines(interactive):
        try:
            if not conversation.handle(line):
                return
        except RequestError as error:
            if not interactive:
                raise
            print(f"ingle: {error}", file=sys.stderr)


class Conversation:
    """The messages so far, and what a line typed by the user does to them."""

    def __init__(self, model: ChatModel, sampling: SamplingParams, system: str | None) -> None:
        self._model = model
        self._sampling = sampling
        self._system = system
        self._turns: list[dict[str, str]] = []

    @property
    def messages(self) -> list[dict[str, str]]:
        system = [] if self._system is None else [{"role": "system", "content": self._system}]
        return system + self._turns

    def handle(self, line: str) -> bool:
        """Run a command or have a message answered. False when the user wants to leave."""
        command, _, rest = line.strip().partition(" ")
        if command == "/exit":
            return False
        if command == "/clear":
            self._turns.clear()
        elif command == "/system" and rest.strip():
            self._system = rest.strip()
        elif command == "/system":
            print(self._system or "no system message is set")
        elif command == "/help":
            print(HELP)
        elif _COMMAND.fullmatch(command):
            print(f"there is no command {command}; /help lists them", file=sys.stderr)
        elif command:
            self._answer(line)
        return True

    def _answer(self, text: str) -> None:
        """Print the answer as it comes. Of an answer that was stopped, what was shown is remembered."""
        self._turns.append({"role": "user", "content": text})
        shown: list[str] = []
        answer = self._model.stream_chat(self.messages, self._sampling)
        try:
            with (
                _interrupt_flag() as interrupted,
                contextlib.closing(cast("Generator[str, None, None]", answer)) as stream,
            ):
                for delta in stream:
                    print(delta, end="", flush=True)
                    shown.append(delta)
                    if interrupted.is_set():
                        break
        finally:
            if shown:
                print()
                self._turns.append({"role": "assistant", "content": "".join(shown)})
            else:
                self._turns.pop()


def _lines(interactive: bool) -> Iterator[str]:
    """What the user types, or the lines of stdin, until the end of input. Raises `ConfigError` for what is no text."""
    try:
        if interactive:
            yield from _typed_lines()
        else:
            yield from (line.rstrip("\n") for line in sys.stdin)
    except UnicodeDecodeError as error:
        raise ConfigError(f"the input is not {error.encoding} text: {error.reason}") from error


def _typed_lines() -> Iterator[str]:
    """Lines from the terminal until Ctrl-D, or Ctrl-C at an empty prompt."""
    import readline  # importing it gives input() line editing and a history

    while True:
        try:
            yield input(PROMPT)
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            if not readline.get_line_buffer():
                return


@contextlib.contextmanager
def _interrupt_flag() -> Iterator[threading.Event]:
    """An event that Ctrl-C sets instead of raising, so that the engine is never left in the middle of a step.

    A second Ctrl-C raises `KeyboardInterrupt` after all.
    """
    interrupted = threading.Event()

    def on_interrupt(signum: int, frame: FrameType | None) -> None:
        if interrupted.is_set():
            raise KeyboardInterrupt
        interrupted.set()

    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, previous)
