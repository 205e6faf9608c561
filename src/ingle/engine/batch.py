"""A planned step as tensors, and the tables from which its rows are gathered.

The engine refers to a sequence by its slot. `SlotTables` holds, per slot and on the device, the sequence's tokens, its
page table and its sampling parameters, written once when the sequence is admitted; a step then brings only slots and
lengths. A token that a step samples is written into the token table by that step, so it never leaves the device on its
way to the next one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ingle.engine.pages import RESERVED_PAGE
from ingle.engine.scheduler import Admission, Chunk, Plan


@dataclass(slots=True)
class Batch:
    """T tokens of B sequences; the first `num_decodes` sequences have one token each. Index tensors are int64."""

    token_ids: torch.Tensor
    """[T]"""
    positions: torch.Tensor
    """[T], of each token in its sequence."""
    kv_slots: torch.Tensor
    """[T], where each token's key and value go: page * page_size + offset."""
    page_tables: torch.Tensor
    """[B, P] pages of each sequence, P being those of the longest; the reserved page fills the rest."""
    kv_lengths: torch.Tensor
    """[B] tokens of each sequence that its last token attends to, itself included."""
    chunks: list[Chunk]
    num_decodes: int
    sample_rows: torch.Tensor
    """[R] rows of T whose next token is drawn."""
    sample_slots: torch.Tensor
    """[R] their slots."""
    sample_positions: torch.Tensor
    """[R] the positions of the tokens to be drawn."""


class SlotTables:
    """Per-slot state on the device: S slots, sequences of up to L tokens."""

    def __init__(self, num_slots: int, max_model_len: int, page_size: int, device: torch.device) -> None:
        self.page_size = page_size
        self.device = device
        self.token_ids = torch.zeros(num_slots, max_model_len + 1, dtype=torch.int32, device=device)
        num_pages = -(-max_model_len // page_size)
        self.page_tables = torch.full((num_slots, num_pages), RESERVED_PAGE, dtype=torch.int32, device=device)

    def admit(self, admission: Admission) -> None:
        """Writes the tokens and pages of a sequence that starts or restarts."""
        slot = admission.slot
        tokens = torch.tensor(admission.token_ids, dtype=torch.int32)
        pages = torch.tensor(admission.page_ids, dtype=torch.int32)
        self.token_ids[slot, : len(tokens)] = tokens.to(self.device)
        self.page_tables[slot, : len(pages)] = pages.to(self.device)

    def grow(self, grown: list[tuple[int, int, int]]) -> None:
        """Adds pages to running sequences: (slot, index in the page table, page)."""
        if grown:
            slots, indices, pages = torch.tensor(grown, dtype=torch.int64).to(self.device).unbind(1)
            self.page_tables[slots, indices] = pages.int()

    def batch(self, plan: Plan) -> Batch:
        """The tensors of a step whose admissions and growth have been applied."""
        chunks = plan.chunks
        slots = np.fromiter((chunk.slot for chunk in chunks), np.int64, len(chunks))
        starts = np.fromiter((chunk.start for chunk in chunks), np.int64, len(chunks))
        counts = np.fromiter((chunk.count for chunk in chunks), np.int64, len(chunks))
        samples = np.fromiter((chunk.samples for chunk in chunks), np.bool_, len(chunks))
        ends = starts + counts
        last_rows = np.cumsum(counts) - 1
        # Row t of chunk c has position starts[c] + (t - first row of c).
        positions_np = np.arange(plan.num_tokens) + np.repeat(ends - 1 - last_rows, counts)

        def to_device(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(array).to(self.device)

        positions = to_device(positions_np)
        row_slots = to_device(np.repeat(slots, counts))
        pages = self.page_tables[row_slots, positions // self.page_size].long()
        num_pages = -(-int(ends.max()) // self.page_size)
        return Batch(
            token_ids=self.token_ids[row_slots, positions].long(),
            positions=positions,
            kv_slots=pages * self.page_size + positions % self.page_size,
            page_tables=self.page_tables[to_device(slots), :num_pages].long(),
            kv_lengths=to_device(ends),
            chunks=chunks,
            num_decodes=plan.num_decodes,
            sample_rows=to_device(last_rows[samples]),
            sample_slots=to_device(slots[samples]),
            sample_positions=to_device(ends[samples]),
        )
