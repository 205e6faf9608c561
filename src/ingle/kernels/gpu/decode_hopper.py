"""Attention of decoding sequences on Hopper, as a Gluon kernel.

One warp asks for pages by TMA, into a ring of tiles, as far ahead as that has room: also before the kernel before is
done, which writes but the last key of each sequence. Four warps multiply. Keys are the rows of their products, query
heads the columns, of which a warpgroup's instructions need 8 where a warp's need 16 rows: so keys and values in floats
go from shared memory to the tensor cores as they are, and codes through few registers. How shares are cut is as in
`attention`.
"""

# ruff: noqa: RUF005 (Triton unpacks nothing into a tuple)
from __future__ import annotations

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ingle.kernels.batch import Batch, DecodeWork
from ingle.kernels.gpu.device import pdl, shared_memory
from ingle.kernels.gpu.heads import DecodeTiling, scale_and_cap
from ingle.kernels.gpu.kv_codes import (
    LEAST_SCALE,
    SPARE_BITS,
    UNPACK_E4M3,
    UNPACK_E5M2,
    UNPACK_INT8,
    kind_of,
    words,
)  # fmt: skip
from ingle.kernels.options import AttentionOptions

_KEYS = 64
"""Of a tile: rows of a warpgroup's product."""
_STAGES = 3
"""Tiles that a program has room for: more were no faster."""
_REGISTERS = {3: 80, 2: 128, 1: 248}
"""Of a thread when a program starts, by programs of an SM: then the warp that asks gives up what it does not need."""
_CHUNK = gl.constexpr(16)
"""Keys that lie together in a page, and are asked for at once."""
_COLUMNS = gl.constexpr(64)
"""16-bit numbers of a key in a tile: 128 bytes, which shared memory's banks hold."""
_LOWEST = gl.constexpr(-1e20)
_LOG2_E = gl.constexpr(1.4426950408889634)
_barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # from Triton 3.7 on, and before


def fits(q: torch.Tensor, kv_cache: torch.Tensor, kv_scales: torch.Tensor | None, window: int | None) -> bool:
    """Whether `decode` takes them."""
    held = words(kv_cache, kv_scales)
    page_size, num_kv_heads = kv_cache.shape[2:4]
    return (
        q.dtype in (torch.float16, torch.bfloat16)
        and (kv_scales is not None or kv_cache.dtype == q.dtype)
        and held.shape[-1] in (64, 128, 256)
        and q.shape[1] // num_kv_heads <= 32
        and window is None
        and page_size % _CHUNK.value == 0
        and held.stride(0) == held.shape[1] * held.stride(1)
        and held.stride(-1) == 1
        and all(stride % 8 == 0 for stride in held.stride()[:-1])
    )


@gluon.jit
def _exp2(x):
    """As `heads.exp2`."""
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], gl.float32, is_pure=True, pack=1)


@gluon.jit
def _log2(x):
    """Of normal numbers."""
    return gl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], gl.float32, is_pure=True, pack=1)


@gluon.jit
def _await_previous():
    """As `device.await_previous`, without letting the next kernel begin."""
    gl.inline_asm_elementwise(
        "griddepcontrol.wait; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )  # fmt: skip


@gluon.jit
def _begin_next():
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )  # fmt: skip


@gluon.jit
def _unpack(codes, KIND: gl.constexpr):
    """As `kv_codes.unpack`."""
    asm: gl.constexpr = UNPACK_INT8 if KIND == 1 else UNPACK_E4M3 if KIND == 2 else UNPACK_E5M2
    return gl.inline_asm_elementwise(
        asm, "=r,=r,r", [codes], dtype=(gl.float16, gl.float16), is_pure=True, pack=2
    )  # fmt: skip


@gluon.jit
def _pages(table_ptr, key, length, missing, CHUNKS: gl.constexpr, PAGE_SIZE: gl.constexpr):
    """Of a tile's chunks; `missing` behind the end."""
    found = ()
    for chunk in gl.static_range(CHUNKS):
        at = key + _CHUNK * chunk
        found = found + (gl.load(table_ptr + at // PAGE_SIZE, mask=at < length, other=missing),)
    return found


@gluon.jit
def _ask(kv, kv_scales, tiles, scale_rows, bar, stage, pages, num_pages, kv_head, key, length,
    WIDTH: gl.constexpr, CHUNKS: gl.constexpr, PAGE_SIZE: gl.constexpr, KIND: gl.constexpr,
):  # fmt: skip
    """For a tile of keys and values. Floats that lie behind a sequence's end may be no numbers: zeros are read in place
    of them, before the first of the chunk's keys, so that those are the last of their chunk."""
    PARTS: gl.constexpr = WIDTH // _COLUMNS
    mbarrier.expect(bar, 2 * CHUNKS * (_CHUNK * WIDTH * 2 + (128 if KIND else 0)))
    for side in gl.static_range(2):
        for chunk in gl.static_range(CHUNKS):
            at = key + _CHUNK * chunk
            page = pages[chunk] + side * num_pages
            token = gl.where(at < length, at % PAGE_SIZE, 0)
            if not KIND:
                token = gl.where(at < length, token - gl.maximum(at + _CHUNK - length, 0), 0)
            for part in gl.static_range(PARTS):
                to = tiles.index(((stage * 2 + side) * PARTS + part) * CHUNKS + chunk)
                tma.async_copy_global_to_shared(kv, [page, kv_head, token, part * _COLUMNS], bar, to)
            if KIND:
                to = scale_rows.index((stage * 2 + side) * CHUNKS + chunk)
                tma.async_copy_global_to_shared(kv_scales, [page, kv_head, token], bar, to)


@gluon.jit
def _produce(
    kv, kv_scales, tiles, scale_rows, full, empty, page_tables_ptr, lengths_ptr, slots_ptr, table_stride, num_pages,
    kv_head, first, last, iteration, end,
    WIDTH: gl.constexpr, PAGE_SIZE: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr, KIND: gl.constexpr,
    AWAIT: gl.constexpr,
):  # fmt: skip
    CHUNKS: gl.constexpr = KEYS // _CHUNK
    seq, key, slot, length, until = last
    in_last = until > 0
    if not in_last:
        seq, key, slot, length, until = first
    table = page_tables_ptr + slot.to(gl.int64) * table_stride
    missing = 2 * num_pages
    pages = _pages(table, key, length, missing, CHUNKS, PAGE_SIZE)
    stage = 0
    phase = 1
    while iteration < end:
        if AWAIT and key + KEYS >= length:  # the kernel before writes a sequence's last key
            _await_previous()
        mbarrier.wait(empty.index(stage), phase)
        _ask(
            kv, kv_scales, tiles, scale_rows, full.index(stage), stage, pages, num_pages, kv_head, key, length,
            WIDTH, CHUNKS, PAGE_SIZE, KIND,
        )  # fmt: skip
        iteration += 1
        key += KEYS
        if (key >= until) & (iteration < end):
            if in_last:
                seq, key, slot, length, until = first
                in_last = in_last & False
                table = page_tables_ptr + slot.to(gl.int64) * table_stride
            else:
                seq += 1
                key = 0
                length = gl.load(lengths_ptr + seq).to(gl.int32)
                until = length
                table = page_tables_ptr + gl.load(slots_ptr + seq) * table_stride
        # Which pages are next is known before there is room for them.
        pages = _pages(table, key, length, missing, CHUNKS, PAGE_SIZE)
        stage += 1
        if stage == STAGES:
            stage = 0
            phase = phase ^ 1


@gluon.jit
def _scores(q_tiles, tiles, at, HELD: gl.constexpr, MMA: gl.constexpr, KEYS: gl.constexpr, ROWS: gl.constexpr,
    PARTS: gl.constexpr, KIND: gl.constexpr,
):  # fmt: skip
    """Of a tile of keys with all heads [KEYS, ROWS], and before the scales of codes."""
    scores = gl.zeros([KEYS, ROWS], gl.float32, MMA)
    for part in gl.static_range(PARTS):
        if KIND:
            first, other = _unpack(tiles.index(at + part).load(HELD), KIND)
            q, more_q = q_tiles.index(part).permute((1, 0)), q_tiles.index(part + PARTS).permute((1, 0))
            scores = warpgroup_mma(first, q, scores, use_acc=part > 0, is_async=True)
            scores = warpgroup_mma(other, more_q, scores, is_async=True)
            scores, first, other = warpgroup_mma_wait(0, deps=[scores, first, other])
        else:
            q = q_tiles.index(part).permute((1, 0))
            scores = warpgroup_mma(tiles.index(at + part), q, scores, use_acc=part > 0, is_async=True)
    if not KIND:
        scores = warpgroup_mma_wait(0, deps=[scores])
    return scores


@gluon.jit
def _add_values(sums, weights, tiles, at, HELD: gl.constexpr, PARTS: gl.constexpr, KIND: gl.constexpr):
    """Of a tile, by weights [KEYS, ROWS], to sums [64, ROWS] of each part of the head's numbers."""
    more = ()
    if KIND:
        others = ()
        for part in gl.static_range(PARTS):
            first, other = _unpack(tiles.index(at + part).permute((1, 0)).load(HELD), KIND)
            x = warpgroup_mma(first, weights, sums[part], is_async=True)
            y = warpgroup_mma(other, weights, sums[part + PARTS], is_async=True)
            x, y, first, other = warpgroup_mma_wait(0, deps=[x, y, first, other])
            more, others = more + (x,), others + (y,)
        more = more + others
    else:
        for part in gl.static_range(PARTS):
            values = tiles.index(at + part).permute((1, 0))
            more = more + (warpgroup_mma(values, weights, sums[part], is_async=True),)
        more = (warpgroup_mma_wait(0, deps=more),) if PARTS == 1 else warpgroup_mma_wait(0, deps=more)
    return more


@gluon.jit
def _scale(sums, factor):
    """Of each head, whose sums are a column."""
    scaled = ()
    for part in gl.static_range(len(sums)):
        scaled = scaled + (sums[part] * gl.expand_dims(factor, 0),)
    return scaled


@gluon.jit
def _store(ptr, sums, places, mask):
    for part in gl.static_range(len(sums)):
        gl.store(ptr + places + part * _COLUMNS, sums[part].to(ptr.dtype.element_ty), mask=mask)


@gluon.jit
def _join(
    parts_ptr, sums_ptr, out_ptr, sinks_ptr, first_program, last_program, out_row, head, head_mask, places, mask,
    NUM_HEADS: gl.constexpr, HEAD_DIM: gl.constexpr, ROWS: gl.constexpr, MMA: gl.constexpr,
):  # fmt: skip
    """As `shares._join`; `out_row` and `head` are of the first of the program's heads."""
    HEADS: gl.constexpr = gl.SliceLayout(0, MMA)
    heads = gl.arange(0, ROWS, HEADS)
    AT_ONCE: gl.constexpr = max(4096 // (HEAD_DIM * ROWS), 1)
    best = gl.full([ROWS], _LOWEST, gl.float32, HEADS)
    total = gl.zeros([ROWS], gl.float32, HEADS)
    sums = _zeros(HEAD_DIM, ROWS, MMA)
    for begin in range(first_program, last_program + 1, AT_ONCE):
        log_sums, numbers = (), ()
        for other in gl.static_range(AT_ONCE):
            program = begin + other
            there = program <= last_program
            row = ((2 * program + (program == first_program).to(gl.int32)) * NUM_HEADS + head).to(gl.int64)
            log_sum = gl.load(
                sums_ptr + row + heads, mask=head_mask & there, other=float("-inf"), cache_modifier=".cg"
            )  # fmt: skip
            log_sums = log_sums + (log_sum,)
            for part in gl.static_range(len(sums)):
                part_ptr = parts_ptr + row * HEAD_DIM + places + part * _COLUMNS
                numbers = numbers + (gl.load(part_ptr, mask=mask & there, other=0.0, cache_modifier=".cg"),)
        for other in gl.static_range(AT_ONCE):
            new_best = gl.maximum(best, log_sums[other])
            shrink = _exp2(best - new_best)
            weight = _exp2(log_sums[other] - new_best)
            more = ()
            for part in gl.static_range(len(sums)):
                scaled = sums[part] * gl.expand_dims(shrink, 0)
                more = more + (scaled + numbers[other * len(sums) + part] * gl.expand_dims(weight, 0),)
            sums = more
            total = total * shrink + weight
            best = new_best
    if sinks_ptr is not None:
        total += _exp2(gl.load(sinks_ptr + head + heads, mask=head_mask, other=0.0) * _LOG2_E - best)
    _store(out_ptr + out_row * HEAD_DIM, _scale(sums, 1.0 / total), places, mask)


@gluon.jit
def _queries(ptr, places, mask, HEAD_DIM: gl.constexpr):
    """Of one sequence, those of a key head."""
    found = ()
    for part in gl.static_range(HEAD_DIM // _COLUMNS):
        found = found + (gl.load(ptr + places + part * _COLUMNS, mask=mask, other=0.0),)
    return found


@gluon.jit
def _zeros(HEAD_DIM: gl.constexpr, ROWS: gl.constexpr, MMA: gl.constexpr):
    zeros = ()
    for _ in gl.static_range(HEAD_DIM // _COLUMNS):
        zeros = zeros + (gl.zeros([_COLUMNS, ROWS], gl.float32, MMA),)
    return zeros


@gluon.jit
def _consume(
    q_ptr, tiles, scale_rows, full, empty, lengths_ptr, arrived_ptr, parts_ptr, sums_ptr, out_ptr, sinks_ptr, scale,
    cap, num_iterations, num_programs, kv_head, program, first, last, begin, end,
    NUM_HEADS: gl.constexpr, NUM_KV_HEADS: gl.constexpr, HEAD_DIM: gl.constexpr, WIDTH: gl.constexpr,
    ROWS: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr, CAPPED: gl.constexpr, KIND: gl.constexpr,
    AWAIT: gl.constexpr,
):  # fmt: skip
    GROUP: gl.constexpr = NUM_HEADS // NUM_KV_HEADS
    PARTS: gl.constexpr = WIDTH // _COLUMNS
    ALL_PARTS: gl.constexpr = HEAD_DIM // _COLUMNS
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    HELD: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    ALONG: gl.constexpr = gl.SliceLayout(1, MMA)
    HEADS: gl.constexpr = gl.SliceLayout(0, MMA)
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    TILE: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    # Rows of a tile as a product has them, by chunks.
    CHUNKS: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 8]], [[0, 0], [0, 0], [0, 1], [0, 2], [0, 4]], [[1, 0], [2, 0]], [], [KEYS // _CHUNK, _CHUNK]
    )
    dtype: gl.constexpr = gl.float16 if KIND else q_ptr.dtype.element_ty
    q_tiles = gl.allocate_shared_memory(dtype, [ALL_PARTS, ROWS, _COLUMNS], TILE)
    weight_tile = gl.allocate_shared_memory(dtype, [ROWS, KEYS], TILE)
    tiles = tiles._reinterpret(tiles.dtype, [STAGES * 2 * PARTS, KEYS, _COLUMNS], TILE)
    if KIND:
        scale_rows = scale_rows._reinterpret(
            gl.float32, [STAGES * 2, KEYS // _CHUNK, 32], gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
        )
    copy_rows = gl.expand_dims(gl.arange(0, ROWS, gl.SliceLayout(1, COPY)), 1)
    q_places = copy_rows * HEAD_DIM + gl.expand_dims(gl.arange(0, _COLUMNS, gl.SliceLayout(0, COPY)), 0)
    q_mask = q_places < GROUP * HEAD_DIM
    heads = gl.arange(0, ROWS, HEADS)
    head_mask = heads < GROUP
    places = gl.expand_dims(heads * HEAD_DIM, 0) + gl.expand_dims(gl.arange(0, _COLUMNS, ALONG), 1)
    mask = places < GROUP * HEAD_DIM
    keys = gl.arange(0, KEYS, ALONG)
    # How many keys have to be left for a row to be one of them: see `_ask`.
    from_left = keys + 1 if KIND else _CHUNK + 2 * (keys // _CHUNK * _CHUNK) - keys
    if AWAIT:
        _await_previous()
        _begin_next()
    in_last = last[4] > 0
    seq, key = gl.where(in_last, last[0], first[0]), gl.where(in_last, last[1], first[1])
    length, until = gl.where(in_last, last[3], first[3]), gl.where(in_last, last[4], first[4])
    head = kv_head * GROUP
    q_ptr += head * HEAD_DIM
    q = _queries(q_ptr + seq.to(gl.int64) * NUM_HEADS * HEAD_DIM, q_places, q_mask & (begin < end), HEAD_DIM)
    iteration = begin
    stage = 0
    phase = 0
    while iteration < end:  # of a sequence what is in the share
        from_start = key == 0
        num_tiles = gl.minimum((until - key + KEYS - 1) // KEYS, end - iteration)
        first_iteration = gl.where(in_last, end - num_tiles, iteration - key // KEYS)
        row = (seq * NUM_HEADS + head).to(gl.int64)
        for part in gl.static_range(ALL_PARTS):
            q_tiles.index(part).store(q[part].to(dtype))
        fence_async_shared()
        # What the next sequence takes comes beside this one's keys.
        next_seq = gl.where(in_last, first[0], seq + 1)
        is_next = iteration + num_tiles < end
        next_length = gl.load(lengths_ptr + next_seq, mask=is_next, other=0).to(gl.int32)
        q = _queries(q_ptr + next_seq.to(gl.int64) * NUM_HEADS * HEAD_DIM, q_places, q_mask & is_next, HEAD_DIM)
        best = gl.full([ROWS], _LOWEST, gl.float32, HEADS)
        totals = gl.zeros([KEYS, ROWS], gl.float32, MMA)
        sums = _zeros(HEAD_DIM, ROWS, MMA)
        for _ in range(num_tiles):
            mbarrier.wait(full.index(stage), phase)
            seen = gl.expand_dims(length - key >= from_left, 1)
            scores = _scores(q_tiles, tiles, stage * 2 * PARTS, HELD, MMA, KEYS, ROWS, PARTS, KIND)
            if KIND:
                key_scales = scale_rows.index(stage * 2).slice(0, _CHUNK, 1).load(CHUNKS)
                value_scales = scale_rows.index(stage * 2 + 1).slice(0, _CHUNK, 1).load(CHUNKS)
                key_scales = gl.expand_dims(gl.convert_layout(gl.reshape(key_scales, [KEYS]), ALONG), 1)
                value_scales = gl.expand_dims(gl.convert_layout(gl.reshape(value_scales, [KEYS]), ALONG), 1)
                value_scales = gl.where(seen, value_scales, 0.0)
                scores = scores * (key_scales * scale)
            else:
                scores = scores * scale
            if CAPPED:
                scores = cap - 2 * cap / (_exp2(scores) + 1)
            scores = gl.where(seen, scores, float("-inf"))
            if KIND:  # as `kv_codes.load_scales` has it
                most = gl.max(scores + _log2(gl.maximum(value_scales, LEAST_SCALE)) - SPARE_BITS, 0)
            else:
                most = gl.max(scores, 0)
            new_best = gl.maximum(best, most)
            weights = _exp2(scores - gl.expand_dims(new_best, 0))
            shrink = _exp2(best - new_best)
            best = new_best
            totals = totals * gl.expand_dims(shrink, 0) + weights
            if KIND:
                weights = weights * value_scales
            weight_tile.permute((1, 0)).store(weights.to(dtype))
            fence_async_shared()
            _barrier()
            sums = _scale(sums, shrink)
            sums = _add_values(
                sums, weight_tile.permute((1, 0)), tiles, (stage * 2 + 1) * PARTS, HELD, PARTS, KIND
            )  # fmt: skip
            mbarrier.arrive(empty.index(stage), count=1)
            key += KEYS
            stage += 1
            if stage == STAGES:
                stage = 0
                phase = phase ^ 1
        iteration += num_tiles
        total = gl.sum(totals, 0)
        if from_start & (key >= length):
            if sinks_ptr is not None:
                total += _exp2(gl.load(sinks_ptr + head + heads, mask=head_mask, other=0.0) * _LOG2_E - best)
            _store(out_ptr + row * HEAD_DIM, _scale(sums, 1.0 / total), places, mask)
        else:  # a program leaves two parts at most: a sequence's later keys, and another's first ones
            part_row = ((2 * program + from_start.to(gl.int32)) * NUM_HEADS + head).to(gl.int64)
            _store(parts_ptr + part_row * HEAD_DIM, _scale(sums, 1.0 / total), places, mask)
            gl.store(sums_ptr + part_row + heads, best + _log2(total), mask=head_mask)
            _barrier()  # the whole program's stores come before its arrival
            counter_ptr = arrived_ptr + seq * NUM_KV_HEADS + kv_head
            arrived = gl.atomic_add(counter_ptr, 1, sem="acq_rel")
            # As in `shares.join_if_last`.
            seq_end = first_iteration + (length + KEYS - 1) // KEYS
            first_program = ((first_iteration + 1) * num_programs + num_iterations - 1) // num_iterations - 1
            last_program = (seq_end * num_programs + num_iterations - 1) // num_iterations - 1
            if arrived == last_program - first_program:
                _join(
                    parts_ptr, sums_ptr, out_ptr, sinks_ptr, first_program, last_program, row, head, head_mask, places,
                    mask, NUM_HEADS, HEAD_DIM, ROWS, MMA,
                )  # fmt: skip
                gl.store(counter_ptr, 0)
        seq, length, until = next_seq, next_length, next_length
        key = gl.where(in_last, first[1], 0)
        end = gl.where(in_last, end - num_tiles, end)
        iteration = gl.where(in_last, begin, iteration)
        in_last = in_last & False


@gluon.jit(do_not_specialize=["max_programs"])
def _decode_hopper_kernel(
    q_ptr, kv, kv_scales, page_tables_ptr, lengths_ptr, slots_ptr, starts_ptr, num_iterations_ptr, arrived_ptr,
    parts_ptr, sums_ptr, out_ptr, sinks_ptr, scale, cap, max_programs, table_stride, num_pages,
    NUM_HEADS: gl.constexpr, NUM_KV_HEADS: gl.constexpr, HEAD_DIM: gl.constexpr, WIDTH: gl.constexpr,
    ROWS: gl.constexpr, PAGE_SIZE: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr, CAPPED: gl.constexpr,
    KIND: gl.constexpr, OLD: gl.constexpr, BESIDE: gl.constexpr,
):  # fmt: skip
    """A program walks through its share of all sequences' keys, which may begin and end amid a sequence.

    What it has of the sequence that the next program goes on with comes first: it is joined while others still read.
    """
    SLOTS: gl.constexpr = STAGES * 2 * (WIDTH // _COLUMNS) * (KEYS // _CHUNK)
    kv_head = gl.program_id(0)
    program = gl.program_id(1)
    if BESIDE:
        # The kernel before reads prompts, which is none of this one's business, but for its end.
        if program == gl.num_programs(1) - 1:
            _await_previous()
            _begin_next()
    elif not OLD:  # the very kernel before this one shares out
        _await_previous()
        _begin_next()
    # Tiles of as many tokens as fit a GPU's memory, times the programs of a key head: less than 2 ** 31.
    num_iterations = gl.load(num_iterations_ptr).to(gl.int32)
    num_programs = gl.minimum(num_iterations, max_programs)
    is_one, has_next = program < num_programs, program + 1 < num_programs
    start_ptr = starts_ptr + program * 4
    seq = gl.load(start_ptr, mask=is_one, other=0)
    key = gl.load(start_ptr + 1, mask=is_one, other=0)
    slot = gl.load(start_ptr + 2, mask=is_one, other=0)
    length = gl.load(start_ptr + 3, mask=is_one, other=0)
    next_seq = gl.load(start_ptr + 4, mask=has_next, other=0)
    next_key = gl.load(start_ptr + 5, mask=has_next, other=0)
    next_slot = gl.load(start_ptr + 6, mask=has_next, other=0)
    next_length = gl.load(start_ptr + 7, mask=has_next, other=0)
    begin = program * num_iterations // gl.maximum(num_programs, 1)
    end = gl.where(is_one, (program + 1) * num_iterations // gl.maximum(num_programs, 1), begin)
    # Of a sequence and its slot: a key to begin with, its length, and where what it has of it ends.
    first = (seq, key, slot, length, length)
    last = (next_seq, key * 0, next_slot, next_length, gl.where(next_seq > seq, next_key, 0))
    tiles = gl.allocate_shared_memory(kv.dtype, [SLOTS, 1, 1, _CHUNK, _COLUMNS], kv.layout)
    scale_rows = tiles
    if KIND:
        scale_rows = gl.allocate_shared_memory(
            gl.float32, [STAGES * 2 * (KEYS // _CHUNK), 1, 1, 32], kv_scales.layout
        )  # fmt: skip
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=1)
    fence_async_shared()
    AWAIT: gl.constexpr = OLD and not BESIDE
    gl.warp_specialize([
        (_consume, (
            q_ptr, tiles, scale_rows, full, empty, lengths_ptr, arrived_ptr, parts_ptr, sums_ptr, out_ptr, sinks_ptr,
            scale, cap, num_iterations, num_programs, kv_head, program, first, last, begin, end,
            NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, WIDTH, ROWS, KEYS, STAGES, CAPPED, KIND, AWAIT,
        )),
        (_produce, (
            kv, kv_scales, tiles, scale_rows, full, empty, page_tables_ptr, lengths_ptr, slots_ptr, table_stride,
            num_pages, kv_head, first, last, begin, end, WIDTH, PAGE_SIZE, KEYS, STAGES, KIND, AWAIT,
        )),
    ], [1], [24])  # fmt: skip


def _of_chunks(held: torch.Tensor) -> TensorDescriptor:
    """[2 * pages, heads, tokens, columns], from [2, pages, tokens, heads, columns]."""
    _, num_pages, page_size, heads, width = held.shape
    _, page, token, head, _ = held.stride()
    shape, layout = [2 * num_pages, heads, page_size, width], gl.NVMMASharedLayout(128, 16, 4)
    return TensorDescriptor(held, shape, [page, head, token, 1], [1, 1, _CHUNK.value, _COLUMNS.value], layout)


def _of_scales(kv_scales: torch.Tensor) -> TensorDescriptor:
    """[2 * pages, heads, tokens], in rows of 128 bytes: half of each is behind a chunk."""
    _, num_pages, heads, page_size = kv_scales.shape
    shape, layout = [2 * num_pages, heads, page_size], gl.NVMMASharedLayout(0, 32, 3)
    return TensorDescriptor(kv_scales, shape, [*kv_scales.stride()[1:3], 1], [1, 1, 32], layout)


def tiling(q: torch.Tensor, kv_cache: torch.Tensor, kv_scales: torch.Tensor | None) -> DecodeTiling:
    """Two programs of an SM keep it reading; where codes are to be converted, three."""
    tile_bytes = 2 * _KEYS * (kv_cache.shape[-1] * kv_cache.itemsize + (0 if kv_scales is None else 8))
    rows = _rows(q, kv_cache)
    other_bytes = rows * 2 * (q.shape[-1] + _KEYS) + 2048  # queries, weights and barriers

    def room(programs: int) -> int:
        return (shared_memory(q.device) // programs - other_bytes) // tile_bytes

    most = 2 if kv_scales is None or rows > 16 else 3
    programs = next((n for n in range(most, 0, -1) if room(n) >= 2), 1)
    return DecodeTiling(_KEYS, 4, min(room(programs), _STAGES), programs, _REGISTERS[programs])


def _rows(q: torch.Tensor, kv_cache: torch.Tensor) -> int:
    """Columns of a product: the query heads that share a key head."""
    return max(int(triton.next_power_of_2(q.shape[1] // kv_cache.shape[3])), 8)


def decode(
    q: torch.Tensor,
    held: tuple[torch.Tensor, torch.Tensor | None],
    batch: Batch,
    work: DecodeWork,
    options: AttentionOptions,
    sinks: torch.Tensor | None,
    out: torch.Tensor,
    *,
    is_old: bool,
) -> None:
    """`held`: keys and values, and the scales of codes; `is_old`, and what is done beside a kernel that reads prompts:
    as `attention._decode` has it."""
    kv_cache, kv_scales = held
    _, num_heads, head_dim = q.shape
    page_size, num_kv_heads = kv_cache.shape[2:4]
    max_programs, numbers, shape = len(work.starts), words(kv_cache, kv_scales), tiling(q, kv_cache, kv_scales)
    parts = torch.empty(2 * max_programs, num_heads, head_dim, dtype=torch.float32, device=q.device)
    sums = torch.empty(2 * max_programs, num_heads, dtype=torch.float32, device=q.device)
    beside = batch.num_blocks > 0
    _decode_hopper_kernel[(num_kv_heads, max_programs + beside)](
        q, _of_chunks(numbers), None if kv_scales is None else _of_scales(kv_scales), batch.page_tables,
        batch.inputs.decode_lengths, batch.inputs.slots, work.starts, work.num_iterations, work.arrived, parts, sums,
        out, sinks, *scale_and_cap(options), max_programs, batch.page_tables.stride(0), numbers.shape[1],
        NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim, WIDTH=numbers.shape[-1],
        ROWS=_rows(q, kv_cache), PAGE_SIZE=page_size, KEYS=shape.keys,
        STAGES=shape.stages, CAPPED=options.softcap is not None, KIND=kind_of(kv_cache, kv_scales), OLD=is_old,
        BESIDE=beside, num_warps=shape.warps, launch_pdl=pdl(q.device), maxnreg=shape.registers,
    )  # fmt: skip
