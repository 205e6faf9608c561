"""Answers as they come, in a file that a later run goes on with."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import msgspec

from ingle.errors import ConfigError
from ingle.eval.scoring import Score

ANSWERS = "answers.jsonl"


class Asking(msgspec.Struct, frozen=True, kw_only=True):
    """What all cases are asked with."""

    max_tokens: int
    temperature: float
    seed: int
    system: str | None

    def fingerprint(self, case: str) -> str:
        """Of a case asked so."""
        return hashlib.sha256(case.encode() + msgspec.json.encode(self)).hexdigest()[:16]


class Answer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one model said to one case."""

    model: str
    id: str
    fingerprint: str
    text: str = ""
    score: Score | None = None
    """None where a judge is still to be asked."""
    error: str | None = None
    """The server refused."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    begun: float = 0.0
    """Seconds since 1970, as is `ended`."""
    ended: float = 0.0

    @property
    def is_right(self) -> bool:
        return self.score is not None and self.score.right


class Record:
    """All answers so far, by model and case. `add` writes each to the file at once."""

    def __init__(self, file: IO[bytes], answers: Sequence[Answer]) -> None:
        self._file = file
        self.answers = {(each.model, each.id): each for each in answers}

    def add(self, answer: Answer) -> None:
        self.answers[answer.model, answer.id] = answer
        self._file.write(msgspec.json.encode(answer) + b"\n")
        self._file.flush()

    def of(self, model: str, case_id: str, fingerprint: str) -> Answer | None:
        """Unless the case or what it was asked with has changed since."""
        found = self.answers.get((model, case_id))
        return found if found is not None and found.fingerprint == fingerprint else None


@contextlib.contextmanager
def kept(folder: Path, *, resume: bool, overwrite: bool) -> Iterator[Record]:
    """The record of `folder`, locked. Raises `ConfigError` for one that holds answers that nobody spoke of."""
    path = folder / ANSWERS
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if overwrite:
                file.truncate(0)
            file.seek(0)
            data = file.read()
            if data and not resume:
                raise ConfigError(f"{path} has answers already: --resume goes on with them, --overwrite begins anew")
            whole, _, torn = data.rpartition(b"\n")  # of a run that was killed as it wrote
            if torn:
                file.truncate(len(data) - len(torn))
            yield Record(file, _decoded(path, whole))
    except BlockingIOError:
        raise ConfigError(f"{path}: another `ingle eval` writes to it") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None


def _decoded(path: Path, data: bytes) -> list[Answer]:
    try:
        return [msgspec.json.decode(line, type=Answer) for line in data.split(b"\n") if line.strip()]
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not of `ingle eval`: {error}; --overwrite begins anew") from None
