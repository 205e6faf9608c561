"""Who is asked: a server at an address, or a model of this machine, for which one is started meanwhile."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from ingle.errors import ConfigError, EngineError, printable

_READY_S = 1800.0
_POLL_S = 0.05
_STOP_S = 20.0


@dataclass(frozen=True)
class Target:
    """As `--model` names it: a model's name, or http://host:8000, with #model where several are served."""

    given: str

    @property
    def url(self) -> str | None:
        """Of a server that runs, without /v1."""
        if not self.given.startswith(("http://", "https://")):
            return None
        return self.given.partition("#")[0].rstrip("/").removesuffix("/v1").rstrip("/")

    @property
    def model(self) -> str | None:
        """As the server calls it; None for the only one, or the first."""
        return self.given.partition("#")[2] or None if self.url else None


def targets_of(given: Sequence[str], what: str = "--model") -> list[Target]:
    """Raises `ConfigError`."""
    targets = [Target(each) for each in given]
    for target in targets:
        if target.url is not None and not urllib.parse.urlsplit(target.url).hostname:
            raise ConfigError(f"{what} {target.given!r:.80} has no host: give http://host:8000")
        if targets.count(target) > 1:
            raise ConfigError(f"{what} {target.given!r:.80} is given twice")
    return targets


@dataclass(frozen=True)
class Asked:
    """A server that answers now."""

    name: str
    """As reports call it."""
    model: str
    client: Callable[[], httpx.AsyncClient]


@contextlib.contextmanager
def reached(target: Target, serve: Sequence[str], timeout_s: float, report: Callable[[str], None]) -> Iterator[Asked]:
    """`serve` are flags of the server that is started for a model of this machine. Raises `EngineError`."""
    if target.url is not None:
        yield _asked(target, target.url, None, timeout_s)
        return
    with (
        tempfile.TemporaryDirectory(prefix="ingle-eval-") as folder,
        _served(target, serve, Path(folder), report) as at,
    ):
        yield _asked(target, "http://localhost", at, timeout_s)


def _asked(target: Target, url: str, socket: str | None, timeout_s: float) -> Asked:
    key = os.environ.get("INGLE_API_KEY") or os.environ.get("OPENAI_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key and socket is None else {}
    timeout = httpx.Timeout(10.0, read=timeout_s)

    def client() -> httpx.AsyncClient:
        transport = httpx.AsyncHTTPTransport(uds=socket, limits=httpx.Limits(max_connections=None))
        return httpx.AsyncClient(base_url=url, transport=transport, headers=headers, timeout=timeout)

    with httpx.Client(base_url=url, transport=httpx.HTTPTransport(uds=socket), headers=headers, timeout=30.0) as once:
        try:
            response = once.get("/v1/models")
            response.raise_for_status()
            names = [str(card["id"]) for card in response.json()["data"]]
        except httpx.HTTPStatusError as error:
            raise EngineError(f"{url}/v1/models answers {error.response.status_code}{_hint(error.response)}") from None
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            raise EngineError(f"{url} does not answer as an OpenAI-compatible server: {error}") from None
    if not names:
        raise EngineError(f"{url} serves no model")
    if target.model is not None and target.model not in names:
        raise EngineError(f"{url} serves {printable(', '.join(names[:10]))}, and no {target.model!r}")
    return Asked(target.given, target.model or names[0], client)


def _hint(response: httpx.Response) -> str:
    return ": INGLE_API_KEY or OPENAI_API_KEY holds its key" if response.status_code in (401, 403) else ""


@contextlib.contextmanager
def _served(target: Target, flags: Sequence[str], folder: Path, report: Callable[[str], None]) -> Iterator[str]:
    """The path of a socket where `ingle serve` answers, which ends with the block."""
    at, log = str(folder / "socket"), folder / "log"
    command = [sys.executable, "-m", "ingle", "serve", target.given, "--uds", at, *flags]
    report(f"starting {target.given}")
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        _wait_ready(process, at, log, target)
        yield at
    finally:
        process.terminate()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_ready(process: subprocess.Popen[bytes], at: str, log: Path, target: Target) -> None:
    deadline = time.monotonic() + _READY_S
    with httpx.Client(transport=httpx.HTTPTransport(uds=at), base_url="http://localhost", timeout=10.0) as client:
        while True:
            if process.poll() is not None:
                lines = log.read_text(errors="replace").strip().splitlines()
                said = next((line for line in reversed(lines) if line.startswith("ingle:")), "".join(lines[-1:]))
                raise EngineError(f"{target.given} is not served: {printable(said.removeprefix('ingle: '))}")
            with contextlib.suppress(httpx.HTTPError):
                if client.get("/health/ready").status_code == 200:
                    return
            if time.monotonic() > deadline:
                raise EngineError(f"{target.given} was not served within {_READY_S:g} s")
            time.sleep(_POLL_S)
