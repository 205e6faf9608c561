"""Errors whose message is shown to the user as it stands: what happened, which value, what to do."""

from __future__ import annotations


class IngleError(Exception):
    """Base of every error that ingle raises on purpose. The command line prints it as one line."""


class ConfigError(IngleError):
    """A flag or a configuration value cannot be used."""


class ModelError(IngleError):
    """A model's files are missing, damaged or of a kind that ingle does not run."""


class EngineError(IngleError):
    """The engine cannot go on: it died, stalled or refused to start."""


class VerificationError(IngleError):
    """A model is computed otherwise than by its reference."""


class RequestError(IngleError):
    """A request cannot be served as asked. HTTP answers 400 (or `status`) and the server goes on.

    `param` names the offending field as the client spelled it; `code` is a machine-readable slug.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param = param
        self.code = code
        self.status = status
