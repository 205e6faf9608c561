"""The tables from which a step's rows are gathered, and a step as the tensors that it brings.

The engine refers to a sequence by its slot. `SlotTables` holds, per slot and on the device, the sequence's tokens and
its page tables, written once when the sequence is admitted; a step then brings only slots and lengths. A token that a
step samples is written into the token table by that step, so it never leaves the device on its way to the next one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ingle import kernels
from ingle.device.inputs import Layout, layout_of, pack
from ingle.kernels.batch import Batch, StepInputs
from ingle.step import RESERVED_PAGE, Chunk, Step


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """A copy that a GPU makes in its own time: PyTorch keeps the pinned buffer until the copy is done."""
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def unpack(packed: torch.Tensor, layout: Layout) -> StepInputs:
    """The fields of a step that `ingle.device.inputs.pack` made, as views."""
    return StepInputs(*packed.split_with_sizes(layout.sizes()))


class SlotTables:
    """Per-slot state on the device: S slots of sequences of up to L tokens, and one more slot for padding rows."""

    def __init__(
        self,
        num_slots: int,
        max_model_len: int,
        page_size: int,
        query_block: int,
        device: torch.device,
        num_groups: int = 1,
    ) -> None:
        self.page_size = page_size
        self.query_block = query_block
        self.device = device
        self.padding_slot = num_slots
        self.token_ids = torch.zeros(num_slots + 1, max_model_len + 1, dtype=torch.int32, device=device)
        num_pages = -(-max_model_len // page_size)
        shape = (num_groups, num_slots + 1, num_pages)
        self.page_tables = torch.full(shape, RESERVED_PAGE, dtype=torch.int32, device=device)

    def apply(self, step: Step) -> None:
        """Writes what changes in the pages of sequences, and tokens and pages of those that start or restart."""
        if step.page_entries:
            entries = np.array(step.page_entries, np.int64).T.copy()
            groups, slots, indices, pages = to_device(entries, self.device).unbind(0)
            self.page_tables[groups, slots, indices] = pages.int()
        starting, num_slots = step.admissions, self.token_ids.shape[0]
        rows = [admission.slot for admission in starting]
        self._write(self.token_ids, rows, [admission.token_ids for admission in starting])
        rows = [group * num_slots + row for row in rows for group in range(len(self.page_tables))]
        self._write(self.page_tables.flatten(0, 1), rows, [pages for each in starting for pages in each.page_ids])
        brought = [
            (chunk.slot, chunk.end - len(new) + index, token_id)
            for chunk in step.chunks
            if (new := chunk.drafts or chunk.told)
            for index, token_id in enumerate(new)
        ]
        if brought:
            slots, positions, token_ids = to_device(np.array(brought, np.int64).T.copy(), self.device).unbind(0)
            self.token_ids[slots, positions] = token_ids.int()

    def _write(self, table: torch.Tensor, rows: Sequence[int], contents: Sequence[Sequence[int]]) -> None:
        """Writes the starts of these rows of `table`, all in one copy."""
        if not rows:
            return
        width = table.shape[1]
        flat = np.concatenate([
            np.arange(row * width, row * width + len(content)) for row, content in zip(rows, contents, strict=True)
        ])  # fmt: skip
        values = np.concatenate([np.array(content, np.int64) for content in contents])
        places, numbers = to_device(np.stack((flat, values)), self.device).unbind(0)
        table.view(-1)[places] = numbers.int()

    def batch_of(self, step: Step) -> Batch:
        """The batch of a step that was applied, in its exact sizes."""
        layout = layout_of(step, self.query_block)
        packed = to_device(pack(step, layout, self.query_block, self.padding_slot), self.device)
        return self.batch(unpack(packed, layout), step.num_decodes, layout.num_blocks, step.chunks)

    def batch(
        self, inputs: StepInputs, num_decodes: int, num_blocks: int, chunks: list[Chunk], most_keys: int = 0
    ) -> Batch:
        """The batch of these inputs; runs on the device alone."""
        token_ids, kv_places = kernels.of(inputs.positions).locate(
            inputs.row_slots, inputs.positions, self.token_ids, self.page_tables, self.page_size
        )
        return Batch(
            inputs=inputs,
            token_ids=token_ids,
            all_kv_places=kv_places.unbind(0),
            all_page_tables=self.page_tables.unbind(0),
            num_decodes=num_decodes,
            num_blocks=num_blocks,
            chunks=chunks,
            most_keys=most_keys,
        )
