"""Drawing tokens from logits as Triton kernels, without a sort over the vocabulary.

One pass over the logits gives each block of the vocabulary its largest logit and its mass; a second, small kernel finds
the block in which the cumulative mass passes the drawn number, and the token within it. Rows that filter (top-k, top-p,
min-p) first find the least logit that passes, by bisection on the bits of a float: as many passes over the row as
its type has bits, and exact. What is drawn is what `ingle.device.torch.sampler` defines.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ingle.kernels.gpu.device import await_previous, pdl

_BLOCK = 4096
_FILTER_BLOCK = 8192


@triton.jit
def _uniform(seed, position):
    """float64 in [0, 1) of (seed, position): the generator of `ingle.device.torch.sampler.uniform`."""
    x = seed.to(tl.uint64) + (position + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return ((x ^ (x >> 31)) >> 11).to(tl.float64) * 1.1102230246251565e-16


@triton.jit
def _block_kernel(
    logits_ptr, slots_ptr, floats_ptr, thresholds_ptr, best_ptr, best_id_ptr,
    mass_ptr, check_ptr, VOCAB: tl.constexpr, BLOCK: tl.constexpr, FILTERED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Of each block of a row: its largest logit and where, its mass relative to that, and its plain sum."""
    if PDL:
        await_previous()
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    ids = block * BLOCK + tl.arange(0, BLOCK)
    logits = tl.load(logits_ptr + row * VOCAB + ids, mask=ids < VOCAB, other=float("-inf")).to(tl.float32)
    temperature = tl.load(floats_ptr + tl.load(slots_ptr + row) * 3)
    best = tl.max(logits, 0)
    # A row of -inf (a block of forbidden tokens) has no mass, and must not become NaN.
    anchor = tl.where(best == float("-inf"), 0.0, best)
    weights = tl.exp((logits - anchor) / tl.where(temperature > 0, temperature, 1.0))
    if FILTERED:
        weights = tl.where(logits >= tl.load(thresholds_ptr + row), weights, 0.0)
    place = row * tl.num_programs(1) + block
    tl.store(best_ptr + place, best)
    tl.store(best_id_ptr + place, tl.min(tl.where(logits == best, ids, VOCAB), 0))
    tl.store(mass_ptr + place, tl.sum(weights, 0))
    tl.store(check_ptr + place, tl.sum(tl.where(ids < VOCAB, logits, 0.0), 0))


@triton.jit
def _draw_kernel(
    logits_ptr, slots_ptr, positions_ptr, floats_ptr, ints_ptr, thresholds_ptr,
    best_ptr, best_id_ptr, mass_ptr, check_ptr, tokens_ptr, finite_ptr,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, NUM_BLOCKS: tl.constexpr, BLOCKS: tl.constexpr, FILTERED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """The token of a row, the likeliest where the temperature is 0, the drawn one elsewhere; and if it was finite."""
    if PDL:
        await_previous()
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row)
    temperature = tl.load(floats_ptr + slot * 3)
    blocks = tl.arange(0, BLOCKS)
    real = blocks < NUM_BLOCKS
    check = tl.sum(tl.load(check_ptr + row * NUM_BLOCKS + blocks, mask=real, other=0.0), 0)
    tl.store(finite_ptr + row, tl.abs(check) < float("inf"))  # not so for NaN either
    block_best = tl.load(best_ptr + row * NUM_BLOCKS + blocks, mask=real, other=float("-inf"))
    best = tl.max(block_best, 0)
    if temperature == 0.0:
        best_ids = tl.load(best_id_ptr + row * NUM_BLOCKS + blocks, mask=real, other=VOCAB)
        token = tl.min(tl.where(block_best == best, best_ids, VOCAB), 0)
        tl.store(tokens_ptr + row, tl.where(token < VOCAB, token, 0).to(tl.int64))
    else:
        mass = tl.load(mass_ptr + row * NUM_BLOCKS + blocks, mask=real, other=0.0).to(tl.float64)
        anchored = tl.where(mass > 0, tl.exp((block_best - best) / temperature), 0.0).to(tl.float64)
        cumulative = tl.cumsum(mass * anchored, 0)
        total = tl.max(cumulative, 0)
        target = _uniform(tl.load(ints_ptr + slot * 2), tl.load(positions_ptr + row)) * total
        block = tl.sum((cumulative <= target).to(tl.int32), 0)
        block = tl.minimum(block, NUM_BLOCKS - 1)
        left = target - tl.max(tl.where(blocks < block, cumulative, 0.0), 0)
        ids = block * BLOCK + tl.arange(0, BLOCK)
        logits = tl.load(logits_ptr + row * VOCAB + ids, mask=ids < VOCAB, other=float("-inf")).to(tl.float32)
        weights = tl.exp((logits - best) / temperature)
        if FILTERED:
            weights = tl.where(logits >= tl.load(thresholds_ptr + row), weights, 0.0)
        within = tl.cumsum(weights, 0)
        found = tl.min(tl.where((within > left) & (weights > 0), ids, VOCAB), 0)
        # Rounding may leave the target at the block's very end: its last possible token is meant.
        last = tl.max(tl.where(weights > 0, ids, 0), 0)
        tl.store(tokens_ptr + row, tl.where(found < VOCAB, found, last).to(tl.int64))


@triton.jit
def _ordered(bits):
    """Maps the bits of a float32 to uint32 in the order of the floats, and (being its own mirror) is undone below."""
    return tl.where(bits >> 31 == 1, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def _threshold_kernel(
    logits_ptr, slots_ptr, floats_ptr, ints_ptr, thresholds_ptr,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, LOWEST_BIT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The least logit that passes a row's filters; -inf for rows without any."""
    if PDL:
        await_previous()
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row)
    temperature = tl.load(floats_ptr + slot * 3)
    top_p = tl.load(floats_ptr + slot * 3 + 1)
    min_p = tl.load(floats_ptr + slot * 3 + 2)
    top_k = tl.load(ints_ptr + slot * 2 + 1)
    base = logits_ptr + row * VOCAB
    threshold = float("-inf")
    if (temperature > 0) & ((top_k < VOCAB) | (top_p < 1) | (min_p > 0)):
        best = tl.full([BLOCK], float("-inf"), tl.float32)
        for start in range(0, VOCAB, BLOCK):
            ids = start + tl.arange(0, BLOCK)
            best = tl.maximum(best, tl.load(base + ids, mask=ids < VOCAB, other=float("-inf")).to(tl.float32))
        top = tl.max(best, 0)
        if top_k < VOCAB:
            threshold = _bisect(base, top, temperature, top_k.to(tl.float32), threshold, VOCAB, BLOCK, LOWEST_BIT, True)
        if top_p < 1:
            mass = tl.zeros([BLOCK], tl.float32)
            for start in range(0, VOCAB, BLOCK):
                ids = start + tl.arange(0, BLOCK)
                logits = tl.load(base + ids, mask=ids < VOCAB, other=float("-inf")).to(tl.float32)
                mass += tl.where(logits >= threshold, tl.exp((logits - top) / temperature), 0.0)
            wanted = top_p * tl.sum(mass, 0)
            threshold = _bisect(base, top, temperature, wanted, threshold, VOCAB, BLOCK, LOWEST_BIT, False)
        if min_p > 0:
            threshold = tl.maximum(threshold, top + temperature * tl.log(min_p))
    tl.store(thresholds_ptr + row, threshold)


@triton.jit
def _bisect(
    base, top, temperature, wanted, floor,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, LOWEST_BIT: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """The largest logit at or above which there are `wanted` logits (COUNT), or their mass is at least `wanted`.

    Sets the bits of its ordered form from the highest down, keeping each that leaves enough. Those below `floor` do
    not count.
    """
    found = tl.full([], 0, tl.uint32)
    for step in range(31 - LOWEST_BIT + 1):
        candidate = found | (tl.full([], 1, tl.uint32) << (31 - step)).to(tl.uint32)
        amount = tl.zeros([BLOCK], tl.float32)
        for start in range(0, VOCAB, BLOCK):
            ids = start + tl.arange(0, BLOCK)
            logits = tl.load(base + ids, mask=ids < VOCAB, other=float("-inf")).to(tl.float32)
            passes = (_ordered(logits.to(tl.uint32, bitcast=True)) >= candidate) & (logits >= floor) & (ids < VOCAB)
            amount += tl.where(passes, 1.0 if COUNT else tl.exp((logits - top) / temperature), 0.0)
        found = tl.where(tl.sum(amount, 0) >= wanted, candidate, found)
    bits = tl.where(found >> 31 == 1, found & 0x7FFFFFFF, found ^ 0xFFFFFFFF)
    return tl.maximum(bits.to(tl.float32, bitcast=True), floor)


def sample(
    logits: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    floats: torch.Tensor,
    ints: torch.Tensor,
    *,
    filtered: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids int64 [R] and whether each row was finite, bool [R], for logits [R, vocab] of any float type.

    Whatever the row of logits was, the token is one of the vocabulary.

    slots, positions: int64 [R]. floats: float32 [S, 3], temperature, top_p and min_p of each slot. ints: int64 [S, 2],
    seed and top_k. Without `filtered`, top_k, top_p and min_p are not looked at.
    """
    num_rows, vocab_size = logits.shape
    num_blocks = triton.cdiv(vocab_size, _BLOCK)
    shape, device = (num_rows, num_blocks), logits.device
    early = pdl(device)
    best, mass, check = (torch.empty(shape, dtype=torch.float32, device=device) for _ in range(3))
    best_ids = torch.empty(shape, dtype=torch.int32, device=device)
    tokens = torch.empty(num_rows, dtype=torch.int64, device=device)
    finite = torch.empty(num_rows, dtype=torch.bool, device=device)
    thresholds = torch.empty(num_rows, dtype=torch.float32, device=device)
    if filtered:
        # A 16-bit float widened to 32 bits: bfloat16 leaves 16 low bits at zero, float16 13.
        lowest_bit = {torch.bfloat16: 16, torch.float16: 13}.get(logits.dtype, 0)
        _threshold_kernel[(num_rows,)](
            logits, slots, floats, ints, thresholds,
            VOCAB=vocab_size, BLOCK=min(_FILTER_BLOCK, triton.next_power_of_2(vocab_size)), LOWEST_BIT=lowest_bit,
            PDL=early, num_warps=16, launch_pdl=early,
        )  # fmt: skip
    _block_kernel[shape](
        logits, slots, floats, thresholds, best, best_ids, mass, check,
        VOCAB=vocab_size, BLOCK=_BLOCK, FILTERED=filtered, PDL=early, num_warps=8, launch_pdl=early,
    )  # fmt: skip
    _draw_kernel[(num_rows,)](
        logits, slots, positions, floats, ints, thresholds, best, best_ids, mass, check, tokens, finite,
        VOCAB=vocab_size, BLOCK=_BLOCK, NUM_BLOCKS=num_blocks, BLOCKS=triton.next_power_of_2(num_blocks),
        FILTERED=filtered, PDL=early, num_warps=8, launch_pdl=early,
    )  # fmt: skip
    return tokens, finite
