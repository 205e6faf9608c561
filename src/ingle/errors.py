"""Errors whose message is shown to the user as it stands: what happened, which value, what to do."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager


def printable(text: str, *, keep: str = "") -> str:
    """`text` with all that is not to be seen spelled out, such as \\x1b, but for the characters in `keep`.

    What a model's files say may hold escapes that a terminal obeys, and line feeds that forge a log.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


class IngleError(Exception):
    """Base of every error that ingle raises on purpose. The command line prints it as one line.

    Whatever its message quotes, it is safe to show. `alternative` is what to do instead, where the message does not
    say so itself.
    """

    def __init__(self, message: str, *, alternative: str | None = None) -> None:
        self.what = printable(message, keep="\n\t")
        self.alternative = None if alternative is None else printable(alternative)
        super().__init__(self.what if self.alternative is None else f"{self.what}; {self.alternative}")

    def lines(self) -> list[str]:
        """As people read it."""
        return [" ".join(str(self).split())]


class ConfigError(IngleError):
    """A flag or a configuration value cannot be used."""


class ModelError(IngleError):
    """A model's files are missing, damaged or of a kind that ingle does not run."""


class Refusals(ModelError):
    """Several things at once that do not run here."""

    def __init__(self, errors: Sequence[IngleError]) -> None:
        self.errors = tuple(inner for error in errors for inner in errors_in(error))
        super().__init__(f"{len(self.errors)} things do not run here: " + " · ".join(map(str, self.errors)))

    def lines(self) -> list[str]:
        listed = [f"  - {line}" for error in self.errors for line in error.lines()]
        return [f"{len(self.errors)} things do not run here:", *listed]


def errors_in(error: IngleError) -> tuple[IngleError, ...]:
    """Each by itself."""
    return error.errors if isinstance(error, Refusals) else (error,)


class Collected:
    """What is wrong with a model or with flags, found out one after the other and told at once."""

    def __init__(self) -> None:
        self.errors: list[IngleError] = []

    @contextmanager
    def apart(self, alternative: str | None = None) -> Iterator[None]:
        """Keeps a `ModelError` or `ConfigError` that is raised inside, with `alternative` where it brings none: what
        comes after does not need what is done inside."""
        try:
            yield
        except (ModelError, ConfigError) as error:
            for inner in errors_in(error):
                if alternative is not None and inner.alternative is None:
                    inner = type(inner)(inner.what, alternative=alternative)
                self.add(inner)

    def add(self, error: IngleError) -> None:
        """Unless it is there already, found in another place."""
        if all(error.what != other.what for other in self.errors):
            self.errors.append(error)

    def raise_any(self) -> None:
        """Raises the one error as it stands, and several as `Refusals`."""
        if len(self.errors) == 1:
            raise self.errors[0]
        if self.errors:
            raise Refusals(self.errors)


class EngineError(IngleError):
    """The engine cannot go on: it died, stalled or refused to start."""

    def __init__(self, message: str, *, retry_after_s: int | None = None) -> None:
        """`retry_after_s`: when to ask again, where another engine is on its way."""
        super().__init__(message)
        self.retry_after_s = retry_after_s


class AnswerLost(EngineError):
    """The engine died while it computed the answer, which may be why."""


class VerificationError(IngleError):
    """A model is computed otherwise than by its reference."""


class RequestError(IngleError):
    """A request cannot be served as asked. HTTP answers 400 (or `status`) and the server goes on.

    `param` names the offending field as the client spelled it; `code` is a machine-readable slug; `headers` go with the
    answer.
    """

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        status: int = 400,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.param = param
        self.code = code
        self.status = status
        self.headers = {} if headers is None else dict(headers)


_LEFT_OUT = ("torch", "transformers")
"""What a source tree's `make run` does not install where a CPU does without it."""


def lack_of_package(error: BaseException) -> EngineError | None:
    """The error in words for people, if it is that PyTorch or transformers is needed and not installed."""
    if not isinstance(error, ModuleNotFoundError) or error.name not in _LEFT_OUT:
        return None
    return EngineError(
        f"this needs {error.name}, which is not installed: run `make setup` in ingle's source tree, or "
        "`pip install torch transformers`"
    )


def lack_of_disk(error: BaseException) -> str | None:
    """In words, if it is that a disk, or somebody's share of it, is full."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "the disk is full" if error.errno == errno.ENOSPC else str(error.strerror)
    return None


_LACK_OF_MEMORY = ("cannot allocate memory", "can't allocate memory", "failed to map segment", "can't start new thread")
"""How the C library, PyTorch, the dynamic linker and Python say so."""
_OF_A_GPU = ("cuda", "hip ", "nccl")


def lack_of_memory(error: BaseException) -> EngineError | None:
    """The error in words for people, if it is that memory lacks, whoever says so."""
    text = str(error).lower()
    if "out of memory" in text and any(part in text for part in _OF_A_GPU):
        import re

        wanted = re.search(r"tried to allocate ([\d.]+ [kmgt]?i?b)\b", str(error), re.IGNORECASE)
        asked = "" if wanted is None else f" as {wanted[1]} more were needed"
        return EngineError(
            f"the GPU's memory ran out{asked}: free some (nvidia-smi says who has it), take a smaller model, or give "
            "less by --gpu-memory-utilization or --kv-cache-memory"
        )
    if not isinstance(error, MemoryError) and not any(part in text for part in _LACK_OF_MEMORY):
        return None
    import resource

    allowed, _ = resource.getrlimit(resource.RLIMIT_AS)
    if allowed == resource.RLIM_INFINITY:
        return EngineError("there is not enough memory: free some, or take a smaller model or --kv-cache-memory")
    return EngineError(f"there is not enough memory: `ulimit -v` allows this process {allowed >> 20} MiB, give it more")
