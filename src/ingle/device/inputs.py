"""A step as arrays: which tokens of which slots it computes, and after which of them it draws."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ingle.device import Ints
from ingle.step import Step


@dataclass(frozen=True, slots=True)
class Layout:
    """How large a step's inputs are. Those of a captured step are fixed: a step is padded to them."""

    num_tokens: int
    """T"""
    num_seqs: int
    """B"""
    num_samples: int
    """R"""
    num_blocks: int
    """N, blocks of up to `query_block` prompt tokens of one sequence; 0 for a step of decodes only."""
    most_keys: int = 0
    """That a lone decoding sequence has; 0 for any number."""

    def sizes(self) -> list[int]:
        """Of the fields of `Inputs`, in order."""
        tokens, seqs, rows, blocks = self.num_tokens, self.num_seqs, self.num_samples, self.num_blocks
        return [tokens, tokens, seqs, seqs, seqs, seqs + 1, 2 * blocks, 1, rows, rows, rows]


class Inputs(NamedTuple):
    """All that a step brings, as `ingle.kernels.batch.StepInputs` describes it."""

    row_slots: Ints
    positions: Ints
    slots: Ints
    kv_lengths: Ints
    decode_lengths: Ints
    query_starts: Ints
    query_blocks: Ints
    num_query_blocks: Ints
    sample_rows: Ints
    sample_slots: Ints
    sample_positions: Ints


def layout_of(step: Step, query_block: int) -> Layout:
    """The exact sizes of a step."""
    blocks = sum(-(-chunk.count // query_block) for chunk in step.chunks[step.num_decodes :])
    num_samples = sum(chunk.num_samples for chunk in step.chunks)
    return Layout(step.num_tokens, len(step.chunks), num_samples, blocks)


def inputs_of(step: Step, query_block: int) -> Inputs:
    """The arrays of a step, without padding. `query_block`: tokens in a block of a prompt's."""
    fields = np.array([(c.slot, c.start, c.count, c.num_samples) for c in step.chunks], np.int64).reshape(-1, 4)
    slots, starts, counts, num_samples = fields.T.copy()
    ends, query_starts = starts + counts, np.concatenate((np.zeros(1, np.int64), np.cumsum(counts)))
    first_rows = query_starts[:-1]
    blocks = [
        (index, int(first_rows[index]) + offset)
        for index in range(step.num_decodes, len(counts))
        for offset in range(0, int(counts[index]), query_block)
    ]
    # Of a chunk's rows, the last `num_samples`: how far each is from the chunk's last.
    before_last = np.repeat(np.cumsum(num_samples), num_samples) - 1 - np.arange(num_samples.sum())
    return Inputs(
        row_slots=np.repeat(slots, counts),
        # Row t of a chunk has the position start + (t - first row of the chunk).
        positions=np.arange(step.num_tokens) + np.repeat(starts - first_rows, counts),
        slots=slots,
        kv_lengths=ends,
        decode_lengths=ends[: step.num_decodes],
        query_starts=query_starts,
        query_blocks=np.array(blocks, np.int64).reshape(-1),
        num_query_blocks=np.array([len(blocks)]),
        sample_rows=np.repeat(query_starts[1:] - 1, num_samples) - before_last,
        sample_slots=np.repeat(slots, num_samples),
        sample_positions=np.repeat(ends, num_samples) - before_last,
    )


def pack(step: Step, layout: Layout, query_block: int, padding_slot: int) -> Ints:
    """The fields of `Inputs` end to end, padded to `layout`: int64, to be brought to a device in a single copy."""
    inputs, sizes = inputs_of(step, query_block), layout.sizes()
    packed, start = np.zeros(sum(sizes), np.int64), 0
    for name, values, size in zip(Inputs._fields, inputs, sizes, strict=True):
        packed[start : start + len(values)] = values
        if name in ("row_slots", "slots", "sample_slots"):
            packed[start + len(values) : start + size] = padding_slot
        start += size
    return packed
