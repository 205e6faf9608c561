"""Runs batches, one after the other: from what is on disk, so that a server that starts anew goes on where the last one
was."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import IO

import msgspec
from starlette.applications import Starlette

from ingle.errors import EngineError, RequestError, lack_of_disk
from ingle.server.batch.lines import BadLine, Line, answer_patiently, answers_of, done_ids, line_of, read_lines
from ingle.server.batch.records import (
    ENDED,
    Batch,
    BatchError,
    BatchErrors,
    BatchStatus,
    KeptFile,
    LineError,
    OutputLine,
    StoredBatch,
)
from ingle.server.batch.running import spread
from ingle.server.batch.store import Store
from ingle.server.models import ModelPool, ServedModel

logger = logging.getLogger("ingle.server")

_MAX_ERRORS = 100
_LOOK_S, _SAVE_S, _SWEEP_S, _FULL_DISK_S = 2.0, 1.0, 60.0, 30.0


class BatchWorker:
    """Of several servers of a model on one machine, one runs its batches."""

    def __init__(self, app: Starlette, pool: ModelPool, store: Store) -> None:
        self._app, self._pool, self._store = app, pool, store
        self._answers = answers_of(app)
        self.changed = asyncio.Event()
        """There is a new batch."""

    async def run(self) -> None:
        """Until it is cancelled. Nothing is on disk before somebody has put it there."""
        while not await asyncio.to_thread(self._store.root.is_dir):
            await self._look()
        with contextlib.ExitStack() as stack:
            lock = stack.enter_context((self._store.root / "worker.lock").open("ab"))
            while not _locked(lock):
                await self._look()
            await self._serve()

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        swept_s = float("-inf")
        while True:
            self.changed.clear()
            if loop.time() - swept_s > _SWEEP_S:
                swept_s = loop.time()
                await asyncio.to_thread(self._store.sweep)
            stored = next(filter(self._is_ours, await asyncio.to_thread(self._store.batches)), None)
            if stored is None:
                await self._look()
                continue
            try:
                await self._run(stored)
            except EngineError:
                raise
            except Exception as error:  # such as of a file that somebody has changed
                if (lack := lack_of_disk(error)) is not None:  # which may be emptied: it goes on where it was
                    logger.error("batch %s waits: %s", stored.batch.id, lack)
                    await asyncio.sleep(_FULL_DISK_S)
                    continue
                logger.error("batch %s failed", stored.batch.id, exc_info=error)
                self._fail(stored, [BatchError(code="server_error", message="the server's log has the reason")])

    async def _look(self) -> None:
        waiter = asyncio.ensure_future(self.changed.wait())
        try:
            await asyncio.wait((waiter,), timeout=_LOOK_S)
        finally:
            waiter.cancel()

    def _is_ours(self, stored: StoredBatch) -> bool:
        """Whether it has not ended, and asks for a model that is served here."""
        if stored.batch.status in ENDED:
            return False
        if self._end_of(stored.batch) is not None:
            return True
        try:
            self._pool.get(stored.batch.model)
        except RequestError:
            return False
        return True

    # ---- one batch

    async def _run(self, stored: StoredBatch) -> None:
        batch = stored.batch
        if batch.status != "finalizing" and self._end_of(batch) is not None:
            batch.status, batch.finalizing_at = "finalizing", self._now()
        if batch.status == "validating":
            errors = await asyncio.to_thread(self._validate, stored)
            if errors:
                self._fail(stored, errors)
                return
            batch.status, batch.in_progress_at = "in_progress", self._now()
            self._store.save(stored)
        if batch.status == "in_progress":
            await self._answer(stored)
            batch.status, batch.finalizing_at = "finalizing", self._now()
            self._store.save(stored)
        await asyncio.to_thread(self._finalize, stored)

    def _validate(self, stored: StoredBatch) -> list[BatchError]:
        """What is wrong with its input, all lines of it."""
        batch, seen, errors = stored.batch, dict[str, int](), list[BatchError]()
        allowed, limits = (batch.endpoint,), self._store.limits
        most, by = limits.max_batch_lines, limits.by("max_batch_lines")
        with self._input(batch).open("rb") as file:
            for number, data in read_lines(file):
                batch.request_counts.total += 1
                if batch.request_counts.total > most:
                    errors.append(BatchError(code="too_many_lines", message=f"more than {most} lines{by}", line=number))
                    break
                try:
                    line, model = line_of(data, allowed)
                    first = seen.setdefault(line.custom_id, number)
                    if first != number:
                        raise BadLine("duplicate_custom_id", f"custom_id is that of line {first}", "custom_id")
                    self._pool.get(model)
                except BadLine as error:
                    errors.append(error.error(number))
                except RequestError as error:
                    errors.append(
                        BatchError(code="model_not_found", message=str(error), line=number, param="body.model")
                    )
                if len(errors) >= _MAX_ERRORS:
                    break
        if not batch.request_counts.total:
            errors.append(BatchError(code="empty_file", message="the input file has no line"))
        return errors

    async def _answer(self, stored: StoredBatch) -> None:
        batch, folder = stored.batch, self._store.batch_folder(stored.batch.id)
        model = self._pool.get(batch.model)
        output, errors = folder / "output.jsonl", folder / "errors.jsonl"
        answered, failed = await asyncio.to_thread(done_ids, output), await asyncio.to_thread(done_ids, errors)
        counts, done = batch.request_counts, answered | failed
        counts.completed, counts.failed = len(answered), len(failed)
        saved_s = asyncio.get_running_loop().time()
        with output.open("ab") as good, errors.open("ab") as bad, self._input(batch).open("rb") as file:
            async with aclosing(self._results(stored, model, _lines(file, batch.endpoint, done))) as results:
                async for result in results:
                    is_good = result.response is not None and result.response.status_code < 400
                    counts.completed += is_good
                    counts.failed += not is_good
                    into = good if is_good else bad
                    into.write(msgspec.json.encode(result) + b"\n")
                    into.flush()
                    if (now_s := asyncio.get_running_loop().time()) - saved_s > _SAVE_S:
                        saved_s = now_s
                        await asyncio.to_thread(self._store.save, stored)

    def _results(
        self, stored: StoredBatch, model: ServedModel, lines: Iterator[Line]
    ) -> AsyncGenerator[OutputLine, None]:
        """Half of the engine's slots at most, and only while nobody waits for one."""
        return spread(
            lines,
            lambda line: answer_patiently(self._app, self._answers, line, stored.owner),
            max(1, model.info.max_num_seqs // 2),
            may_start=lambda: model.engine.stats.num_waiting == 0,
            ended=lambda: self._end_of(stored.batch) is not None,
        )

    def _end_of(self, batch: Batch) -> BatchStatus | None:
        """How it ends before all of it is done, if it does."""
        if self._store.cancel_asked_at(batch.id) is not None:
            return "cancelled"
        return "expired" if self._now() >= batch.expires_at else None

    def _finalize(self, stored: StoredBatch) -> None:
        """May be cut off anywhere, and is then done again."""
        batch, folder = stored.batch, self._store.batch_folder(stored.batch.id)
        counts = batch.request_counts
        unfinished = not counts.total or counts.completed + counts.failed < counts.total
        end: BatchStatus = (self._end_of(batch) or "expired") if unfinished else "completed"
        if end == "expired" and counts.total:
            self._tell_expired(stored)
        batch.output_file_id = self._as_file(stored, folder / "output.jsonl", stored.output_id, "output")
        batch.error_file_id = self._as_file(stored, folder / "errors.jsonl", stored.error_id, "errors")
        now = self._now()
        if end == "cancelled":
            batch.cancelling_at = self._store.cancel_asked_at(batch.id)
            batch.cancelled_at = now
        elif end == "expired":
            batch.expired_at = now
        else:
            batch.completed_at = now
        batch.status = end
        self._store.save(stored)
        (folder / "input.jsonl").unlink(missing_ok=True)
        logger.info("batch %s is %s: %d of %d lines answered, %d failed", batch.id, end, counts.completed,
                    counts.total, counts.failed)  # fmt: skip

    def _tell_expired(self, stored: StoredBatch) -> None:
        batch, folder = stored.batch, self._store.batch_folder(stored.batch.id)
        if not (folder / "errors.jsonl").exists():  # that was done, and its file is made
            return
        done = done_ids(folder / "output.jsonl", folder / "errors.jsonl")
        why = LineError(code="batch_expired", message="This request could not be answered within the batch's window.")
        with self._input(batch).open("rb") as file, (folder / "errors.jsonl").open("ab") as bad:
            for line in _lines(file, batch.endpoint, done):
                told = OutputLine(id=f"batch_req_{batch.id[-8:]}", custom_id=line.custom_id, error=why)
                bad.write(msgspec.json.encode(told) + b"\n")

    def _as_file(self, stored: StoredBatch, content: Path, file_id: str, kind: str) -> str | None:
        """The id of the file that the content becomes; None where there is none."""
        if content.exists():
            if not content.stat().st_size:
                content.unlink()
                return None
            now = self._now()
            file = KeptFile(id=file_id, bytes=content.stat().st_size, created_at=now, expires_at=now + stored.keep_s,
                            filename=f"{stored.batch.id}_{kind}.jsonl", purpose="batch_output",
                            owner=stored.owner)  # fmt: skip
            self._store.keep(file, content)
        try:
            return self._store.file(file_id).id
        except RequestError:
            return None

    def _fail(self, stored: StoredBatch, errors: list[BatchError]) -> None:
        batch = stored.batch
        batch.status, batch.failed_at, batch.errors = "failed", self._now(), BatchErrors(data=errors)
        self._store.save(stored)

    def _input(self, batch: Batch) -> Path:
        return self._store.batch_folder(batch.id) / "input.jsonl"

    def _now(self) -> int:
        return int(self._store.now())


def _lines(file: IO[bytes], endpoint: str, done: set[str]) -> Iterator[Line]:
    """Those that are still to be answered; all were looked at before."""
    for _, data in read_lines(file):  # type: ignore[arg-type]
        line, _ = line_of(data, (endpoint,))
        if line.custom_id not in done:
            yield line


def _locked(file: IO[bytes]) -> bool:
    """Whether this process has the lock; the system gives it back when the process ends."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
