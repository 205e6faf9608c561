"""What `ingle bench serve` is asked: the flags, and what their words mean."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tyro.conf import Positional

from ingle.bench.serving.address import parse_address
from ingle.errors import ConfigError

_ENDPOINTS = {
    "chat": "chat/completions",
    "completions": "completions",
    "/v1/chat/completions": "chat/completions",
    "/v1/completions": "completions",
}
_DATASETS = {
    "random": "random",
    "prefix_repetition": "random",
    "jsonl": "jsonl",
    "custom": "jsonl",
    "sharegpt": "sharegpt",
}
_DEFAULT_CONCURRENCIES = (1, 2, 4, 8, 16)
_TARGETS = ("ttft", "tpot", "e2el")


@dataclass(frozen=True)
class TargetOptions:
    """The server."""

    model: Positional[str | None] = None
    """The model's name there. Default: the first that the server lists."""
    base_url: str = "http://127.0.0.1:8000"
    """Address of an OpenAI-compatible server, with or without /v1; unix:PATH for a socket."""
    endpoint: str | None = None
    """chat or completions. Default: chat, and completions where the model has no chat template."""
    api_key: str | None = None
    """Default: OPENAI_API_KEY or INGLE_API_KEY of the environment. It is written nowhere."""
    insecure: bool = False
    """Take any certificate of a https address."""
    request_timeout: float = 600.0
    """Seconds after which a request that has not ended is an error."""


@dataclass(frozen=True)
class LoadOptions:
    """How many requests, and when."""

    concurrency: tuple[str, ...] = ()
    """Levels of requests at once, one after the other, such as 1,2,4,8,16,25,36. Default: 1,2,4,8,16."""
    rate: tuple[str, ...] = ()
    """Levels of requests a second instead, at random times (Poisson), or inf. One --concurrency then is the most at
    once."""
    num_prompts: int | None = None
    """Requests of each level, or sessions with --turns. Default: four for each at once, 16 at least."""
    num_warmups: int | None = None
    """Short requests before each level, which are not counted. Default: as many as run at once, 32 at most."""
    goodput: tuple[str, ...] = ()
    """Count requests that keep these milliseconds, such as ttft:500,tpot:50; e2el is the whole request."""


@dataclass(frozen=True)
class DataOptions:
    """What is asked."""

    dataset_path: Path | None = None
    """Prompts or conversations, JSONL or ShareGPT's JSON. Default: made-up texts."""
    dataset_name: str | None = None
    """random, jsonl or sharegpt. Default: what the file looks like."""
    input_len: int = 128
    """Tokens of a made-up prompt, without the chat template's."""
    output_len: int | None = None
    """Tokens of each answer. Default: 128; for a file as long as the answer that stands there, else 128."""
    range_ratio: float = 0.0
    """Vary both lengths of made-up requests evenly, by this share of them up and down."""
    prefix_len: int = 0
    """Tokens before each made-up prompt which it shares with others."""
    num_prefixes: int = 1
    """How many such beginnings there are."""
    turns: int = 1
    """Turns of a session: each asks with all that was said before, by the server too."""
    think_time: float = 0.0
    """Seconds between an answer and the next turn."""
    tokenizer: str | None = None
    """A folder, file or name of a model whose tokenizer counts. Default: the server's /tokenize, else the store."""
    seed: int = 0
    """Of made-up prompts, of the order of a file's, and of arrivals."""
    ignore_eos: bool = True
    """Ask for answers of full length. Servers that do not know this may give shorter ones."""
    temperature: float | None = None
    """Default: the server's own."""
    extra_body: str | None = None
    """A JSON object with more fields for each request."""


@dataclass(frozen=True)
class OutputOptions:
    """What is kept."""

    output: Path | None = None
    """Write results here as JSON, with .html and .png beside it. Default: bench-MODEL-DATE.json."""


@dataclass(frozen=True)
class ServeOptions:
    """Measure a server under load: any that speaks OpenAI's API, at rising concurrency or rates.

    Prints a table and writes all figures as JSON, an HTML page and, with matplotlib, a PNG. What was cut short is
    completed by --resume.
    """

    target: TargetOptions = field(default_factory=TargetOptions)
    load: LoadOptions = field(default_factory=LoadOptions)
    data: DataOptions = field(default_factory=DataOptions)
    to: OutputOptions = field(default_factory=OutputOptions)
    resume: Path | None = None
    """Complete the run of this JSON file, with its flags."""


@dataclass(frozen=True)
class CompareOptions:
    """Draw several runs of `ingle bench serve` in one picture, and print their ratios to the first."""

    files: Positional[tuple[Path, ...]]
    """Results, as --output wrote them."""
    labels: tuple[str, ...] = ()
    """Names of the runs, in their order. Default: the files'."""
    output: Path | None = None
    """Write the page here, with .png beside it. Default: bench-compare.html."""


class Level(NamedTuple):
    """One row of the table."""

    concurrency: int | None
    """Requests at once; None for no limit."""
    rate: float | None = None
    """Requests a second; None where the next begins as one ends."""

    @property
    def title(self) -> str:
        if self.rate is None:
            return str(self.concurrency)
        return f"{self.rate:g}/s"


def levels_of(load: LoadOptions) -> list[Level]:
    """Raises `ConfigError`."""
    counts = [int(number) for number in _numbers("--concurrency", load.concurrency, whole=True)]
    finite = [word for word in _apart(load.rate) if word.lower() not in ("inf", "infinity")]
    rates = _numbers("--rate", finite)
    if load.rate and not rates and not counts:
        if load.num_prompts is None:
            raise ConfigError("--rate inf sends all at once: say how many by --num-prompts or --concurrency")
        return [Level(load.num_prompts)]
    if not rates:
        return [Level(count) for count in counts or _DEFAULT_CONCURRENCIES]
    if len(counts) > 1:
        raise ConfigError("--rate takes one --concurrency, the most at once: give several of one of the two")
    return [Level(counts[0] if counts else None, rate) for rate in rates]


def _numbers(flag: str, words: Sequence[str], *, whole: bool = False) -> list[float]:
    found = []
    for word in _apart(words):
        try:
            number = float(int(word)) if whole else float(word)
        except ValueError:
            number = math.nan
        if not 0 < number < 1e6:
            kind = "whole numbers" if whole else "numbers"
            raise ConfigError(f"{flag} {word!r:.40}: give {kind} above 0, such as {flag} 1,2,4")
        found.append(number)
    if len(set(found)) < len(found):
        raise ConfigError(f"{flag} names a level twice")
    return found


def _apart(words: Sequence[str]) -> list[str]:
    return [word.strip() for each in words for word in each.split(",") if word.strip()]


def goodput_of(load: LoadOptions) -> dict[str, float]:
    """The seconds that each of ttft, tpot and e2el may take. Raises `ConfigError`."""
    targets = {}
    for word in _apart(load.goodput):
        name, _, value = word.partition(":")
        try:
            milliseconds = float(value)
        except ValueError:
            milliseconds = math.nan
        if name not in _TARGETS or not milliseconds > 0:
            raise ConfigError(f"--goodput {word!r:.40}: give milliseconds of {', '.join(_TARGETS)}: ttft:500,tpot:50")
        targets[name] = milliseconds / 1e3
    return targets


def endpoint_of(target: TargetOptions) -> str | None:
    """Its path behind `/v1/`. Raises `ConfigError`."""
    if target.endpoint is None:
        return None
    if target.endpoint not in _ENDPOINTS:
        raise ConfigError(f"--endpoint {target.endpoint!r:.60}: give chat or completions")
    return _ENDPOINTS[target.endpoint]


def dataset_of(data: DataOptions) -> str | None:
    """random, jsonl, sharegpt, or None for whatever the file is. Raises `ConfigError`."""
    if data.dataset_name is None:
        return None if data.dataset_path is not None else "random"
    if data.dataset_name not in _DATASETS:
        raise ConfigError(f"--dataset-name {data.dataset_name!r:.60}: give random, jsonl or sharegpt")
    name = _DATASETS[data.dataset_name]
    if (name == "random") != (data.dataset_path is None):
        raise ConfigError(
            f"--dataset-name {name} needs --dataset-path FILE"
            if data.dataset_path is None
            else "--dataset-name random makes its prompts up: leave --dataset-path out"
        )
    return name


def extra_of(data: DataOptions) -> dict[str, Any]:
    """Raises `ConfigError`."""
    if data.extra_body is None:
        return {}
    try:
        extra = json.loads(data.extra_body)
    except ValueError as error:
        raise ConfigError(f"--extra-body is no JSON: {error}") from None
    if not isinstance(extra, dict):
        raise ConfigError("--extra-body: give a JSON object, such as '{\"top_k\": 20}'")
    return extra


def check(options: ServeOptions) -> None:
    """Complains before anything is asked of a server. Raises `ConfigError`."""
    parse_address(options.target.base_url)
    endpoint_of(options.target)
    levels_of(options.load)
    goodput_of(options.load)
    dataset_of(options.data)
    extra_of(options.data)
    data, load = options.data, options.load
    least: dict[str, tuple[float | None, float]] = {
        "--input-len": (data.input_len, 1),
        "--output-len": (data.output_len, 1),
        "--num-prefixes": (data.num_prefixes, 1),
        "--prefix-len": (data.prefix_len, 0),
        "--turns": (data.turns, 1),
        "--think-time": (data.think_time, 0),
        "--num-prompts": (load.num_prompts, 1),
        "--num-warmups": (load.num_warmups, 0),
        "--request-timeout": (options.target.request_timeout, 0.001),
    }
    for flag, (value, low) in least.items():
        if value is not None and not value >= low:
            raise ConfigError(f"{flag} {value:g} is too small: give at least {low:g}")
    if options.to.output is not None and options.to.output.suffix in (".html", ".png"):
        raise ConfigError(f"--output {options.to.output}: give a .json file; the page and the picture go beside it")
    if not 0 <= data.range_ratio < 1:
        raise ConfigError(f"--range-ratio {data.range_ratio:g}: give a share from 0 to below 1")
