"""The tables from which a step's rows are gathered, and a plan as the tensors that it brings.

The engine refers to a sequence by its slot. `SlotTables` holds, per slot and on the device, the sequence's tokens and
its page table, written once when the sequence is admitted; a step then brings only slots and lengths. A token that a
step samples is written into the token table by that step, so it never leaves the device on its way to the next one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ingle import kernels
from ingle.engine.pages import RESERVED_PAGE
from ingle.engine.scheduler import Admission, Chunk, Plan
from ingle.kernels.batch import Batch, Layout, StepInputs


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """A copy that a GPU makes in its own time: PyTorch keeps the pinned buffer until the copy is done."""
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def unpack(packed: torch.Tensor, layout: Layout) -> StepInputs:
    """The fields of a step that `SlotTables.pack` made, as views."""
    return StepInputs(*packed.split_with_sizes(layout.sizes()))


class SlotTables:
    """Per-slot state on the device: S slots of sequences of up to L tokens, and one more slot for padding rows."""

    def __init__(
        self, num_slots: int, max_model_len: int, page_size: int, query_block: int, device: torch.device
    ) -> None:
        self.page_size = page_size
        self.query_block = query_block
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

    def _write(self, table: torch.Tensor, admissions: list[Admission], contents: Sequence[Sequence[int]]) -> None:
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
        blocks = sum(-(-chunk.count // self.query_block) for chunk in plan.chunks[plan.num_decodes :])
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
            for offset in range(0, int(counts[index]), self.query_block)
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
