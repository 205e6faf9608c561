"""`ingle generate`: prompts in, completions out, without a server."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tyro.conf import Positional

from ingle.cli.flags import parse
from ingle.cli.local import HIDDEN, Sampling, load_llm
from ingle.config import EngineConfig, TextConfig
from ingle.errors import ConfigError
from ingle.request import RequestOutput, SamplingParams

MAX_TOKENS = 128
"""What `--max-tokens` is when neither it nor the model says."""


@dataclass(frozen=True)
class InputOutput:
    """What to continue, and where the results go."""

    prompt: Positional[str | None] = None
    """The text to continue."""
    prompts_file: str | None = None
    """File with a prompt in each line, or, named *.jsonl, with an object like {"prompt": "..."} in each; - is stdin."""
    output: Path | None = None
    """File for the results, one JSON object a line. Default: stdout."""
    json: bool = False
    """Print one JSON object a line instead of text."""


@dataclass(frozen=True)
class Generate:
    """Continue one prompt, or a file of prompts, offline.

    The model gets the prompt as it is; for questions to a chat model, use `ingle chat`.
    """

    engine: EngineConfig
    text: TextConfig
    io: InputOutput
    sampling: Sampling


class CompletionModel(Protocol):
    """The part of `ingle.LLM` that is needed here."""

    @property
    def default_sampling(self) -> Mapping[str, Any]: ...

    def generate(
        self, prompts: Sequence[str], sampling_params: SamplingParams, *, use_tqdm: bool
    ) -> list[RequestOutput]: ...


def main(argv: Sequence[str], load: Callable[[EngineConfig, TextConfig], CompletionModel] = load_llm) -> None:
    flags = parse(Generate, argv, command="generate", hide=HIDDEN)
    prompts = _prompts(flags.io)
    if (output := flags.io.output) is not None and not output.absolute().parent.is_dir():
        raise ConfigError(f"--output {output}: there is no folder {output.absolute().parent}")
    flags.sampling.params({}, max_tokens=MAX_TOKENS)  # complains before the model is loaded
    model = load(flags.engine, flags.text)
    sampling = flags.sampling.params(model.default_sampling, max_tokens=MAX_TOKENS)
    results = model.generate(prompts, sampling, use_tqdm=len(prompts) > 1 and sys.stderr.isatty())
    _report(flags.io, results)


def _report(flags: InputOutput, results: list[RequestOutput]) -> None:
    if flags.output is not None:
        _write(flags.output, results)
    elif flags.json:
        print("\n".join(map(_json_line, results)))
    elif flags.prompt is not None:
        print(results[0].outputs[0].text)
    else:
        for number, result in enumerate(results, 1):
            print(f"--- {number}: {result.prompt}\n{result.outputs[0].text}")


def _prompts(flags: InputOutput) -> list[str]:
    if (flags.prompt is None) == (flags.prompts_file is None):
        raise ConfigError("give either a prompt or --prompts-file FILE (see `ingle generate --help`)")
    if flags.prompt is not None:
        return [flags.prompt]
    name = str(flags.prompts_file)
    try:
        text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompts-file {name}: {getattr(error, 'strerror', None) or error}") from error
    lines = [(number, line) for number, line in enumerate(text.removeprefix("\ufeff").split("\n"), 1) if line.strip()]
    if not lines:
        raise ConfigError(f"--prompts-file {name}: no prompt in it")
    if name.endswith(".jsonl"):
        return [_prompt_of(f"{name}, line {number}", line) for number, line in lines]
    return [line.removesuffix("\r") for _, line in lines]


def _prompt_of(where: str, line: str) -> str:
    try:
        value: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not JSON: {error}") from error
    prompt = value.get("prompt") if isinstance(value, dict) else None
    if not isinstance(prompt, str):
        raise ConfigError(f'{where}: not an object with a text "prompt"')
    return prompt


def _json_line(result: RequestOutput) -> str:
    completion = result.outputs[0]
    record = {
        "prompt": result.prompt,
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
        "prompt_tokens": len(result.prompt_token_ids),
        "completion_tokens": len(completion.token_ids),
    }
    return json.dumps(record, ensure_ascii=False)


def _write(path: Path, results: Iterable[RequestOutput]) -> None:
    try:
        with path.open("w", encoding="utf-8") as file:
            file.writelines(f"{_json_line(result)}\n" for result in results)
    except OSError as error:
        raise ConfigError(f"--output {path}: {error.strerror}") from error
