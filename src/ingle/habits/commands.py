"""The commands of other tools, and the flags that are typed with one command only."""

from __future__ import annotations

from collections.abc import Mapping

from ingle.habits.flags import Habit, Kind

ALIASES: Mapping[str, str] = {
    "ls": "list",
    "remove": "rm",
    "delete": "rm",
    "download": "pull",
    "info": "show",
    "run-batch": "batch",
}
"""What does the same here by another name."""

ANSWERS: Mapping[str, str] = {
    "create": "there are no Modelfiles: give the model's file or folder itself, `ingle serve PATH --served-model-name "
    "NAME`, with --chat-template FILE where it needs another",
    "cp": "a model gets another name where it is served: `ingle serve MODEL --served-model-name NAME`",
    "push": "ingle uploads nothing: `hf upload` brings a model to Hugging Face",
    "upload": "ingle uploads nothing: `hf upload` brings a model to Hugging Face",
    "signin": "no account is needed; for a model with terms set HF_TOKEN",
    "signout": "no account is needed; for a model with terms set HF_TOKEN",
    "login": "set HF_TOKEN to a token of yours",
    "logout": "unset HF_TOKEN",
    "whoami": "HF_TOKEN says who you are to Hugging Face",
    "complete": "`ingle generate MODEL PROMPT` continues a text",
    "collect-env": "`ingle doctor` says what is here and what is wrong, with --json for a report",
    "env": "`ingle doctor` says what is here and what is wrong, with --json for a report",
    "server": "`ingle serve MODEL`",
    "start": "`ingle serve MODEL`",
    "api-server": "`ingle serve MODEL`",
    "openai": "`ingle serve MODEL`",
    "controller": "there is no controller: `ingle serve MODEL` is a whole service",
    "worker": "there is no worker: `ingle serve MODEL` is a whole service",
    "cli": "`ingle chat MODEL`",
    "convert": "ingle converts nothing: it reads Hugging Face folders and .gguf files as they are",
    "perplexity": "`ingle verify MODEL` compares a model with transformers, token by token",
    "embed": "`ingle serve MODEL` answers /v1/embeddings; in Python, LLM(MODEL).embed(texts)",
    "embedding": "`ingle serve MODEL` answers /v1/embeddings; in Python, LLM(MODEL).embed(texts)",
    "rerank": "`ingle serve MODEL` answers /v1/rerank; in Python, LLM(MODEL).score(query, texts)",
    "kill": "`ingle stop NAME`, a port, or all",
    "scan-cache": "`ingle list`",
    "delete-cache": "`ingle rm NAME`",
    "benchmark": "`ingle bench throughput MODEL`, and `ingle bench serve` for a server under load",
    "bench-serving": "`ingle bench serve --base-url URL`",
}
"""What is not built, or goes by more than another name: the line to type instead."""


Row = tuple[str, Kind, str]


def _flags(*rows: Row) -> dict[str, Habit]:
    found = {}
    for names, kind, says in rows:
        for word in names.split():
            name = word.rstrip("=?")
            takes = word.removeprefix(name)
            assert takes in ("", "=", "?")
            found[name] = Habit(name, kind, says, "=" if takes == "=" else "?" if takes == "?" else "")
    return found


FLAGS_OF_COMMANDS: Mapping[str, Mapping[str, Habit]] = {
    "pull": _flags(
        ("--resume-download", "idle", "what was begun is always gone on with"),
        ("--local-dir-use-symlinks=", "idle", "there are no links to care for"),
        ("--repo-type=", "idle", "models are what is pulled"),
        ("--force-download --max-workers= --insecure", "idle", "there is no such choice"),
        (
            "--local-dir=",
            "refused",
            "models lie in one place, where every command finds them by their name: leave the flag out",
        ),
        ("--token=", "refused", "set HF_TOKEN: others see command lines"),
        ("--cache-dir=", "refused", "set HF_HUB_CACHE"),
    ),
    "rm": _flags(("-f --force", "same", "--yes")),
    "list": _flags(("-a --all", "idle", "all are listed")),
    "generate": _flags(("--verbose? -v", "idle", "answers come without timings")),
    "bench serve": _flags(
        ("--max-concurrency=", "same", "--concurrency"),
        ("--request-rate=", "same", "--rate"),
        ("--random-input-len= --prefix-repetition-suffix-len= --isl=", "same", "--input-len"),
        (
            "--random-output-len= --sharegpt-output-len= --custom-output-len= --prefix-repetition-output-len= --osl=",
            "same",
            "--output-len",
        ),
        ("--random-range-ratio=", "same", "--range-ratio"),
        ("--random-prefix-len= --prefix-repetition-prefix-len=", "same", "--prefix-len"),
        ("--prefix-repetition-num-prefixes=", "same", "--num-prefixes"),
        ("--served-model-name= --model-id=", "same", "--model"),
        ("--result-filename=", "same", "--output"),
        ("--url= --api-base= --host-url=", "same", "--base-url"),
        (
            "--backend= --endpoint-type=",
            "idle",
            "any server of OpenAI's API is asked; --endpoint says chat or completions",
        ),
        ("--save-result --save-detailed --streaming", "idle", "that is always so"),
        ("--percentile-metrics= --metric-percentiles=", "idle", "all of them are kept"),
        ("--disable-tqdm --trust-remote-code --ready-check-timeout-sec= --label=", "idle", "there is no such choice"),
        ("--host= --port=", "refused", "give --base-url http://HOST:PORT"),
        ("--burstiness= --ramp-up-strategy=", "refused", "arrivals are Poisson's, at one rate"),
        ("--result-dir=", "refused", "--output takes the whole path"),
    ),
    "serve": _flags(
        ("-p=", "refused", "a prompt is part of a request, and the port is --port"),
    ),
}
"""By command, beside those that all commands that load a model take."""
