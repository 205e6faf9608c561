"""A planned step as tensors, and the tables from which its rows are gathered.

The engine refers to a sequence by its slot. `SlotTables` holds, per slot and on the device, the sequence's tokens and
its page table, written once when the sequence is admitted; a step then brings only slots and lengths. A token that a
step samples is written into the token table by that step, so it never leaves the device on its way to the next one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ingle.engine.pages import RESERVED_PAGE
from ingle.engine.scheduler import Admission, Chunk, Plan

QUERY_BLOCK = 64
"""Query tokens of one prompt chunk that one program of the GPU's attention kernel handles."""


@dataclass(slots=True)
class Batch:
    """T tokens of B sequences; the first `num_decodes` sequences have one token each. Tensors are int64 unless said."""

    token_ids: torch.Tensor
    """[T]"""
    positions: torch.Tensor
    """[T], of each token in its sequence."""
    kv_slots: torch.Tensor
    """[T], where each token's key and value go: page * page_size + offset."""
    slots: torch.Tensor
    """[B], each sequence's row of `page_tables`."""
    kv_lengths: torch.Tensor
    """[B], tokens of each sequence that its last token attends to, itself included."""
    page_tables: torch.Tensor
    """int32 [S, P], the pages of every slot."""
    num_decodes: int
    chunks: list[Chunk]
    """Of the plan, one a sequence; empty in a captured step, which has decodes only."""
    query_blocks: torch.Tensor | None = None
    """[N, 2]: for each block of up to `QUERY_BLOCK` prompt tokens, its sequence in [0, B) and its first row in T."""
    query_starts: torch.Tensor | None = None
    """[B + 1], each sequence's first row in T."""


@dataclass(slots=True)
class SampleRows:
    """The R rows of a step whose next token is drawn. Tensors are int64."""

    rows: torch.Tensor
    """[R], in T."""
    slots: torch.Tensor
    """[R]"""
    positions: torch.Tensor
    """[R], of the tokens to be drawn."""


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """A copy that a GPU makes in its own time: PyTorch keeps the pinned buffer until the copy is done."""
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


class SlotTables:
    """Per-slot state on the device: S slots of sequences of up to L tokens, and one more slot for padding rows."""

    def __init__(self, num_slots: int, max_model_len: int, page_size: int, device: torch.device) -> None:
        self.page_size = page_size
        self.device = device
        self.padding_slot = num_slots
        self.token_ids = torch.zeros(num_slots + 1, max_model_len + 1, dtype=torch.int32, device=device)
        num_pages = -(-max_model_len // page_size)
        self.page_tables = torch.full((num_slots + 1, num_pages), RESERVED_PAGE, dtype=torch.int32, device=device)

    def apply(self, plan: Plan) -> None:
        """Writes the tokens and pages of sequences that start or restart, and the pages that others gained."""
        self._write(self.token_ids, plan.admissions, [admission.token_ids for admission in plan.admissions])
        self._write(self.page_tables, plan.admissions, [admission.page_ids for admission in plan.admissions])
        if plan.grown:
            slots, indices, pages = to_device(np.array(plan.grown, np.int64).T.copy(), self.device).unbind(0)
            self.page_tables[slots, indices] = pages.int()

    def _write(self, table: torch.Tensor, admissions: list[Admission], contents: list[list[int]]) -> None:
        """Writes the start of a row of `table` for each admission, all in one copy."""
        if not admissions:
            return
        width = table.shape[1]
        flat = np.concatenate([
            np.arange(admission.slot * width, admission.slot * width + len(content))
            for admission, content in zip(admissions, contents, strict=True)
        ])  # fmt: skip
        values = np.concatenate([np.array(content, np.int64) for content in contents])
        places, numbers = to_device(np.stack((flat, values)), self.device).unbind(0)
        table.view(-1)[places] = numbers.int()

    def batch(self, plan: Plan) -> tuple[Batch, SampleRows]:
        """The tensors of a step that was applied, brought over in a single copy."""
        chunks = plan.chunks
        fields = np.array([(c.slot, c.start, c.count, c.samples) for c in chunks], np.int64).reshape(-1, 4)
        slots, starts, counts, samples = fields.T
        ends, last_rows = starts + counts, np.cumsum(counts) - 1
        # Row t of a chunk has the position start + (t - first row of the chunk).
        positions = np.arange(plan.num_tokens) + np.repeat(ends - 1 - last_rows, counts)
        drawn = samples.astype(bool)
        blocks = _query_blocks(counts, last_rows + 1 - counts, plan.num_decodes)
        query_starts = np.concatenate((np.zeros(1, np.int64), last_rows + 1))
        parts = (np.repeat(slots, counts), positions, slots, ends, last_rows[drawn], slots[drawn], ends[drawn],
                 query_starts, blocks.reshape(-1))  # fmt: skip
        row_slots, rows, seqs, lengths, sample_rows, sample_slots, sample_positions, first_rows, flat_blocks = (
            to_device(np.concatenate(parts), self.device).split_with_sizes([len(part) for part in parts])
        )
        batch = self.gather(row_slots, rows, seqs, lengths, plan.num_decodes)
        batch.chunks, batch.query_blocks, batch.query_starts = chunks, flat_blocks.view(-1, 2), first_rows
        return batch, SampleRows(sample_rows, sample_slots, sample_positions)

    def gather(
        self,
        row_slots: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        kv_lengths: torch.Tensor,
        num_decodes: int,
    ) -> Batch:
        """A batch of the tokens at `positions` [T] of the sequences in `row_slots` [T]; runs on the device alone."""
        pages = self.page_tables[row_slots, positions // self.page_size].long()
        return Batch(
            token_ids=self.token_ids[row_slots, positions].long(),
            positions=positions,
            kv_slots=pages * self.page_size + positions % self.page_size,
            slots=slots,
            kv_lengths=kv_lengths,
            page_tables=self.page_tables,
            num_decodes=num_decodes,
            chunks=[],
        )


def _query_blocks(counts: np.ndarray, first_rows: np.ndarray, num_decodes: int) -> np.ndarray:
    """(sequence, first row) of each block of query rows of the prompt chunks: int64 [N, 2]."""
    pairs = [
        (index, int(first_rows[index]) + offset)
        for index in range(num_decodes, len(counts))
        for offset in range(0, int(counts[index]), QUERY_BLOCK)
    ]
    return np.array(pairs, np.int64).reshape(-1, 2)
