"""What is kept of files and batches, which is what OpenAI's API says of them. All times are Unix seconds."""

from __future__ import annotations

from typing import Literal

import msgspec

FileStatus = Literal["processed"]
BatchStatus = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
]
ENDED: frozenset[BatchStatus] = frozenset({"failed", "completed", "expired", "cancelled"})


class File(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None = None
    filename: str
    purpose: str
    status: FileStatus = "processed"


class KeptFile(File, kw_only=True):
    """A file, and what nobody is shown of it."""

    owner: str = ""
    """Whose it is; empty for all whose keys have no name, and for files of a server that asks for none."""

    def shown(self) -> File:
        return File(**{name: getattr(self, name) for name in File.__struct_fields__})


class BatchError(msgspec.Struct, kw_only=True):
    code: str
    message: str
    line: int | None = None
    """Of the input file, from 1."""
    param: str | None = None


class BatchErrors(msgspec.Struct, kw_only=True):
    object: Literal["list"] = "list"
    data: list[BatchError]


class Counts(msgspec.Struct, kw_only=True):
    total: int = 0
    completed: int = 0
    failed: int = 0


class Batch(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    model: str | None = None
    """That the first line asks for."""
    errors: BatchErrors | None = None
    input_file_id: str
    completion_window: str
    status: BatchStatus = "validating"
    output_file_id: str | None = None
    error_file_id: str | None = None
    created_at: int
    in_progress_at: int | None = None
    expires_at: int
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: Counts = msgspec.field(default_factory=Counts)
    metadata: dict[str, str] | None = None


class StoredBatch(msgspec.Struct, kw_only=True):
    """A batch, and what nobody is shown of it."""

    batch: Batch
    output_id: str
    """Of the file that its answers will be; fixed from the beginning, so that an end that was cut off is made again."""
    error_id: str
    keep_s: int
    """For how long its files are kept."""
    owner: str = ""
    """As of a file."""


class LineResponse(msgspec.Struct, kw_only=True):
    status_code: int
    request_id: str
    body: msgspec.Raw


class LineError(msgspec.Struct, kw_only=True):
    code: str
    message: str


class OutputLine(msgspec.Struct, kw_only=True):
    """What became of one line."""

    id: str
    custom_id: str
    response: LineResponse | None = None
    error: LineError | None = None
