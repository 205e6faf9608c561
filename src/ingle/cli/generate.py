"""`ingle generate`: prompts in, completions out, without a server."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO

from tyro.conf import Positional

from ingle.cli.conversation import messages_in
from ingle.cli.flags import parse
from ingle.cli.local import HIDDEN, Sampling, load_llm
from ingle.config import EngineConfig, TextConfig
from ingle.errors import ConfigError, RequestError
from ingle.habits.sampling import SAME
from ingle.request import CompletionOutput, RequestOutput, SamplingParams

MAX_TOKENS = 128
"""What `--max-tokens` is when neither it nor the model says."""
_TOLD_EVERY_S = 10.0
"""How far many prompts are, where no terminal shows it all the time."""

_NO_SAMPLING = {"prompt", "messages", "id", "custom_id"}

Messages = list[Any]


@dataclass(frozen=True)
class InputOutput:
    """What to continue, and where the results go."""

    prompt: Positional[str | None] = None
    """The text to continue. Default: all that comes through a pipe."""
    prompts_file: str | None = None
    """File with a prompt in each line, or, named *.jsonl, with an object like {"prompt": "...", "max_tokens": 9} or
    {"messages": [...]} in each; - is stdin, of either kind."""
    output: Path | None = None
    """File for the results, one JSON object a line, in the order of the prompts. Default: stdout."""
    json: bool = False
    """Print one JSON object a line instead of text."""


@dataclass(frozen=True)
class Generate:
    """Continue one prompt, what comes through a pipe, or a file of prompts, offline.

    The model gets a prompt as it is; for questions to a chat model, use `ingle chat`, or messages in a .jsonl file.
    """

    engine: EngineConfig
    text: TextConfig
    io: InputOutput
    sampling: Sampling


class CompletionModel(Protocol):
    """The part of `ingle.LLM` that is needed here."""

    @property
    def default_sampling(self) -> Mapping[str, Any]: ...

    def answers(
        self, questions: Sequence[str | Messages], sampling_params: Sequence[SamplingParams]
    ) -> Iterator[tuple[int, RequestOutput]]: ...


@dataclass(frozen=True)
class Item:
    """One thing to answer."""

    question: str | Messages
    sampling: Mapping[str, Any]
    """What its line asks of the draw, by the names of `SamplingParams`."""
    where: str = ""
    id: Any = None
    """What its line calls it; comes back with the result."""


def main(argv: Sequence[str], load: Callable[[EngineConfig, TextConfig], CompletionModel] = load_llm) -> None:
    flags = parse(Generate, argv, command="generate", hide=HIDDEN)
    items = _items(flags.io)
    _params(flags.sampling, {}, items)  # complains before the model is loaded
    _check_output(flags.io.output)
    model = load(flags.engine, flags.text)
    params = _params(flags.sampling, model.default_sampling, items)
    with _output(flags.io.output) as out:
        write = _records if flags.io.json or flags.io.output is not None else _texts
        results = model.answers([item.question for item in items], params)
        for number, (item, result) in enumerate(_in_order(items, _shown(results, len(items)))):
            write(out, item, result, None if len(items) == 1 else number + 1)
            out.flush()


def _params(flags: Sampling, model_defaults: Mapping[str, Any], items: Sequence[Item]) -> list[SamplingParams]:
    """The lines' over the flags' over the model's. Raises `ConfigError` naming the line."""
    common = flags.params(model_defaults, max_tokens=MAX_TOKENS)
    base = {"max_tokens": common.max_tokens, **model_defaults, **flags.given()}
    params = []
    for item in items:
        try:
            params.append(SamplingParams(**{**base, **item.sampling}) if item.sampling else common)
        except (RequestError, TypeError) as error:
            raise ConfigError(f"{item.where}: {error}") from error
    return params


def _items(flags: InputOutput) -> list[Item]:
    if flags.prompt is not None and flags.prompts_file is not None:
        raise ConfigError("give either a prompt or --prompts-file FILE (see `ingle generate --help`)")
    if flags.prompt is not None:
        return [Item(flags.prompt, {})]
    if flags.prompts_file is not None:
        return _items_of_file(flags.prompts_file)
    if sys.stdin.isatty():
        raise ConfigError("give either a prompt or --prompts-file FILE, or pipe a prompt in")
    piped = _read("-", "the pipe").removesuffix("\n")
    if not piped.strip():
        raise ConfigError("the pipe brought no prompt: give one, or --prompts-file FILE")
    return [Item(piped, {})]


def _items_of_file(name: str) -> list[Item]:
    text = _read(name, f"--prompts-file {name}")
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise ConfigError(f"--prompts-file {name}: no prompt in it")
    if name.endswith(".jsonl") or (name == "-" and _is_object(lines[0][1])):
        return [_item_of(f"{name}, line {number}", line) for number, line in lines]
    return [Item(line.removesuffix("\r"), {}) for _, line in lines]


def _read(name: str, shown: str) -> str:
    try:
        text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{shown}: {getattr(error, 'strerror', None) or error}") from error
    return text.removeprefix("\ufeff")


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _item_of(where: str, line: str) -> Item:
    """Raises `ConfigError`."""
    try:
        value: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not JSON: {error}") from error
    if not isinstance(value, dict) or ("prompt" in value) == ("messages" in value):
        raise ConfigError(f'{where}: not an object with a text "prompt", or with "messages"')
    rest = {SAME.get(key, key): each for key, each in value.items() if key not in _NO_SAMPLING}
    name = value.get("id", value.get("custom_id"))
    if "messages" in value:
        try:
            return Item(list(messages_in(json.dumps(value["messages"]), where)), rest, where, name)
        except RequestError as error:
            raise ConfigError(str(error)) from error
    if not isinstance(value["prompt"], str):
        raise ConfigError(f'{where}: not an object with a text "prompt", or with "messages"')
    return Item(value["prompt"], rest, where, name)


def _check_output(path: Path | None) -> None:
    if path is not None and not path.absolute().parent.is_dir():
        raise ConfigError(f"--output {path}: there is no folder {path.absolute().parent}")


@contextlib.contextmanager
def _output(path: Path | None) -> Iterator[TextIO]:
    """Raises `ConfigError` when it cannot be written to."""
    if path is None:
        yield sys.stdout
        return
    try:
        with path.open("w", encoding="utf-8") as file:
            yield file
    except OSError as error:
        raise ConfigError(f"--output {path}: {error.strerror}") from error


def _in_order(
    items: Sequence[Item], results: Iterator[tuple[int, RequestOutput]]
) -> Iterator[tuple[Item, RequestOutput]]:
    """Each result as soon as all before it are there."""
    waiting: dict[int, RequestOutput] = {}
    next_one = 0
    for index, result in results:
        waiting[index] = result
        while next_one in waiting:
            yield items[next_one], waiting.pop(next_one)
            next_one += 1


def _shown(results: Iterator[tuple[int, RequestOutput]], total: int) -> Iterator[tuple[int, RequestOutput]]:
    """Says on stderr how many are done and how fast: on a terminal all the time, elsewhere now and then."""
    alive, started, num_tokens = sys.stderr.isatty(), time.monotonic(), 0
    told = started
    for count, (index, result) in enumerate(results, 1):
        num_tokens += sum(len(each.token_ids) for each in result.outputs)
        now = time.monotonic()
        line = f"{count} of {total} prompts, {num_tokens / max(now - started, 1e-9):,.0f} tokens/s"
        if total > 1 and alive:
            print(f"\r\x1b[K{line if count < total else ''}", end="", file=sys.stderr, flush=True)
        elif total > 1 and now - told >= _TOLD_EVERY_S:
            told = now
            print(f"ingle: {line}", file=sys.stderr, flush=True)
        yield index, result


def _texts(out: TextIO, item: Item, result: RequestOutput, number: int | None) -> None:
    asked = item.question if isinstance(item.question, str) else item.question[-1]["content"]
    for completion in result.outputs:
        head = "" if number is None else f"--- {number}: {asked}\n"
        print(f"{head}{completion.text}", file=out)


def _records(out: TextIO, item: Item, result: RequestOutput, number: int | None) -> None:
    """A line for each of the answers."""
    for completion in result.outputs:
        record = _record(item, result, completion)
        if len(result.outputs) > 1:
            record["index"] = completion.index
        print(json.dumps(record, ensure_ascii=False), file=out)


def _record(item: Item, result: RequestOutput, completion: CompletionOutput) -> dict[str, Any]:
    named = {} if item.id is None else {"id": item.id}
    asked = {"prompt": item.question} if isinstance(item.question, str) else {"messages": item.question}
    return {
        **named,
        **asked,
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
        "prompt_tokens": len(result.prompt_token_ids),
        "completion_tokens": len(completion.token_ids),
    }
