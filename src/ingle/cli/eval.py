"""`ingle eval`: one's own cases put to one or several models."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from ingle.cli.flags import parse
from ingle.cli.table import print_table
from ingle.errors import ConfigError, EngineError, printable

if TYPE_CHECKING:
    from rich.progress import Progress

    from ingle.eval.cases import Case, Scoring
    from ingle.eval.record import Answer, Asking, Record
    from ingle.eval.results import Results, Share
    from ingle.eval.targets import Target

_MOST_AT_ONCE = 1024
_TOLD_EVERY_S = 10.0
"""How far it is, where no terminal shows it all the time."""


@dataclass(frozen=True)
class Eval:
    """Put cases of one's own to models, and say which has how many right: ingle eval CASES --model MODEL.

    A case is a line of JSON, {"prompt": "What is 17 + 25?", "expected": 42, "scoring": "numeric", "tags": ["sums"]}, or
    a row of CSV with those columns. Scoring is exact, contains, regex, json, numeric, choice, likelihood or judge. A
    table, results.json and report.html come of it. Words after -- are for `ingle serve`, which runs models of this
    machine meanwhile.
    """

    cases: Positional[tuple[Path, ...]]
    """Files of cases: .jsonl or .csv."""
    model: tuple[str, ...] = ()
    """A model's name, or the address of a server: http://host:8000, with #model where it serves several, and its key in
    INGLE_API_KEY. Several are compared."""
    output: Path | None = None
    """Folder for answers, results and report. Default: eval-NAME, NAME being that of the file."""
    resume: bool = False
    """Go on with what the folder has: no case is asked twice."""
    overwrite: bool = False
    """Forget what the folder has."""
    retry_errors: bool = False
    """With --resume: ask those cases again that a server refused."""
    scoring: str = "exact"
    """Of cases that say none."""
    judge: str | None = None
    """The model or address that judges cases of scoring judge."""
    concurrency: int = 8
    """Cases asked at once."""
    timeout: float = 600.0
    """Seconds that an answer may take. Then it is asked for again; after some tries the server is taken to be gone."""
    max_tokens: int = 512
    """Of an answer, where the case says nothing else."""
    temperature: float = 0.0
    """0 takes the likeliest token each time."""
    seed: int = 0
    """For temperatures above 0."""
    system: str | None = None
    """System prompt for cases that bring none."""
    limit: int | None = None
    """Only so many cases, the first ones."""


def main(argv: Sequence[str]) -> None:
    words = list(argv)
    serve = words[words.index("--") + 1 :] if "--" in words else []
    flags = parse(Eval, words[: words.index("--")] if "--" in words else words, command="eval")
    _check(flags)
    from ingle.eval.cases import read_cases
    from ingle.eval.record import Asking, kept
    from ingle.eval.targets import targets_of

    cases = read_cases(flags.cases, scoring=_scoring(flags.scoring))[: flags.limit]
    targets, judges = targets_of(flags.model), targets_of([flags.judge] if flags.judge else [], "--judge")
    if not judges and (unjudged := next((case for case in cases if case.scoring.kind == "judge"), None)):
        raise ConfigError(f"case {unjudged.id!r:.60} needs a judge: --judge MODEL, or an address")
    asking = Asking(max_tokens=flags.max_tokens, temperature=flags.temperature, seed=flags.seed, system=flags.system)
    folder = flags.output or Path(f"eval-{flags.cases[0].stem}")
    with kept(folder, resume=flags.resume, overwrite=flags.overwrite) as record:
        run = _Run(flags, serve, cases, asking, record)
        gone: list[EngineError] = []
        try:
            gone = run.all(targets, judges)
        finally:  # also of what was answered before somebody pressed Ctrl-C
            results = _write(folder, run, [target.given for target in targets], ["ingle", "eval", *argv])
    for error in gone:
        print(f"ingle: {error}", file=sys.stderr)
    missing = sum(model.num_missing for model in results.models)
    if missing:
        raise EngineError(f"{missing} of {len(cases) * len(targets)} answers are missing: --resume goes on")


def _check(flags: Eval) -> None:
    if not flags.model:
        raise ConfigError("whom shall I ask? --model MODEL, or the address of a server; several are compared")
    for name, least, most in (("concurrency", 1, _MOST_AT_ONCE), ("max_tokens", 1, None), ("limit", 1, None)):
        value = getattr(flags, name)
        if value is not None and (value < least or (most is not None and value > most)):
            bound = f"at least {least}" if value < least else f"at most {most}"
            raise ConfigError(f"--{name.replace('_', '-')} {value}: give {bound}")
    if not flags.timeout > 0:
        raise ConfigError(f"--timeout {flags.timeout}: give seconds")
    if not 0 <= flags.temperature <= 2:
        raise ConfigError(f"--temperature {flags.temperature}: give 0 to 2")
    if flags.resume and flags.overwrite:
        raise ConfigError("--resume goes on with what --overwrite forgets: give one of them")


def _scoring(kind: str) -> Scoring:
    import msgspec

    from ingle.eval.cases import Scoring

    try:
        return msgspec.convert({"type": kind}, Scoring)
    except msgspec.ValidationError as error:
        raise ConfigError(f"--scoring {kind!r:.40}: {error}") from None


@dataclass(frozen=True)
class _Run:
    flags: Eval
    serve: Sequence[str]
    cases: Sequence[Case]
    asking: Asking
    record: Record

    def all(self, targets: Sequence[Target], judges: Sequence[Target]) -> list[EngineError]:
        """What is missing, model by model, and then verdicts. Returns those servers that went away."""
        from ingle.eval.ask import ask_all, judge_all

        gone = list[EngineError]()
        with _progress() as progress:
            for target in targets:
                missing = self._missing(target.given)
                ask = partial(ask_all, cases=missing)
                self._put(progress, target, target.given, len(missing), ask, gone)
            for judge in judges:
                waiting = [pair for target in targets for pair in self._unjudged(target.given)]
                ask_judge = partial(judge_all, answers=waiting)
                self._put(progress, judge, f"judge {judge.given}", len(waiting), ask_judge, gone)
        return gone

    def _put(
        self, progress: Progress, target: Target, name: str, num: int, ask: Callable[..., Coroutine[Any, Any, None]],
        gone: list[EngineError],
    ) -> None:  # fmt: skip
        from ingle.eval.targets import reached

        if num == 0:
            return
        told = _Told(progress, name, num)
        most = self.flags.concurrency
        try:
            with told, reached(target, self.serve, self.flags.timeout, told.stage) as asked:
                told.stage(name)
                asyncio.run(ask(asked, asking=self.asking, record=self.record, concurrency=most, told=told.one))
        except EngineError as error:  # the others are asked all the same
            gone.append(error)

    def _missing(self, model: str) -> list[Case]:
        found = ((case, self._answer(model, case)) for case in self.cases)
        again = self.flags.retry_errors
        return [case for case, answer in found if answer is None or (again and answer.error is not None)]

    def _unjudged(self, model: str) -> list[tuple[Case, Answer]]:
        found = ((case, self._answer(model, case)) for case in self.cases)
        return [(case, answer) for case, answer in found if answer is not None and answer.score is None]

    def _answer(self, model: str, case: Case) -> Answer | None:
        return self.record.of(model, case.id, self.asking.fingerprint(case.fingerprint))


class _Told:
    """What stderr is told of one model: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, progress: Progress, name: str, num: int) -> None:
        self._progress, self._name, self._num, self._done = progress, name, num, 0
        self._task = progress.add_task(name, total=num)
        self._last = time.monotonic()

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        self._progress.stop_task(self._task)
        if self._progress.disable:
            print(f"{self._name}: {self._done} of {self._num}", file=sys.stderr)

    def stage(self, text: str) -> None:
        self._progress.update(self._task, description=printable(text))

    def one(self) -> None:
        self._done += 1
        self._progress.advance(self._task)
        if self._progress.disable and time.monotonic() - self._last >= _TOLD_EVERY_S:
            self._last = time.monotonic()
            print(f"{self._name}: {self._done} of {self._num}", file=sys.stderr, flush=True)


def _progress() -> Progress:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TimeRemainingColumn())  # fmt: skip
    return Progress(*columns, console=console, disable=not console.is_terminal)


def _write(folder: Path, run: _Run, models: Sequence[str], command: Sequence[str]) -> Results:
    from ingle.eval.report import page
    from ingle.eval.results import figures, results_of

    results = results_of(run.cases, models, run.asking, run.record)
    title = f"{', '.join(path.name for path in run.flags.cases)}: {', '.join(models)}"
    told = json.dumps(figures(results, run.asking, command), indent=1, ensure_ascii=False)
    if not any(model.answers for model in results.models):
        return results
    (folder / "results.json").write_text(told + "\n", encoding="utf-8")
    (folder / "report.html").write_text(page(results, run.asking, title), encoding="utf-8")
    _print(results)
    print(f"\n{folder / 'report.html'} has every wrong case, {folder / 'results.json'} the figures")
    return results


def _print(results: Results) -> None:
    rows = list[list[str]]()
    for model in results.models:
        if not model.answers:
            continue
        rows.append([
            model.name, "all", *_cells(model.every), f"{model.num_errors}", f"{model.prompt_tokens:,}",
            f"{model.completion_tokens:,}", f"{model.seconds:.1f}",
        ])  # fmt: skip
        rows += [["", tag, *_cells(share), "", "", "", ""] for tag, share in model.tags.items() if share.num]
    head = ["model", "tag", "right", "accuracy", "95% interval", "score", "errors", "tokens in", "out", "seconds"]
    print_table(head, rows, right={2, 3, 4, 5, 6, 7, 8, 9})
    for pair in results.pairs:
        (low, high), paired = pair.paired.interval, pair.paired
        meaning = "more than noise" if paired.is_more_than_noise else "may be noise"
        print(
            f"\n{printable(pair.second)} against {printable(pair.first)}, {paired.num} cases: "
            f"{100 * paired.difference:+.1f} points ({100 * low:+.1f} to {100 * high:+.1f}), alone right "
            f"{paired.only_second} against {paired.only_first}, p = {paired.p:.3f}: {meaning}"
        )


def _cells(share: Share) -> list[str]:
    low, high = share.interval
    return [
        f"{share.num_right}/{share.num}",
        f"{share.accuracy:.1%}",
        f"{low:.1%} - {high:.1%}",
        f"{share.mean_score:.3f}",
    ]
