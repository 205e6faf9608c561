"""A planned step as tensors, and the tables from which its rows are gathered.

The engine refers to a sequence by its slot. `SlotTables` holds, per slot and on the device, the sequence's tokens and
its page table, written once when the sequence is admitted; a step then brings only slots and lengths. A token that a
step samples is written into the token table by that step, so it never leaves the device on its way to the next one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from ingle import kernels
from ingle.engine.pages import RESERVED_PAGE
from ingle.engine.scheduler import Admission, Chunk, Plan

QUERY_BLOCK = 64
"""Query tokens of one prompt chunk that one program of the GPU's attention kernel handles."""


@dataclass(frozen=True, slots=True)
class DecodeWork:
    """The keys that decoding sequences see in pieces of equal length, as a GPU's attention kernel shares them out."""

    items: torch.Tensor
    """int32 [N, 4]: of each piece its sequence, its index in it, the slot and the length; N is an upper bound."""
    head: torch.Tensor
    """int64 [2]: the number of pieces, and the keys in each."""
    arrived: torch.Tensor
    """int32 [B, Hkv], zeros: pieces that are done, while a kernel runs."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How large a step's inputs are. Those of a captured step are fixed: a plan is padded to them."""

    num_tokens: int
    """T"""
    num_seqs: int
    """B"""
    num_samples: int
    """R"""
    num_blocks: int
    """N, blocks of up to `QUERY_BLOCK` prompt tokens of one sequence; 0 for a step of decodes only."""

    def sizes(self) -> list[int]:
        """Of the fields of `StepInputs`, in order."""
        tokens, seqs, rows, blocks = self.num_tokens, self.num_seqs, self.num_samples, self.num_blocks
        return [tokens, tokens, seqs, seqs, seqs, seqs + 1, 2 * blocks, 1, rows, rows, rows]


class StepInputs(NamedTuple):
    """All that a step brings to the device, int64. Padding belongs to the padding slot, or counts nothing."""

    row_slots: torch.Tensor
    """[T], each token's sequence, as its slot."""
    positions: torch.Tensor
    """[T], of each token in its sequence."""
    slots: torch.Tensor
    """[B], decoding sequences first."""
    kv_lengths: torch.Tensor
    """[B], tokens of each sequence that its last token attends to, itself included."""
    decode_lengths: torch.Tensor
    """[B], the same for decoding sequences and 0 for others."""
    query_starts: torch.Tensor
    """[B + 1], each sequence's first row in T."""
    query_blocks: torch.Tensor
    """[2 N], for each block of prompt tokens its sequence in [0, B) and its first row in T."""
    num_query_blocks: torch.Tensor
    """[1]"""
    sample_rows: torch.Tensor
    """[R], rows of T whose next token is drawn."""
    sample_slots: torch.Tensor
    """[R]"""
    sample_positions: torch.Tensor
    """[R], of the tokens to be drawn."""


@dataclass(slots=True)
class Batch:
    """T tokens of B sequences; decoding sequences, with one token each, come first. Index tensors are int64."""

    inputs: StepInputs
    token_ids: torch.Tensor
    """[T]"""
    kv_slots: torch.Tensor
    """[T], where each token's key and value go: page * page_size + offset."""
    page_tables: torch.Tensor
    """int32 [S, P], the pages of every slot."""
    num_decodes: int
    """Decoding sequences; in a captured step, at most so many."""
    num_blocks: int
    """Blocks of prompt tokens; in a captured step, at most so many."""
    chunks: list[Chunk]
    """Of the plan, one a sequence; empty in a captured step."""
    decode_work: dict[int | None, DecodeWork] = field(default_factory=dict)
    """By window: made by the first layer that has it, for all that do."""


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """A copy that a GPU makes in its own time: PyTorch keeps the pinned buffer until the copy is done."""
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def unpack(packed: torch.Tensor, layout: Layout) -> StepInputs:
    """The fields of a step that `SlotTables.pack` made, as views."""
    return StepInputs(*packed.split_with_sizes(layout.sizes()))


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

    def layout(self, plan: Plan) -> Layout:
        """The exact sizes of a plan."""
        blocks = sum(-(-chunk.count // QUERY_BLOCK) for chunk in plan.chunks[plan.num_decodes :])
        return Layout(plan.num_tokens, len(plan.chunks), sum(chunk.samples for chunk in plan.chunks), blocks)

    def pack(self, plan: Plan, layout: Layout) -> np.ndarray:
        """The fields of `StepInputs` end to end, padded to `layout`: int64, to be brought over in a single copy."""
        fields = np.array([(c.slot, c.start, c.count, c.samples) for c in plan.chunks], np.int64).reshape(-1, 4)
        slots, starts, counts, samples = fields.T
        ends, last_rows, drawn = starts + counts, np.cumsum(counts) - 1, samples.astype(bool)
        first_rows = last_rows + 1 - counts
        blocks = [
            (index, int(first_rows[index]) + offset)
            for index in range(plan.num_decodes, len(counts))
            for offset in range(0, int(counts[index]), QUERY_BLOCK)
        ]
        nothing, nobody = 0, self.padding_slot
        values_and_padding: list[tuple[np.ndarray, int]] = [
            (np.repeat(slots, counts), nobody),
            # Row t of a chunk has the position start + (t - first row of the chunk).
            (np.arange(plan.num_tokens) + np.repeat(starts - first_rows, counts), nothing),
            (slots, nobody),
            (ends, nothing),
            (ends[: plan.num_decodes], nothing),
            (np.concatenate((np.zeros(1, np.int64), last_rows + 1)), nothing),
            (np.array(blocks, np.int64).reshape(-1), nothing),
            (np.array([len(blocks)]), nothing),
            (last_rows[drawn], nothing),
            (slots[drawn], nobody),
            (ends[drawn], nothing),
        ]
        sizes = layout.sizes()
        packed = np.empty(sum(sizes), np.int64)
        start = 0
        for (values, padding), size in zip(values_and_padding, sizes, strict=True):
            packed[start : start + len(values)] = values
            packed[start + len(values) : start + size] = padding
            start += size
        return packed

    def batch(self, inputs: StepInputs, num_decodes: int, num_blocks: int, chunks: list[Chunk]) -> Batch:
        """The batch of these inputs; runs on the device alone."""
        token_ids, kv_slots = kernels.of(inputs.positions).locate(
            inputs.row_slots, inputs.positions, self.token_ids, self.page_tables, self.page_size
        )
        return Batch(
            inputs=inputs,
            token_ids=token_ids,
            kv_slots=kv_slots,
            page_tables=self.page_tables,
            num_decodes=num_decodes,
            num_blocks=num_blocks,
            chunks=chunks,
        )
