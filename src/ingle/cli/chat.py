"""`ingle chat`: a conversation in the terminal, or one answer to a question or a pipe."""

from __future__ import annotations

import contextlib
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING

from tyro.conf import Positional

from ingle.cli.answer import Stream
from ingle.cli.conversation import About, ChatModel, Conversation, is_open, say
from ingle.cli.flags import parse
from ingle.cli.local import HIDDEN, Sampling, load_llm
from ingle.cli.settings import Settings
from ingle.config import EngineConfig, TextConfig
from ingle.errors import ConfigError, IngleError, printable

if TYPE_CHECKING:
    from ingle.cli.terminal import Terminal
    from ingle.llm import LLM


@dataclass(frozen=True)
class Talk:
    """What is asked, and how it goes on."""

    prompt: Positional[str | None] = None
    """Answer this and leave. What comes through a pipe is put before it."""
    system: str | None = None
    """System message at the beginning of the conversation."""
    lines: bool = False
    """Each line of a pipe is a message of one conversation, or a command; without it the pipe is one message."""
    drop_oldest: bool = False
    """Forget the oldest turns when the context is full, instead of refusing."""
    verbose: bool = False
    """After each answer, its tokens and tokens/s."""


@dataclass(frozen=True)
class Chat:
    """Talk to a model in the terminal, or have one question answered.

    `ingle chat MODEL "question"` and `echo question | ingle chat MODEL` answer once; `cat FILE | ingle chat MODEL
    "summarize"` puts both together.
    """

    engine: EngineConfig
    text: TextConfig
    talk: Talk
    sampling: Sampling


def load(engine: EngineConfig, text: TextConfig) -> LLM:
    """Raises `ConfigError` for a model without a chat template before its weights are read."""
    from ingle.hub.resolve import ensure_model
    from ingle.text.load import has_chat_template

    source = ensure_model(engine.model)
    if not has_chat_template(source.path, text, source.recommended):
        name = shlex.quote(engine.model)
        raise ConfigError(
            f"{engine.model} has no chat template: give it one, `ingle chat {name} --chat-template FILE`, or have it "
            f'continue a text, `ingle generate {name} "Once upon a time"`'
        )
    return load_llm(engine, text)


def main(argv: Sequence[str], load: Callable[[EngineConfig, TextConfig], ChatModel] = load) -> None:
    flags = parse(Chat, argv, command="chat", hide=HIDDEN)
    flags.sampling.params({}, max_tokens=None)  # complains before the model is loaded
    with _utf8_input():
        once = _asked_once(flags.talk)
    model = load(flags.engine, flags.text)
    params = flags.sampling.params(model.default_sampling, max_tokens=None)
    told = {**model.default_sampling, **flags.sampling.given()}
    settings = Settings(params, told, drop_oldest=flags.talk.drop_oldest, verbose=flags.talk.verbose)
    about = About(flags.engine.model, _template_of(flags.text, model))
    conversation = Conversation(model, settings, about, flags.talk.system)
    if once is not None:
        conversation.ask(once)
    elif flags.talk.lines and not _is_terminal():
        with _Interrupts() as interrupts, _utf8_input():
            conversation.on_stream = interrupts.of
            _follow(conversation)
    else:
        _talk(conversation)


def _asked_once(talk: Talk) -> str | None:
    """The one question of this call; None for a conversation. Raises `ConfigError` when there is nothing to answer."""
    if talk.lines or (talk.prompt is None and _is_terminal()):
        if talk.prompt is not None:
            raise ConfigError("--lines takes its questions from a pipe: leave the question out")
        return None
    piped = "" if sys.stdin.isatty() else sys.stdin.read().strip("\n")
    asked = "\n\n".join(part for part in (piped, talk.prompt or "") if part.strip())
    if not asked:
        raise ConfigError("nothing is asked: the question is empty, and so is the pipe")
    return asked


def _is_terminal() -> bool:
    return sys.stdin.isatty() and (sys.stdout.isatty() or sys.stderr.isatty())


def _template_of(text: TextConfig, model: ChatModel) -> str:
    if text.chat_template is not None:
        name = "--chat-template" if "{" in text.chat_template else f"--chat-template {text.chat_template}"
        return printable(name)
    return "none" if model.chat_template is None else "the model's own"


def _follow(conversation: Conversation) -> None:
    """The lines of a pipe, one after the other."""
    text = ""
    for line in sys.stdin:
        text += line
        if not is_open(text):
            if not conversation.handle(text.rstrip("\n")):
                return
            text = ""
    if text:
        conversation.handle(text.rstrip("\n"))


def _talk(conversation: Conversation) -> None:
    """With whoever sits at the terminal."""
    from ingle.cli.terminal import Terminal, pause

    terminal = Terminal(sys.stdout if sys.stdout.isatty() else sys.stderr)
    say(conversation.banner())
    with _Interrupts() as interrupts:
        conversation.on_stream = interrupts.of
        for text in _typed(terminal):
            with terminal.hushed():
                try:
                    if not conversation.handle(text):
                        return
                except IngleError as error:
                    print(f"ingle: {error}", file=sys.stderr)
                pause(terminal.history, paused=not conversation.settings.history)


def _typed(terminal: Terminal) -> Iterator[str]:
    """What the user types until Ctrl-D, or Ctrl-C twice where nothing is typed."""
    warned = False
    while True:
        try:
            text = terminal.read()
        except EOFError:
            return
        except KeyboardInterrupt:
            if not terminal.half_typed:
                if warned:
                    return
                warned = True
                say("Ctrl-D or /bye leaves, and so does another Ctrl-C.")
            continue
        warned = False
        if text.strip():
            yield text


class _Interrupts:
    """Ctrl-C stops the answer at hand, after the step that runs: the engine is never left in the middle of one.

    A second one raises `KeyboardInterrupt`. Between answers it has nothing to stop. SIGTERM leaves, so that the
    terminal is put in order.
    """

    def __init__(self) -> None:
        self._stream: Stream | None = None
        self._stopped = False
        self._previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def of(self, stream: Stream | None) -> None:
        self._stream, self._stopped = stream, False

    def __enter__(self) -> _Interrupts:
        signal.signal(signal.SIGINT, self._on_interrupt)
        signal.signal(signal.SIGTERM, _leave)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        if self._stopped:
            raise KeyboardInterrupt
        if self._stream is not None:
            self._stopped = True
            self._stream.close()


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


@contextlib.contextmanager
def _utf8_input() -> Iterator[None]:
    """Raises `ConfigError` for what is no text."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise ConfigError(f"the input is not {error.encoding} text: {error.reason}") from error
