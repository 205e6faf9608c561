"""Drawing tokens from logits as Triton kernels, without a sort over the vocabulary: two launches, whatever is asked.

The first pass changes the logits where that is asked for, and gives each block of the vocabulary its largest logit and
its mass, and each strip its largest logit. Then a program for each row draws. Without filters it finds the block in
which the cumulative mass passes the drawn number, and the token within it. With filters it gathers the candidates,
which lie in the few strips that reach a lower bound of what passes (`strips.py`), and draws among them; where they are
too many, it bisects by passes over the whole row. What is drawn is what `reference_sampling` defines.

Masses are whole numbers, so that no sum depends on its order: a row's token is the same whatever else a step does.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ingle.kernels.gpu.device import await_previous, pdl
from ingle.kernels.gpu.logprobs import logprobs
from ingle.kernels.gpu.strips import (
    BLOCK,
    STRIPS_AT_ONCE,
    kth_largest,
    load_strips,
    ordered,
    strip_size,
    strips_above,
)
from ingle.kernels.sampling import PROMPT_FLAG, Features, Samples, SamplingTables
from ingle.request import MAX_LOGIT_BIAS

_CAPACITY = 2048
"""Candidates that a row may have before whole passes take their place."""
_MOST_STRIPS = tl.constexpr(1024)
"""Strips whose largest logits may bound the candidates; so top-k up to this is drawn among candidates."""
_FIRST_STRIPS = tl.constexpr(128)
"""Strips that top-p without top-k tries first."""
_MINUS_INFINITY = tl.constexpr(0x007FFFFF)
"""As `ordered` has it."""
_BIASES_AT_ONCE = tl.constexpr(128)
_PASS_BLOCK = 4096
_FLOATS = tl.constexpr(6)
_INTS = tl.constexpr(4)
_PROMPT_FLAG = tl.constexpr(PROMPT_FLAG)
_MAX_BIASES = tl.constexpr(MAX_LOGIT_BIAS)
_LARGEST = tl.constexpr(torch.finfo(torch.float32).max)


@triton.jit
def _uniform(seed, position):
    """float64 in [0, 1) of (seed, position): the generator of `reference_sampling.uniform`."""
    x = seed.to(tl.uint64) + (position + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return ((x ^ (x >> 31)) >> 11).to(tl.float64) * 1.1102230246251565e-16


@triton.jit
def _mass(logits, best, temperature):
    """exp((logits - best) / temperature) in units of 2**-30, int64."""
    return (tl.exp((logits - best) / temperature) * 1073741824.0 + 0.5).to(tl.int32).to(tl.int64)


@triton.jit
def _share(number, total):
    """Of whole numbers [0, total) the one at `number` in [0, 1), float64."""
    return tl.minimum((number * total.to(tl.float64)).to(tl.int64), total - 1)


# ---- the first pass


@triton.jit
def _allowed(words_ptr, ids, VOCAB: tl.constexpr):
    """Whether the bits of `ids` are 1."""
    return (tl.load(words_ptr + ids // 32, mask=ids < VOCAB, other=0) >> (ids % 32)) & 1 == 1


@triton.jit
def _penalize(x, seen, repetition, presence, frequency):
    count = (seen & (_PROMPT_FLAG - 1)).to(tl.float32)
    x = tl.where(seen > 0, tl.where(x > 0, x / repetition, x * repetition), x)
    return x - presence * (count > 0).to(tl.float32) - frequency * count


@triton.jit
def _add_biases(row_ptr, slot, num_biases, bias_ids_ptr, biases_ptr, first_id, BLOCK: tl.constexpr):
    """Adds a slot's biases to the logits [first_id, first_id + BLOCK) of a row in memory."""
    tl.debug_barrier()  # the logits, which other threads wrote
    for start in range(0, num_biases, _BIASES_AT_ONCE):
        entries = start + tl.arange(0, _BIASES_AT_ONCE)
        ids = tl.load(bias_ids_ptr + slot * _MAX_BIASES + entries, mask=entries < num_biases, other=-1)
        biases = tl.load(biases_ptr + slot * _MAX_BIASES + entries, mask=entries < num_biases, other=0.0)
        inside = (ids >= first_id) & (ids < first_id + BLOCK)
        tl.store(row_ptr + ids, tl.load(row_ptr + ids, mask=inside, other=0.0) + biases, mask=inside)
    tl.debug_barrier()


@triton.jit
def _survey_kernel(
    logits_ptr, slots_ptr, positions_ptr, floats_ptr, ints_ptr,
    counts_ptr, bias_ids_ptr, biases_ptr, ends_ptr, masks_ptr, adjusted_ptr,
    best_ptr, best_id_ptr, mass_ptr, check_ptr, strips_ptr,
    VOCAB: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr, STRIP: tl.constexpr,
    FILTERED: tl.constexpr, ADJUSTED: tl.constexpr, MASKED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Of each block of a row: its largest logit and where, its mass relative to that, and its plain sum as it came."""
    if PDL:
        await_previous()
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    numbers = tl.arange(0, BLOCK // STRIP)
    ids = block * BLOCK + numbers[:, None] * STRIP + tl.arange(0, STRIP)[None, :]
    real = ids < VOCAB
    x = tl.load(logits_ptr + row * VOCAB + ids, mask=real, other=float("-inf")).to(tl.float32)
    place = row * tl.num_programs(1) + block
    tl.store(check_ptr + place, tl.sum(tl.sum(tl.where(real, x, 0.0), 1), 0))
    slot = tl.load(slots_ptr + row)
    floats = floats_ptr + slot * _FLOATS
    temperature = tl.load(floats)
    if ADJUSTED:
        repetition, presence, frequency = tl.load(floats + 3), tl.load(floats + 4), tl.load(floats + 5)
        if (repetition != 1.0) | (presence != 0.0) | (frequency != 0.0):
            seen = tl.load(counts_ptr + slot * VOCAB + ids, mask=real, other=0)
            x = _penalize(x, seen, repetition, presence, frequency)
            x = tl.where(x != x, 0.0, tl.minimum(x, _LARGEST))
        if tl.load(positions_ptr + row) < tl.load(ints_ptr + slot * _INTS + 2):
            x = tl.where(_allowed(ends_ptr + slot * WORDS, ids, VOCAB), x, float("-inf"))
    if MASKED:
        x = tl.where(_allowed(masks_ptr + slot * WORDS, ids, VOCAB), x, float("-inf"))
    if ADJUSTED or MASKED:
        tl.store(adjusted_ptr + row * VOCAB + ids, x, mask=real)
    if ADJUSTED:
        num_biases = tl.load(ints_ptr + slot * _INTS + 3)
        if num_biases > 0:
            row_ptr = adjusted_ptr + row * VOCAB
            _add_biases(row_ptr, slot, num_biases, bias_ids_ptr, biases_ptr, block * BLOCK, BLOCK)
            x = tl.load(row_ptr + ids, mask=real, other=float("-inf"))
    strips = tl.max(x, 1)
    best = tl.max(strips, 0)
    if FILTERED:
        tl.store(strips_ptr + place * (BLOCK // STRIP) + numbers, strips)
    tl.store(best_ptr + place, best)
    tl.store(best_id_ptr + place, tl.min(tl.min(tl.where(x == best, ids, VOCAB), 1), 0))
    if temperature > 0:
        # A block of -inf (of forbidden tokens) has no mass, and must not become NaN.
        anchor = tl.where(best == float("-inf"), 0.0, best)
        tl.store(mass_ptr + place, tl.sum(tl.sum(_mass(x, anchor, temperature), 1), 0))


# ---- the draw


@triton.jit
def _pick(ids, masses, number):
    """The first id whose cumulative mass exceeds the share `number` of the whole, of tokens in order; else -1."""
    cumulative = tl.cumsum(masses, 0)
    total = tl.sum(masses, 0)
    target = _share(number, total)
    before = tl.max(tl.where(cumulative <= target, cumulative, 0), 0)
    # The first with a mass of its own: those after it that have none share its cumulative mass.
    first = (cumulative > target) & (cumulative - masses == before) & (masses > 0)
    return tl.max(tl.where(first, ids, -1), 0)


@triton.jit
def _draw_plainly(
    row_ptr, block_best, block_mass, best, number, temperature,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, NUM_BLOCKS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """By the masses of whole blocks first: only one of them is read again."""
    blocks = tl.arange(0, BLOCKS)
    masses = _relative(block_best, block_mass, best, temperature)
    cumulative = tl.cumsum(masses, 0)
    target = _share(number, tl.sum(masses, 0))
    block = tl.minimum(tl.sum((cumulative <= target).to(tl.int32), 0), NUM_BLOCKS - 1)
    chosen = blocks == block
    left = target - tl.max(tl.where(blocks < block, cumulative, 0), 0)
    share = left.to(tl.float64) / tl.maximum(tl.max(tl.where(chosen, masses, 0), 0), 1).to(tl.float64)
    ids = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(row_ptr + ids, mask=ids < VOCAB, other=float("-inf")).to(tl.float32)
    anchor = tl.max(tl.where(chosen, block_best, float("-inf")), 0)
    return _pick(ids, _mass(x, anchor, temperature), share)


@triton.jit
def _relative(block_best, block_mass, best, temperature):
    """The masses of blocks, each relative to its own largest logit, relative to that of the row."""
    scale = tl.where(block_mass > 0, tl.exp((block_best - best) / temperature), 0.0).to(tl.float64)
    return (block_mass.to(tl.float64) * scale + 0.5).to(tl.int64)


@triton.jit
def _gather(
    row_ptr, strips, bound, list_ptr, candidates_ptr, candidate_ids_ptr,
    VOCAB: tl.constexpr, STRIP: tl.constexpr, STRIPS: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    """Writes the logits above -inf whose key reaches `bound`, and their ids, in the order of ids; how many there are.

    Those beyond CAPACITY are counted, as far as one load goes, not written.
    """
    num_listed = strips_above(strips, (ordered(strips) >= bound) & (strips > float("-inf")), list_ptr, STRIPS)
    count = tl.full([], 0, tl.int32)
    start = tl.full([], 0, tl.int32)
    while (start < num_listed) & (count <= CAPACITY):
        ids, x = load_strips(row_ptr, list_ptr, start, num_listed, VOCAB, STRIP)
        passes = (ordered(x) >= bound) & (x > float("-inf"))
        places = count + tl.cumsum(passes.to(tl.int32), 0) - 1
        tl.store(candidates_ptr + places, x, mask=passes & (places < CAPACITY))
        tl.store(candidate_ids_ptr + places, ids, mask=passes & (places < CAPACITY))
        count += tl.sum(passes.to(tl.int32), 0)
        start += STRIPS_AT_ONCE
    tl.debug_barrier()
    return count


@triton.jit
def _nucleus(keys, masses, wanted, low, high):
    """The largest key at or above which the mass is at least `wanted`, float64 and above 0, or one as good.

    Halves [low, high), as `kth_largest`. A key's mass is below 2**31, that of all of them below 2**44.
    """
    counted = masses + (1 << 44)
    num_low, num_high = tl.full([], 1 << 30, tl.int64), tl.full([], 0, tl.int64)
    while (high - low > 1) & (num_low - num_high > 1):
        middle = low + (high - low) // 2
        amount = tl.sum(tl.where(keys >= middle, counted, 0), 0)
        count = amount >> 44
        enough = (amount - (count << 44)).to(tl.float64) >= wanted
        num_low, num_high = tl.where(enough, count, num_low), tl.where(enough, num_high, count)
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    return low


@triton.jit
def _draw_candidates(
    candidates_ptr, candidate_ids_ptr, count, bound, total, best, number, temperature, top_p, min_p, top_k,
    VOCAB: tl.constexpr, CAPACITY: tl.constexpr, LOWEST_BIT: tl.constexpr,
):  # fmt: skip
    """Among all logits whose key reaches `bound`; -1 where top-p needs more of them. `total`: the mass of the row."""
    places = tl.arange(0, CAPACITY)
    x = tl.load(candidates_ptr + places, mask=places < count, other=float("-inf"))
    ids = tl.load(candidate_ids_ptr + places, mask=places < count, other=0)
    keys = tl.where(places < count, ordered(x) >> LOWEST_BIT, 0)
    masses = tl.where(places < count, _mass(x, best, temperature), 0)
    low, high = bound >> LOWEST_BIT, (ordered(best) >> LOWEST_BIT) + 1
    if top_k < count:
        low = kth_largest(keys, top_k, 0, low, high)
        masses = tl.where(keys >= low, masses, 0)
    enough = tl.full([], True, tl.int1)
    if top_p < 1:
        kept = tl.sum(masses, 0)
        wanted = tl.maximum(top_p.to(tl.float64) * tl.where(top_k < VOCAB, kept, total).to(tl.float64), 1.0)
        enough = kept.to(tl.float64) >= wanted
        masses = tl.where(keys >= _nucleus(keys, masses, wanted, low, high), masses, 0)
    if min_p > 0:
        masses = tl.where(x >= best + temperature * tl.log(min_p), masses, 0)
    return tl.where(enough, _pick(ids, masses, number), -1)


@triton.jit
def _passing(
    row_ptr, start, floor, best, temperature, VOCAB: tl.constexpr, BLOCK: tl.constexpr, LOWEST_BIT: tl.constexpr
):  # fmt: skip
    """Ids, keys and masses of BLOCK tokens from `start` on; of those whose key is below `floor` both are 0."""
    ids = start + tl.arange(0, BLOCK)
    x = tl.load(row_ptr + ids, mask=ids < VOCAB, other=float("-inf")).to(tl.float32)
    keys = ordered(x) >> LOWEST_BIT
    passes = (ids < VOCAB) & (keys >= floor)
    return ids, tl.where(passes, keys, 0), tl.where(passes, _mass(x, best, temperature), 0)


@triton.jit
def _bisect_row(
    row_ptr, best, temperature, wanted, low,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, LOWEST_BIT: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """The largest key that `wanted` of the logits reach (COUNT), or logits of a mass of `wanted`; at least `low`.

    Those below `low` do not count. A pass over the row for each halving of what is left.
    """
    floor, high = low, (ordered(best) >> LOWEST_BIT) + 1
    num_low, num_high = tl.full([], 1 << 30, tl.int32), tl.full([], 0, tl.int32)
    while (high - low > 1) & (num_low - num_high > 1):
        middle = low + (high - low) // 2
        counts, amounts = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int64)
        for start in range(0, VOCAB, BLOCK):
            _, keys, masses = _passing(row_ptr, start, floor, best, temperature, VOCAB, BLOCK, LOWEST_BIT)
            counts += (keys >= middle).to(tl.int32)
            amounts += tl.where(keys >= middle, masses, 0)
        count = tl.sum(counts, 0)
        enough = (count if COUNT else tl.sum(amounts, 0)).to(tl.float64) >= wanted
        num_low, num_high = tl.where(enough, count, num_low), tl.where(enough, num_high, count)
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    return low


@triton.jit
def _draw_by_passes(
    row_ptr, best, number, temperature, top_p, min_p, top_k,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, LOWEST_BIT: tl.constexpr,
):  # fmt: skip
    """Whatever the filters leave: by passes over the whole row."""
    floor = tl.full([], _MINUS_INFINITY, tl.uint32) >> LOWEST_BIT
    if top_k < VOCAB:
        wanted = top_k.to(tl.float64)
        floor = _bisect_row(row_ptr, best, temperature, wanted, floor, VOCAB, BLOCK, LOWEST_BIT, True)
    if top_p < 1:
        total = _row_mass(row_ptr, best, temperature, floor, VOCAB, BLOCK, LOWEST_BIT)
        wanted = tl.maximum(top_p.to(tl.float64) * total.to(tl.float64), 1.0)
        floor = _bisect_row(row_ptr, best, temperature, wanted, floor, VOCAB, BLOCK, LOWEST_BIT, False)
    if min_p > 0:  # rounded up, where a key has fewer bits than the product
        least = ordered(best + temperature * tl.log(min_p)) + ((1 << LOWEST_BIT) - 1)
        floor = tl.maximum(floor, least >> LOWEST_BIT)
    target = _share(number, _row_mass(row_ptr, best, temperature, floor, VOCAB, BLOCK, LOWEST_BIT))
    token = tl.full([], -1, tl.int32)
    before = tl.full([], 0, tl.int64)
    for start in range(0, VOCAB, BLOCK):
        _, _, masses = _passing(row_ptr, start, floor, best, temperature, VOCAB, BLOCK, LOWEST_BIT)
        mass = tl.sum(masses, 0)
        if (target >= before) & (target < before + mass):
            token = start + tl.sum((before + tl.cumsum(masses, 0) <= target).to(tl.int32), 0)
        before += mass
    return token


@triton.jit
def _row_mass(
    row_ptr, best, temperature, floor, VOCAB: tl.constexpr, BLOCK: tl.constexpr, LOWEST_BIT: tl.constexpr
):  # fmt: skip
    amounts = tl.zeros([BLOCK], tl.int64)
    for start in range(0, VOCAB, BLOCK):
        _, _, masses = _passing(row_ptr, start, floor, best, temperature, VOCAB, BLOCK, LOWEST_BIT)
        amounts += masses
    return tl.sum(amounts, 0)


@triton.jit
def _draw_filtered(
    row_ptr, strips, total, best, number, temperature, top_p, min_p, top_k, list_ptr, candidates_ptr, candidate_ids_ptr,
    VOCAB: tl.constexpr, STRIP: tl.constexpr, STRIPS: tl.constexpr, CAPACITY: tl.constexpr, PASS_BLOCK: tl.constexpr,
    LOWEST_BIT: tl.constexpr,
):  # fmt: skip
    """Among candidates where they are few enough, which they are but for flat distributions; else by passes."""
    keys = ordered(strips)
    token = tl.full([], -1, tl.int32)
    num_strips = tl.where(top_k < VOCAB, tl.minimum(top_k, _MOST_STRIPS + 1).to(tl.int32), _FIRST_STRIPS)
    while (token < 0) & (num_strips <= _MOST_STRIPS):
        if (top_k < VOCAB) | (top_p < 1):
            low = tl.full([], _MINUS_INFINITY, tl.uint32)
            bound = kth_largest(keys, num_strips, 8 + num_strips // 8, low, ordered(best) + 1)
        else:
            bound = ordered(best + temperature * tl.log(min_p))
        count = _gather(
            row_ptr, strips, bound, list_ptr, candidates_ptr, candidate_ids_ptr, VOCAB, STRIP, STRIPS, CAPACITY
        )
        if count <= CAPACITY:
            token = _draw_candidates(
                candidates_ptr, candidate_ids_ptr, count, bound, total, best, number, temperature, top_p, min_p, top_k,
                VOCAB, CAPACITY, LOWEST_BIT,
            )  # fmt: skip
        more = (top_k >= VOCAB) & (top_p < 1) & (num_strips < _MOST_STRIPS) & (count <= CAPACITY)
        num_strips = tl.where(more, _MOST_STRIPS, _MOST_STRIPS + 1)
    if token < 0:
        token = _draw_by_passes(row_ptr, best, number, temperature, top_p, min_p, top_k, VOCAB, PASS_BLOCK, LOWEST_BIT)
    return token


@triton.jit
def _draw_kernel(
    x_ptr, slots_ptr, positions_ptr, floats_ptr, ints_ptr, counts_ptr,
    best_ptr, best_id_ptr, mass_ptr, check_ptr, strips_ptr, list_ptr, candidates_ptr, candidate_ids_ptr,
    tokens_ptr, finite_ptr,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, NUM_BLOCKS: tl.constexpr, BLOCKS: tl.constexpr, STRIP: tl.constexpr,
    NUM_STRIPS: tl.constexpr, STRIPS: tl.constexpr, CAPACITY: tl.constexpr, PASS_BLOCK: tl.constexpr,
    LOWEST_BIT: tl.constexpr, FILTERED: tl.constexpr, ADJUSTED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The token of a row, the likeliest where the temperature is 0, the drawn one elsewhere; and if it was finite."""
    if PDL:
        await_previous()
    row = tl.program_id(0).to(tl.int64)
    row_ptr = x_ptr + row * VOCAB
    slot = tl.load(slots_ptr + row)
    floats, ints = floats_ptr + slot * _FLOATS, ints_ptr + slot * _INTS
    temperature = tl.load(floats)
    blocks = tl.arange(0, BLOCKS)
    places, real = row * NUM_BLOCKS + blocks, blocks < NUM_BLOCKS
    check = tl.sum(tl.load(check_ptr + places, mask=real, other=0.0), 0)
    tl.store(finite_ptr + row, tl.abs(check) < float("inf"))  # not so for NaN either
    block_best = tl.load(best_ptr + places, mask=real, other=float("-inf"))
    best = tl.max(block_best, 0)
    best_ids = tl.load(best_id_ptr + places, mask=real, other=VOCAB)
    likeliest = tl.min(tl.where(block_best == best, best_ids, VOCAB), 0)
    likeliest = tl.where(likeliest < VOCAB, likeliest, 0)
    token = likeliest
    if temperature > 0:
        number = _uniform(tl.load(ints), tl.load(positions_ptr + row))
        block_mass = tl.load(mass_ptr + places, mask=real, other=0)
        filters = tl.full([], False, tl.int1)
        if FILTERED:
            top_p, min_p, top_k = tl.load(floats + 1), tl.load(floats + 2), tl.load(ints + 1)
            filters = (top_k < VOCAB) | (top_p < 1) | (min_p > 0)
            if filters:
                numbers = tl.arange(0, STRIPS)
                strips = tl.load(
                    strips_ptr + row * NUM_STRIPS + numbers, mask=numbers < NUM_STRIPS, other=float("-inf")
                )
                total = tl.sum(_relative(block_best, block_mass, best, temperature), 0)
                token = _draw_filtered(
                    row_ptr, strips, total, best, number, temperature, top_p, min_p, top_k,
                    list_ptr + row * NUM_STRIPS, candidates_ptr + row * CAPACITY, candidate_ids_ptr + row * CAPACITY,
                    VOCAB, STRIP, STRIPS, CAPACITY, PASS_BLOCK, LOWEST_BIT,
                )  # fmt: skip
        if filters == 0:
            token = _draw_plainly(
                row_ptr, block_best, block_mass, best, number, temperature, VOCAB, BLOCK, NUM_BLOCKS, BLOCKS
            )
        token = tl.where((token >= 0) & (token < VOCAB), token, likeliest)  # of a row that is not finite
    tl.store(tokens_ptr + row, token.to(tl.int64))
    if ADJUSTED:
        repetition, presence, frequency = tl.load(floats + 3), tl.load(floats + 4), tl.load(floats + 5)
        if (repetition != 1.0) | (presence != 0.0) | (frequency != 0.0):
            tl.atomic_add(counts_ptr + slot * VOCAB + token, 1)


def sample(
    logits: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor, tables: SamplingTables, features: Features
) -> Samples:
    """As `reference_sampling.sample`, but for the rounding of probabilities."""
    num_rows, vocab_size = logits.shape
    device, early, strip = logits.device, pdl(logits.device), strip_size(vocab_size)
    num_blocks = triton.cdiv(vocab_size, BLOCK)
    num_strips = num_blocks * (BLOCK // strip)
    changed = features.adjusted or features.masked
    nothing = torch.empty(1, dtype=torch.int32, device=device)
    counts = bias_ids = biases = end_words = nothing
    if features.adjusted and (rows := tables.adjustments) is not None:
        counts, bias_ids, biases, end_words = rows.counts, rows.bias_ids, rows.biases, rows.end_words
    masks = tables.masks if features.masked and tables.masks is not None else nothing
    x = torch.empty(num_rows, vocab_size, device=device) if changed else logits
    best, check = (torch.empty(num_rows, num_blocks, device=device) for _ in range(2))
    best_ids = torch.empty(num_rows, num_blocks, dtype=torch.int32, device=device)
    mass = torch.empty(num_rows, num_blocks, dtype=torch.int64, device=device)
    strips = torch.empty(num_rows, num_strips if features.filtered else 1, device=device)
    listed = torch.empty_like(strips, dtype=torch.int32)
    candidates = torch.empty(num_rows, _CAPACITY if features.filtered else 1, device=device)
    candidate_ids = torch.empty_like(candidates, dtype=torch.int32)
    tokens, finite = Samples.allocate(num_rows, device)
    _survey_kernel[num_rows, num_blocks](
        logits, slots, positions, tables.floats, tables.ints, counts, bias_ids, biases, end_words, masks, x,
        best, best_ids, mass, check, strips, VOCAB=vocab_size, WORDS=triton.cdiv(vocab_size, 32), BLOCK=BLOCK,
        STRIP=strip, FILTERED=features.filtered, ADJUSTED=features.adjusted, MASKED=features.masked, PDL=early,
        num_warps=8, launch_pdl=early,
    )  # fmt: skip
    # A 16-bit float widened to 32 bits: bfloat16 leaves 16 low bits at zero, float16 13.
    lowest_bit = {torch.bfloat16: 16, torch.float16: 13}.get(x.dtype, 0)
    _draw_kernel[(num_rows,)](
        x, slots, positions, tables.floats, tables.ints, counts, best, best_ids, mass, check, strips, listed,
        candidates, candidate_ids, tokens, finite,
        VOCAB=vocab_size, BLOCK=BLOCK, NUM_BLOCKS=num_blocks, BLOCKS=triton.next_power_of_2(num_blocks), STRIP=strip,
        NUM_STRIPS=num_strips, STRIPS=triton.next_power_of_2(num_strips), CAPACITY=_CAPACITY,
        PASS_BLOCK=min(_PASS_BLOCK, triton.next_power_of_2(vocab_size)), LOWEST_BIT=lowest_bit,
        FILTERED=features.filtered, ADJUSTED=features.adjusted, PDL=early, num_warps=8, launch_pdl=early,
    )  # fmt: skip
    if features.num_logprobs is None:
        return Samples(tokens, finite)
    return Samples(tokens, finite, logprobs(logits, tokens, features.num_logprobs))
