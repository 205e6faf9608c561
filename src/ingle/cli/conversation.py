"""A conversation with a model: its messages, and what the user's commands do to them."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ingle import facts
from ingle.channel import EngineInfo
from ingle.cli.answer import Shown, Stream, show
from ingle.cli.settings import Settings
from ingle.errors import RequestError, printable
from ingle.request import SamplingParams

_COMMAND = re.compile(r"/[a-z?]+!?")
_QUOTES = '"""'
_MAX_FILE_BYTES = 16 << 20
_FULL = "/clear forgets the conversation, /set drop_oldest on its oldest turns as they come in the way"

Message = dict[str, Any]


class Template(Protocol):
    source: str


class ChatModel(Protocol):
    """The part of `ingle.LLM` that a conversation needs."""

    info: EngineInfo

    @property
    def default_sampling(self) -> Mapping[str, Any]: ...

    @property
    def chat_template(self) -> Template | None: ...

    def chat_events(self, messages: Sequence[Message], sampling_params: SamplingParams | None = None) -> Stream: ...

    def num_prompt_tokens(self, messages: Sequence[Message]) -> int: ...


@dataclass(frozen=True)
class About:
    """What the banner and /show say of the model beside what it says itself."""

    model: str
    template: str


@dataclass
class Conversation:
    """The messages so far, and what a line typed by the user does to them."""

    model: ChatModel
    settings: Settings
    about: About
    system: str | None = None
    on_stream: Callable[[Stream | None], None] = lambda stream: None
    """Told of an answer that begins and, with None, of its end."""
    turns: list[Message] = field(default_factory=list)

    @property
    def messages(self) -> list[Message]:
        return [*([] if self.system is None else [{"role": "system", "content": self.system}]), *self.turns]

    def handle(self, line: str) -> bool:
        """Run a command or have a message answered. False when the user wants to leave.

        Raises `IngleError` for what cannot be done; the conversation is as before then.
        """
        word, _, rest = line.partition(" ")
        command = _COMMANDS.get(word.strip())
        if command is not None:
            return command(self, rest.strip()) is not False
        if _COMMAND.fullmatch(word.strip()):
            raise RequestError(
                f"there is no command {word.strip()}; /help lists them. A message may begin so after a space"
            )
        if text := unquoted(line):
            self.ask(text)
        return True

    def ask(self, text: str) -> Shown | None:
        """Has a message answered. None where nothing came: the message is not remembered then."""
        before = list(self.turns)
        self.turns.append({"role": "user", "content": text})
        try:
            shown = self._answer()
        except BaseException:
            self.turns = before
            raise
        if not shown.text:
            self.turns = before
        return shown if shown.text else None

    def banner(self) -> str:
        info, sampling = self.model.info, facts.sampling_defaults(self.settings.told())
        return (
            f"{printable(self.about.model)} · {info.family}, {facts.count(info.num_parameters)} parameters on "
            f"{info.device} · context {info.max_model_len} tokens\n"
            f"template: {self.about.template} · sampling: {sampling}\n"
            "/help lists the commands, Ctrl-D leaves."
        )

    def _answer(self) -> Shown:
        """Prints the answer as it comes. Of one that was stopped, what was shown is remembered."""
        self._make_room()
        params = self.settings.params
        try:
            stream = self.model.chat_events(self.messages, params)
        except RequestError as error:
            if error.code == "context_length_exceeded":
                raise RequestError(f"{error} {_FULL}", param=error.param, code=error.code) from None
            raise
        self.on_stream(stream)
        try:
            shown = show(stream)
        finally:
            self.on_stream(None)
        if shown.text:
            self.turns.append({"role": "assistant", "content": shown.text})
        self._tell_of(shown)
        return shown

    def _tell_of(self, shown: Shown) -> None:
        if shown.was_cut:
            context = self.model.info.max_model_len
            why = f"max_tokens is {self.settings.params.max_tokens} (/set max_tokens, --max-tokens)"
            if shown.num_tokens >= context:
                why = f"the context of {context} tokens is full: {_FULL}"
            say(f"[cut: {why}]")
        if shown.failed:
            say("[the model failed on this answer: its numbers were not finite]")
        if self.settings.verbose:
            say(shown.speed())

    def _make_room(self) -> None:
        """Drops the oldest turns, as far as the user wants that, so that a quarter of the context is free."""
        if not self.settings.drop_oldest:
            return
        context, dropped = self.model.info.max_model_len, 0
        room = min(self.settings.params.max_tokens or context, context // 4)
        while len(self.turns) > 1 and self.model.num_prompt_tokens(self.messages) + room > context:
            count = next((at for at, turn in enumerate(self.turns) if at and turn["role"] == "user"), 1)
            del self.turns[:count]
            dropped += count
        if dropped:
            say(f"[the {dropped} oldest messages are forgotten]")

    # ---- commands: each gets what follows its name

    def _clear(self, rest: str) -> None:
        self.turns.clear()
        say("[the conversation is forgotten]")

    def _system(self, rest: str) -> None:
        if rest:
            self.system = unquoted(rest) or None
        else:
            say(printable(self.system or "no system message is set", keep="\n\t"))

    def _set(self, rest: str) -> None:
        name, _, value = rest.partition(" ")
        if name == "system":
            self._system(value.strip().strip('"') or '""')
        else:
            say(self.settings.set(rest))

    def _show(self, rest: str) -> None:
        parts = {
            "info": facts.started(self.model.info, self.model.default_sampling),
            "template": self.about.template if not rest or self.model.chat_template is None
            else self.model.chat_template.source,
            "system": self.system or "none",
            "parameters": self.settings.shown() if rest else facts.sampling_defaults(self.settings.told()),
            "messages": json.dumps(self.messages, indent=1, ensure_ascii=False) if rest else str(len(self.messages)),
        }  # fmt: skip
        if rest and rest not in parts:
            raise RequestError(f"/show {rest}: there are {', '.join(parts)}")
        for name, text in parts.items():
            if not rest:
                say(f"{name + ':':<12}{printable(text, keep=chr(10))}")
            elif name == rest:
                say(printable(text, keep="\n\t"))

    def _save(self, rest: str, *, over: bool = False) -> None:
        path = _path("/save", rest)
        if path.suffix == ".jsonl":
            text = "".join(json.dumps(message, ensure_ascii=False) + "\n" for message in self.messages)
        else:
            text = json.dumps(self.messages, indent=1, ensure_ascii=False) + "\n"
        try:
            with path.open("w" if over else "x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            raise RequestError(f"/save {path}: it exists; /save! {path} writes over it") from None
        except OSError as error:
            raise RequestError(f"/save {path}: {error.strerror or error}") from None
        say(f"[{len(self.messages)} messages are in {printable(str(path))}]")

    def _save_over(self, rest: str) -> None:
        self._save(rest, over=True)

    def _load(self, rest: str) -> None:
        path = _path("/load", rest)
        messages = read_messages(path)
        first = messages[0] if messages[0]["role"] == "system" else None
        self.system = None if first is None else first["content"]
        self.turns = messages[first is not None :]
        say(f"[{len(messages)} messages, in place of those before]")

    def _retry(self, rest: str) -> None:
        """Has the last question answered once more."""
        before = list(self.turns)
        while self.turns and self.turns[-1]["role"] != "user":
            self.turns.pop()
        if not self.turns:
            self.turns = before
            raise RequestError("/retry: nothing was asked yet")
        text = str(self.turns.pop()["content"])
        try:
            if self.ask(text) is None:
                self.turns = before
        except BaseException:
            self.turns = before
            raise

    def _help(self, rest: str) -> None:
        say(HELP)

    def _leave(self, rest: str) -> bool:
        return False


HELP = f"""\
/clear            forget the conversation
/system TEXT      set the system message; alone, show it
/set NAME VALUE   temperature, top_p, max_tokens, seed, …; alone, show all
/set drop_oldest on, /set verbose on
/show             the model, template, system message and parameters; /show template shows all of it
/save FILE        write the conversation as JSON (or JSON lines, to *.jsonl); /save! writes over a file
/load FILE        go on with a conversation from such a file
/retry            have the last question answered again
/bye              leave, as Ctrl-D does
{_QUOTES} begins a message of several lines, {_QUOTES} ends it; Alt-Enter begins a new line too.
A block that is pasted is one message. Ctrl-R searches what was typed before.
Ctrl-C stops an answer, and drops a line that is half typed."""

_COMMANDS: Mapping[str, Callable[[Conversation, str], bool | None]] = {
    "/clear": Conversation._clear,
    "/system": Conversation._system,
    "/set": Conversation._set,
    "/show": Conversation._show,
    "/save": Conversation._save,
    "/save!": Conversation._save_over,
    "/load": Conversation._load,
    "/retry": Conversation._retry,
    "/help": Conversation._help,
    "/?": Conversation._help,
    "/bye": Conversation._leave,
    "/exit": Conversation._leave,
    "/quit": Conversation._leave,
}


def say(text: str) -> None:
    """What is no answer. On stdout only where that is a terminal, in which nothing else reads it."""
    print(text, file=sys.stdout if sys.stdout.isatty() else sys.stderr, flush=True)


def unquoted(text: str) -> str:
    """A message without the triple quotes around it, and without empty ends."""
    inner = text.strip()
    if inner.startswith(_QUOTES):
        inner = inner.removeprefix(_QUOTES).removesuffix(_QUOTES)
        return inner.strip("\n")
    return text.strip()


def is_open(text: str) -> bool:
    """Whether more lines belong to a message: its triple quotes are not closed yet."""
    return text.lstrip().startswith(_QUOTES) and not text.rstrip()[len(_QUOTES) :].endswith(_QUOTES)


def read_messages(path: Path) -> list[Message]:
    """Of a JSON file (a list, or an object with "messages"), or one of JSON lines. Raises `RequestError`."""
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise RequestError(f"{path} is larger than {_MAX_FILE_BYTES >> 20} MiB")
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    return messages_in(text, str(path))


def messages_in(text: str, where: str) -> list[Message]:
    """The messages that a text holds as JSON or JSON lines. Raises `RequestError`."""
    try:
        held = list(_values(text))
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{where}: not JSON: {error}") from None
    value: Any = held[0] if len(held) == 1 else held
    if isinstance(value, dict) and "messages" in value:
        value = value["messages"]
    messages = [value] if isinstance(value, dict) else value
    if not isinstance(messages, list) or not messages:
        raise RequestError(f'{where}: no messages in it: give [{{"role": "user", "content": "…"}}]')
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
            raise RequestError(f"{where}: message {index + 1} is no object with role and content: {message!r:.80}")
    return messages


def _values(text: str) -> Iterator[Any]:
    """Those in a text, one after the other."""
    decoder, at = json.JSONDecoder(), 0
    text = text.strip()
    while at < len(text):
        value, end = decoder.raw_decode(text, at)
        yield value
        at = end + len(text[end:]) - len(text[end:].lstrip())


def _path(command: str, text: str) -> Path:
    if not text:
        raise RequestError(f"{command} needs a file: {command} talk.json")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise RequestError(f"{command} {text}: {error}") from None
