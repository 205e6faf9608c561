"""`ingle pull`: fetch a model into the local store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ingle.cli.flags import parse
from ingle.hub.progress import show_progress
from ingle.hub.pull import pull_model


@dataclass(frozen=True)
class Pull:
    """Fetch a model into the local store, $INGLE_HOME or ~/.cache/ingle. A model that is there is left alone."""

    name: str
    """Short name, such as smollm2:135m."""


def main(argv: Sequence[str]) -> None:
    flags = parse(Pull, argv, command="pull")
    with show_progress() as progress:
        model = pull_model(flags.name, progress)
    print(f"{model.manifest.name} is in the store: {model.path}")
