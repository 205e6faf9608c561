"""`ingle pull`: fetch models onto this machine."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from tyro.conf import Positional

from ingle.cli.ending import in_order
from ingle.cli.flags import parse
from ingle.errors import ConfigError, ModelError
from ingle.hub.progress import Progress, QuietProgress, show_progress
from ingle.hub.resolve import pull_model
from ingle.hub.source import Wanted


@dataclass(frozen=True)
class Pull:
    """Fetch models onto this machine: what ingle needs of them, as far as it is not here.

    Those of a hub go where its own tools keep them, others into $INGLE_HOME. Interrupted, it goes on when typed again.

    Of a model that is here already the hub is asked for a newer state.
    """

    names: Positional[tuple[str, ...]] = ()
    """As `ingle serve` takes them: qwen3:0.6b, org/name, org/name@revision, org/name:Q4_K_M of a GGUF repository,
    modelscope:org/name, the URL of a .gguf file."""
    hub: str | None = None
    """Where org/name lies: huggingface or modelscope. Default: $INGLE_HUB, else huggingface."""
    revision: str | None = None
    """Branch, tag or commit."""
    include: tuple[str, ...] = ()
    """Patterns of the files to take, in place of those that ingle needs: '*.json' 'tokenizer*'."""
    exclude: tuple[str, ...] = ()
    """Patterns of files to leave out."""
    quiet: bool = False
    """Print the place of each model and nothing else."""


def main(argv: Sequence[str]) -> None:
    flags = parse(Pull, argv, command="pull")
    if not flags.names:
        raise ConfigError("ingle pull needs a MODEL: `ingle pull smollm2:135m` (see `ingle pull --help`)")
    failed = []
    for name in flags.names:
        try:
            with in_order():
                _pull(name, flags)
        except KeyboardInterrupt:
            print("interrupted: what has come stays, and the same command goes on from there", file=sys.stderr)
            raise
        except ModelError as error:
            if len(flags.names) == 1:
                raise
            print("ingle:", *error.lines(), file=sys.stderr)
            failed.append(name)
    if failed:
        raise ModelError(f"{len(failed)} of {len(flags.names)} models were not pulled: {', '.join(failed)}")


def _pull(name: str, flags: Pull) -> None:
    wanted = Wanted(flags.include, flags.exclude) if flags.include or flags.exclude else None
    quiet: Progress = QuietProgress()
    with nullcontext(quiet) if flags.quiet else show_progress() as progress:
        source = pull_model(name, progress, hub=flags.hub, revision=flags.revision, wanted=wanted)
    print(source.path if flags.quiet else f"{source.name} is here: {source.path}")
