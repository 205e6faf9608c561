"""`ingle batch`: a file of requests, as for OpenAI's batches, answered offline, and gone on with if cut off."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from tyro.conf import Positional

from ingle.cli.flags import parse
from ingle.config import EngineConfig, ServeConfig, ServerConfig, TextConfig
from ingle.errors import ConfigError, EngineError, printable
from ingle.limits import OFFLINE
from ingle.server.engine_process import EngineProcess

if TYPE_CHECKING:
    from ingle.hub.source import ModelSource
    from ingle.server.batch.lines import Line
    from ingle.server.batch.records import OutputLine
    from ingle.server.fleet import Fleet

_TOLD_EVERY_S = 10.0
"""How far it is, where no terminal shows it all the time."""
_MOST_AT_ONCE = 512
_MAX_TOLD = 10
"""Wrong lines that one error names."""


@dataclass(frozen=True)
class BatchFiles:
    """What is asked, and where the answers go."""

    input: Positional[str | None] = None
    """A .jsonl file with a request in each line, as OpenAI's batches have them:
    {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [...]}}."""
    output: Positional[str | None] = None
    """File for the answers, one JSON object a line, in the order in which they come. What is in it is not asked again,
    so the same command goes on with what was cut off."""
    input_file: str | None = None
    """The same as INPUT."""
    output_file: str | None = None
    """The same as OUTPUT."""
    served_model_name: tuple[str, ...] = ()
    """Names of the model in the requests. Default: the model as given."""
    retry_failed: bool = False
    """Ask those lines again whose answers in OUTPUT are errors."""


@dataclass(frozen=True)
class BatchCommand:
    """Answer a file of requests without a server: ingle batch INPUT OUTPUT --model MODEL.

    Requests and answers are those of OpenAI's batch API and of `vllm run-batch`: chat, completions, embeddings, and
    what else /v1 answers. A line that cannot be answered gets an error in its place.
    """

    engine: EngineConfig
    text: TextConfig
    io: BatchFiles


def main(argv: Sequence[str]) -> None:
    flags = parse(BatchCommand, argv, command="batch")
    input_path, output_path = _paths(flags)
    server = ServerConfig(served_model_name=flags.io.served_model_name)
    with EngineProcess() as process:  # at once: it imports while this process reads lines
        models = _check_lines(input_path)
        from ingle.hub.resolve import ensure_model

        source = ensure_model(flags.engine.model)
        config = ServeConfig(flags.engine, flags.text, server)
        _check_models(config, source, models, input_path)
        with _output(output_path, retry_failed=flags.io.retry_failed) as (output, done):
            lines = sum(models.values())
            if done:
                print(f"ingle: {len(done)} of {lines} lines are answered in {output_path} already", file=sys.stderr)
            if len(done) < lines:
                _run(process, config, source, _Work(input_path, output, done, lines))


# ---- before the model is loaded


def _paths(flags: BatchCommand) -> tuple[Path, Path]:
    """Raises `ConfigError`."""
    io = flags.io
    names = [io.input_file or io.input, io.output_file or (io.input if io.input_file else io.output)]
    if flags.engine.model.endswith(".jsonl"):
        raise ConfigError("give the model as --model: ingle batch INPUT OUTPUT --model MODEL")
    for name, what in zip(names, ("INPUT", "OUTPUT"), strict=True):
        if not name:
            raise ConfigError(f"ingle batch needs an {what}: ingle batch INPUT OUTPUT --model MODEL")
        if "://" in name:
            raise ConfigError(f"{what} {name!r:.80} is no file of this machine: fetch it first")
    given, output = Path(str(names[0])), Path(str(names[1]))
    if not given.is_file():
        raise ConfigError(f"INPUT {given}: there is no such file")
    if not output.absolute().parent.is_dir():
        raise ConfigError(f"OUTPUT {output}: there is no folder {output.absolute().parent}")
    if output.exists() and (not output.is_file() or output.samefile(given)):
        raise ConfigError(f"OUTPUT {output} is {'INPUT itself' if output.is_file() else 'no file'}")
    return given, output


def _check_lines(path: Path) -> dict[str | None, int]:
    """How many lines ask for each model. Raises `ConfigError` for what is no request."""
    from ingle.server.batch.lines import ENDPOINTS, BadLine, line_of, read_lines

    models, seen, wrong = dict[str | None, int](), dict[str, int](), list[str]()
    with path.open("rb") as file:
        for number, data in read_lines(file):
            try:
                line, model = line_of(data, ENDPOINTS)
                if (first := seen.setdefault(line.custom_id, number)) != number:
                    raise BadLine("duplicate_custom_id", f"custom_id is that of line {first}")
            except BadLine as error:
                wrong.append(f"{path}, line {number}: {printable(str(error))}")
                continue
            models[model] = models.get(model, 0) + 1
    if not models and not wrong:
        raise ConfigError(f"{path}: it has no line")
    if wrong:
        more = f"; and {len(wrong) - _MAX_TOLD} lines more" if len(wrong) > _MAX_TOLD else ""
        raise ConfigError("; ".join(wrong[:_MAX_TOLD]) + more)
    return models


def _check_models(config: ServeConfig, source: ModelSource, models: dict[str | None, int], path: Path) -> None:
    """Raises `ConfigError` for lines that ask for another model."""
    from ingle.server.names import ServedNames, served_names

    names = served_names(source, config.engine.model)
    if config.server.served_model_name:
        names = ServedNames(config.server.served_model_name)
    others = [model for model in models if model is not None and model not in (*names.shown, *names.also)]
    if others:
        shown = printable(f"{others[0]!r:.100}")
        raise ConfigError(
            f"{path}: {models[others[0]]} lines ask for the model {shown}, and this one is {names.shown[0]}: "
            f"--served-model-name gives it that name"
        )


@contextlib.contextmanager
def _output(path: Path, *, retry_failed: bool) -> Iterator[tuple[IO[bytes], set[str]]]:
    """The file, open at its end and locked, and what it has. Raises `ConfigError`."""
    from ingle.server.batch.lines import done_ids

    try:
        with path.open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            done = done_ids(path)
            if retry_failed:
                _drop_failed(path)
                done = done_ids(path)
            with path.open("ab") as file:
                yield file, done
    except BlockingIOError:
        raise ConfigError(f"OUTPUT {path}: another `ingle batch` writes to it") from None
    except ValueError as error:
        raise ConfigError(f"OUTPUT {error}") from None
    except OSError as error:
        raise ConfigError(f"OUTPUT {path}: {error.strerror}") from None


def _drop_failed(path: Path) -> None:
    """Takes the errors out of a file of answers: by a copy first, so that nothing is lost."""
    copy = path.with_name(f"{path.name}.part")
    with path.open("rb") as old, copy.open("wb") as new:
        for data in old:
            response = json.loads(data).get("response")
            if response and response.get("status_code", 500) < 400:
                new.write(data)
        new.flush()
        os.fsync(new.fileno())
    with copy.open("rb") as new, path.open("r+b") as old:  # the same file, which is locked
        while piece := new.read(1 << 20):
            old.write(piece)
        old.truncate()
    copy.unlink()


# ---- the run


@dataclass
class _Work:
    input: Path
    output: IO[bytes]
    done: set[str]
    num_lines: int
    num_failed: int = 0

    def lines(self) -> Iterator[Line]:
        from ingle.server.batch.lines import ENDPOINTS, line_of, read_lines

        with self.input.open("rb") as file:
            for _, data in read_lines(file):
                line, _ = line_of(data, ENDPOINTS)
                if line.custom_id not in self.done:
                    yield line

    def take(self, result: OutputLine, written: bytes) -> None:
        self.done.add(result.custom_id)
        self.num_failed += result.response is None or result.response.status_code >= 400
        self.output.write(written + b"\n")
        self.output.flush()


def _run(process: EngineProcess, config: ServeConfig, source: ModelSource, work: _Work) -> None:
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "1")
    from ingle.server.fleet import Fleet

    fleet = Fleet(process, config.engine)
    fleet.load(Path(source.path))
    import uvloop

    from ingle.text.sandbox import sandboxes

    try:
        with fleet:
            uvloop.run(_answer_all(fleet, config, source, work))
    except KeyboardInterrupt:
        print(f"\ningle: {len(work.done)} of {work.num_lines} lines are answered: the same command goes on",
              file=sys.stderr)  # fmt: skip
        raise
    finally:
        sandboxes.stop()


async def _answer_all(fleet: Fleet, config: ServeConfig, source: ModelSource, work: _Work) -> None:
    import msgspec

    from ingle.server.access import Access
    from ingle.server.app import create_app
    from ingle.server.batch.lines import answer_patiently, answers_of
    from ingle.server.batch.running import spread
    from ingle.server.load_model import load_model
    from ingle.server.models import ModelPool

    told = _Told(work)
    model = await load_model(fleet.engines, config, source, told.report)
    try:
        for notice in [*model.info.notices, *model.text.notices, *model.tokenizer.hold_against(model.info.vocab_size)]:
            told.line(f"notice: {printable(notice)}")
        app = create_app(ModelPool([model]), Access(), access_log=False, limits=OFFLINE)
        answers, most = answers_of(app), min(2 * model.info.max_num_seqs, _MOST_AT_ONCE)
        async with contextlib.aclosing(
            spread(work.lines(), lambda line: answer_patiently(app, answers, line), most)
        ) as results:
            async for result in results:
                work.take(result, msgspec.json.encode(result))
                told.progress()
    except EngineError as error:
        so_far = f"{len(work.done)} of {work.num_lines} lines are answered: the same command goes on"
        raise EngineError(f"{error}; {so_far}") from error
    finally:
        await model.engine.close()
    told.end()


class _Told:
    """What stderr is told: on a terminal all the time, elsewhere now and then."""

    def __init__(self, work: _Work) -> None:
        self._work = work
        self._alive = sys.stderr.isatty()
        self._num_before = len(work.done)
        self._started = self._last = time.monotonic()

    def report(self, stage: str) -> None:
        if self._alive:
            print(f"\r\x1b[K{printable(stage)}", end="", file=sys.stderr, flush=True)

    def line(self, text: str) -> None:
        print(f"\r\x1b[K{text}" if self._alive else text, file=sys.stderr, flush=True)

    def progress(self) -> None:
        now = time.monotonic()
        if self._alive:
            print(f"\r\x1b[K{self._state(now)}", end="", file=sys.stderr, flush=True)
        elif now - self._last >= _TOLD_EVERY_S:
            self._last = now
            self.line(f"ingle: {self._state(now)}")

    def end(self) -> None:
        work = self._work
        failed = f", {work.num_failed} of them with an error" if work.num_failed else ""
        self.line(f"ingle: {len(work.done)} of {work.num_lines} lines are answered{failed}")

    def _state(self, now: float) -> str:
        done, seconds = len(self._work.done), max(now - self._started, 1e-9)
        return f"{done} of {self._work.num_lines} lines, {(done - self._num_before) / seconds:,.1f} a second"
