"""Products of more rows than few with codes, on Hopper: a tile is decoded on its way to the tensor cores.

Weights are the tensor cores' operand in registers, and what those multiply meanwhile is another part of the tile: Gluon
says when to wait. A program has two warpgroups that multiply, a warp that has codes and rows copied into the SM's
memory, and two that bring scales. It goes from tile to tile; tiles that would leave programs without any are shared
out, columns of a tile to several programs. Each of those adds up as much of the sums as it multiplied, in order, once
all have left theirs: all programs run side by side, so waiting for one another ends.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

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
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ingle.kernels.coded import BITS, MIDDLE, Coded
from ingle.kernels.gpu import warpgroups_blocks
from ingle.kernels.gpu.codes import FORMATS
from ingle.kernels.gpu.device import counters, gathers_programs, has_warpgroups, num_sms, pdl
from ingle.kernels.gpu.warpgroups_blocks import block_numbers, load_steps, store_steps

# Two bytes are two numbers of 16 bits in a register, or four in two: of their lower halves, then of their upper ones.
_SPREAD = "{{ .reg .b32 w, t, s, a; cvt.u32.u16 w, ${0}; prmt.b32 w, w, 0, 0x4140; "
_NIBBLES = "lop3.b32 t, w, 0x000f000f, {0}, 0xea; "
_DECODE = {
    ("int4", "bf16"): (_NIBBLES.format("0x43004300"), "shr.b32 w, w, 4; " + _NIBBLES.format("0x43004300")),
    ("int4", "f16"): (_NIBBLES.format("0x64006400"), "shr.b32 w, w, 4; " + _NIBBLES.format("0x64006400")),
    ("int8", "bf16"): (
        "lop3.b32 s, w, 0x00800080, 0xc380c380, 0x6a; lop3.b32 t, w, 0x007f007f, 0x43004300, 0xea; "
        "add.rn.bf16x2 t, t, s; ",
    ),
    ("int8", "f16"): ("or.b32 t, w, 0x64006400; ",),
    ("fp8", "bf16"): (
        "shl.b32 w, w, 8; and.b32 s, w, 0x80008000; shr.b32 t, w, 4; lop3.b32 t, t, 0x07f007f0, s, 0xea; "
        "mov.b32 a, 0x7b807b80; mul.rn.bf16x2 t, t, a; ",
    ),
    ("fp8", "f16"): (
        "shl.b32 w, w, 8; and.b32 s, w, 0x80008000; shr.b32 t, w, 1; lop3.b32 t, t, 0x3f803f80, s, 0xea; "
        "mov.b32 a, 0x5c005c00; mul.rn.f16x2 t, t, a; ",
    ),
}
_BIAS = {("int4", "bf16"): 128, ("int4", "f16"): 1024, ("int8", "bf16"): -128, ("int8", "f16"): 1024}
"""What those are more than the code."""
_WHOLE = 1 << 20
"""Columns of a group that has all of a row's."""
_MOST_ROWS, _MOST_ROWS_OF_WIDE, _WIDE = 256, 512, 1 << 14
"""Rows up to which this is faster than decoding first: of any matrix, and of those with so many rows of weights."""
_MOST_ROWS_BY_256 = 2048
"""As much, of what is decoded once for 256 rows."""
_MOST_SHARERS = 8
"""Of a tile of 128 rows of weights, that each has 16 of them to add up."""
_MOST_OFF = 0.02
"""Of the norm, that what is right may be off what decoding first gives: bfloat16 rounds 0.3 % of either away."""


class Tiling(NamedTuple):
    rows: int
    """Of inputs."""
    num_stages: int
    """Four at most: each has three barriers by their numbers, of which there are 16."""
    outs: int = 256
    """Rows of weights; a warpgroup has half of them."""
    num_bytes: int = 64
    """Of a row of weights, that a step takes."""
    sharers: int | None = None
    """Programs that share out tiles; None for what `num_sharers` finds best."""


def is_fastest(x: torch.Tensor, coded: Coded) -> bool:
    """Whether it takes them, and nothing else is faster."""
    most = _MOST_ROWS_OF_WIDE if coded.num_rows >= _WIDE else _MOST_ROWS
    return len(x) <= (_MOST_ROWS_BY_256 if _takes_256(coded) else most) and suits(x, coded)


_Product = Callable[[torch.Tensor, Coded, torch.Tensor | None], torch.Tensor]
_right: dict[tuple[object, ...], bool] = {}


def is_right(x: torch.Tensor, coded: Coded, otherwise: _Product) -> bool:
    """Whether products like this one are what they are `otherwise`, of random inputs; said in the log if not.

    Gluon is not settled: what the next Triton, or another driver, makes of it is tried before it is used. That is when
    such a product is first asked for, which is before a CUDA graph is captured, for there nothing can be compared.
    """
    matrix = coded.num_rows, coded.num_columns, coded.group_size, coded.half, coded.scales.dtype, coded.zeros is None
    shape = tiling(len(x), coded)
    key = x.device, x.dtype, shape, coded.kind, coded.span, *matrix
    if key not in _right:
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            return False
        size = min(len(x), 2 * shape.rows), coded.num_columns
        seeded = torch.Generator(x.device).manual_seed(0)
        rows = torch.randn(size, generator=seeded, device=x.device).to(x.dtype)
        right = otherwise(rows, coded, None).float()
        off = float((multiply(rows, coded, None, shape).float() - right).norm() / right.norm())
        _right[key] = off < _MOST_OFF
        if not _right[key]:
            message = "%s products of %d rows by Hopper's warpgroups are off by %.3f with Triton %s: others are used"
            logging.getLogger("ingle").warning(message, coded.kind, len(x), off, triton.__version__)
    return _right[key]


def suits(x: torch.Tensor, coded: Coded) -> bool:
    """Whether it takes them."""
    if not has_warpgroups(x.device) or x.dtype not in (torch.bfloat16, torch.float16):
        return False
    return (
        (warpgroups_blocks.suits(coded) and x.dtype == torch.bfloat16 if coded.factors is not None else _reads(coded))
        and x.stride(1) == 1
        and coded.codes.shape[1] % 16 == 0
        and coded.num_rows % 8 == 0
        and coded.codes.is_contiguous()
        and x.stride(0) % 8 == 0
        and x.data_ptr() % 16 == coded.codes.data_ptr() % 16 == 0
    )


def _reads(coded: Coded) -> bool:
    """Scales without factors."""
    if coded.kind not in FORMATS:
        return False
    groups, size = coded.scales.shape[1], coded.group_size
    return (
        coded.table is None
        and coded.minima is None
        and (coded.kind != "int4" or coded.half in (16, 32, 64))
        and (groups == 1 or size in (32, 64) or size % 128 == 0)
        and coded.scales.is_contiguous()
        and (coded.zeros is None or coded.zeros.is_contiguous())
    )


def _assembly(kind: str, number: str, *, is_biased: bool, is_scaled: bool) -> str:
    """Of codes numbers: less the zeros, and times the scales."""
    parts = _DECODE[kind, number]
    text = _SPREAD.format(len(parts))
    for index, part in enumerate(parts):
        text += part
        if is_biased:
            text += f"sub.rn.{number}x2 t, t, ${len(parts) + 2}; "
        text += f"mul.rn.{number}x2 ${index}, t, ${len(parts) + 1}; " if is_scaled else f"mov.b32 ${index}, t; "
    return text + "}"


_FORMS = [(*form, biased, scaled) for form in _DECODE for biased in (False, True) for scaled in (False, True)]
_ASSEMBLIES = gl.constexpr(
    tuple(_assembly(kind, number, is_biased=biased, is_scaled=scaled) for kind, number, biased, scaled in _FORMS)
)


def multiply(x: torch.Tensor, coded: Coded, bias: torch.Tensor | None, shape: Tiling | None = None) -> torch.Tensor:
    """x [M, I], its columns as the matrix has them, to [M, O]."""
    (num_rows, size_in), size_out, device = x.shape, coded.num_rows, x.device
    groups, per_byte = coded.scales.shape[1], 8 // BITS[coded.kind][0]
    shape = shape or tiling(num_rows, coded)
    assert shape.num_stages <= 4
    out, rows, outs, num_bytes = x.new_empty(num_rows, size_out), shape.rows, shape.outs, shape.num_bytes
    name, number = ("bf16", gl.bfloat16) if x.dtype == torch.bfloat16 else ("f16", gl.float16)
    units = triton.cdiv(size_in, num_bytes * per_byte)
    num_row_tiles = triton.cdiv(num_rows, rows)
    num_tiles = num_row_tiles * triton.cdiv(size_out, outs)
    most = num_sms(device)
    num_shared = num_tiles % most
    sharers = shape.sharers or num_sharers(num_shared, units, most, num_bytes)
    parts = torch.empty(2 * sharers * outs * rows, dtype=torch.float32, device=device)
    codes = _described(coded.codes, [outs, num_bytes], gl.uint8)
    high = codes
    if coded.high is not None:
        high = _described(coded.high, [outs, num_bytes // 4 * BITS[coded.kind][1]], gl.uint8)
    if coded.factors is None:
        more = _BIAS.get((coded.kind, name), 0)
        zero = more + FORMATS[coded.kind].middle
        form = _FORMS.index((coded.kind, name, coded.zeros is not None or zero != 0, groups > 1))
        scales, zeros = coded.scales, coded.codes if coded.zeros is None else coded.zeros
        group, packed = coded.group_size if groups > 1 else _WHOLE, groups % 4 == 0 and coded.scales.itemsize == 2
    else:
        more, form, packed, group = 0, 0, False, warpgroups_blocks.GROUP
        zero = MIDDLE[coded.kind] if coded.minima is not None else 0
        scales, zeros = warpgroups_blocks.pointers(coded)
        groups = scales.shape[1] // 4
    halves = 2 if coded.high is not None and rows == 128 else 1  # else there is no room for three stages
    early = pdl(device)
    _warpgroups_kernel[(most if num_tiles >= most else sharers,)](
        _described(x, [rows, num_bytes], number), codes, high, _described(out, [rows // halves, outs], number), out,
        scales, zeros, out if bias is None else bias, parts,
        counters(device), num_tiles - num_shared, num_shared, sharers, num_row_tiles, units, num_rows, size_out,
        groups, int(bias is not None),
        GROUP=group, SCALED=group < _WHOLE, PER_BYTE=per_byte, HALF=coded.half,
        FORM=form, ZEROS=coded.zeros is not None, ZERO=zero, CODE_BIAS=more, PACKED=packed,
        FACTORED=coded.factors is not None, HIGH=BITS[coded.kind][1],
        OUTS=outs, ROWS=rows, BYTES=num_bytes, STAGES=shape.num_stages, PDL=early, num_warps=8, launch_pdl=early,
        launch_cooperative_grid=gathers_programs(),
    )  # fmt: skip
    return out


def _takes_256(coded: Coded) -> bool:
    return coded.kind == "int4" and coded.factors is None


def tiling(num_rows: int, coded: Coded) -> Tiling:
    """Of 256 rows, for which weights are decoded once, where the last tile is more than half full."""
    if _takes_256(coded) and (num_rows - 1) % 256 >= 128:
        return Tiling(256, 4, 128, 32)
    if num_rows > 64:
        return Tiling(128, 3)
    return Tiling(64, 4) if num_rows > 32 else Tiling(32, 4)


def num_sharers(num_shared: int, units: int, most: int, num_bytes: int = 64) -> int:
    """Programs that share out tiles, so that the last ends earliest: what splits leave has to be added up, which takes
    as long as some units of so many bytes do."""
    if num_shared == 0:
        return 1

    def cost(sharers: int) -> float:
        added = 0 if sharers == num_shared else 7 if sharers % num_shared == 0 else 10
        return -(-num_shared * units // sharers) + added * 64 // num_bytes

    most = min(most, num_shared * min(units, _MOST_SHARERS))
    several = [splits * num_shared for splits in range(1, most // num_shared + 1)]
    return min((*several, most), key=cost)


def _described(tensor: torch.Tensor, block: list[int], number: gl.dtype) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(tensor, block, gl.NVMMASharedLayout.get_default_for(block, number))


@gluon.jit
def _next(work, where):
    """The step after one, of a program whose tiles are `work`: which of them, its place, and the unit."""
    index, out_tile, row_tile, unit = where
    unit += 1
    if unit == work[5]:
        index += 1
        out_tile, row_tile, unit = _begin(work, index)
    return index, out_tile, row_tile, unit


@gluon.jit
def _begin(work, index):
    program, num_programs, num_whole, first_shared, num_row_tiles, units = work
    tile = gl.where(index < num_whole, index * num_programs + program, first_shared // units + (index - num_whole))
    unit = gl.where(index == num_whole, first_shared % units, 0)
    return tile // num_row_tiles, tile % num_row_tiles, unit


@gluon.jit
def _barrier():
    """Of both warpgroups."""
    gl.inline_asm_elementwise("bar.sync 0, 256; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _await_step(stage):
    """Waits until what a stage has is there."""
    gl.inline_asm_elementwise(
        "{ .reg .b32 t; mov.u32 t, %tid.x; shr.u32 t, t, 7; add.u32 t, t, $1; bar.sync t, 224; mov.u32 $0, 0; }",
        "=r,r", [2 * stage + 4], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _tell_step(stage):
    gl.inline_asm_elementwise(
        "{ .reg .b32 t; add.u32 t, $1, 1; bar.arrive $1, 224; bar.arrive t, 224; mov.u32 $0, 0; }",
        "=r,r", [2 * stage + 4], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _await_free(stage):
    """Waits until a stage's codes and rows were multiplied."""
    gl.inline_asm_elementwise(
        "bar.sync $1, 352; mov.u32 $0, 0;", "=r,r", [stage + 12], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _tell_free(stage):
    gl.inline_asm_elementwise(
        "bar.arrive $1, 352; mov.u32 $0, 0;", "=r,r", [stage + 12], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _tell_parts(arrived_ptr, most):
    """Counts a program, up to `most`; the one after that leaves zero."""
    gl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b32 t; mov.u32 t, %tid.x; setp.eq.u32 p, t, 0; "
        "@p red.release.gpu.global.inc.u32 [$1], $2; mov.u32 $0, 0; }",
        "=r,l,r", [arrived_ptr, most], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _await_parts(arrived_ptr, count):
    gl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b32 t; more: ld.acquire.gpu.global.b32 t, [$1]; setp.lt.u32 p, t, $2; @p bra more; "
        "mov.u32 $0, 0; }",
        "=r,l,r", [arrived_ptr, count], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _load_codes(
    codes_desc, high_desc, codes, high, ready, stage, out_tile, unit, there,
    OUTS: gl.constexpr, BYTES: gl.constexpr, HIGH: gl.constexpr,
):  # fmt: skip
    place = [out_tile * OUTS, unit * BYTES]
    tma.async_copy_global_to_shared(codes_desc, place, ready.index(stage), codes.index(stage), there)
    if HIGH:
        place = [out_tile * OUTS, unit * (BYTES // 4 * HIGH)]
        tma.async_copy_global_to_shared(high_desc, place, ready.index(stage), high.index(stage), there)


@gluon.jit
def _load_rows(
    x_desc, xs, ready, stage, row_tile, unit, there,
    ROWS: gl.constexpr, PER_BYTE: gl.constexpr, HALF: gl.constexpr, BYTES: gl.constexpr,
):  # fmt: skip
    for half in gl.static_range(PER_BYTE):
        column = (unit * PER_BYTE + half) * BYTES
        if PER_BYTE == 2 and HALF > BYTES:
            column = unit * BYTES // HALF * (2 * HALF) + unit * BYTES % HALF + half * HALF
        place = [row_tile * ROWS, column]
        tma.async_copy_global_to_shared(x_desc, place, ready.index(stage), xs.index(stage * PER_BYTE + half), there)


@gluon.jit
def _load_scales(
    scales_ptr, zeros_ptr, size_out, num_groups, where, there,
    GROUP: gl.constexpr, COLUMNS: gl.constexpr, ZEROS: gl.constexpr, PACKED: gl.constexpr, FACTORED: gl.constexpr,
    OUTS: gl.constexpr,
):  # fmt: skip
    """Of the block of four groups that a unit is in the scales, and the zeros: four tensors [OUTS], or PACKED, one."""
    _index, out_tile, _row_tile, unit = where
    outs = out_tile * OUTS + gl.arange(0, OUTS, gl.BlockedLayout([1], [32], [2], [0]))
    block = unit // (4 * GROUP // COLUMNS)
    mask = there & (outs < size_out)
    if FACTORED:
        scales, zeros = load_steps(scales_ptr, zeros_ptr, out_tile * OUTS, size_out, num_groups, unit // 2, there, OUTS)
    elif PACKED:
        places = outs * (num_groups // 4) + block
        scales = (gl.load(scales_ptr.to(gl.pointer_type(gl.int64), bitcast=True) + places, mask=mask, other=0),)
        zeros = scales
        if ZEROS:
            zeros = (gl.load(zeros_ptr.to(gl.pointer_type(gl.int32), bitcast=True) + places, mask=mask, other=0),)
    else:
        scales, zeros = (), ()
        for each in gl.static_range(4):
            places = outs * num_groups + (block * 4 + each)
            in_groups = mask & (block * 4 + each < num_groups)
            scale = gl.load(scales_ptr + places, mask=in_groups, other=0)
            scales += (scale,)
            if ZEROS:
                zeros += (gl.load(zeros_ptr + places, mask=in_groups, other=0),)
            else:
                zeros += (scale,)
    return scales, zeros


@gluon.jit
def _store_scales(
    held, block, scales_ptr, scales, zeros,
    ZEROS: gl.constexpr, ZERO: gl.constexpr, CODE_BIAS: gl.constexpr, PACKED: gl.constexpr, dtype: gl.constexpr,
):  # fmt: skip
    """For the warpgroups: a scale in a word's lower half, what is taken from codes in the upper one."""
    for each in gl.static_range(4):
        if PACKED:
            scale = (scales[0] >> 16 * each).to(gl.int16).to(scales_ptr.dtype.element_ty, bitcast=True)
            taken = (zeros[0] >> 8 * each).to(gl.int32) & 255
        else:
            scale, taken = scales[each], zeros[each]
        if ZEROS:
            zero = (taken.to(gl.float32) + CODE_BIAS).to(dtype)
        else:
            zero = gl.full(scale.shape, ZERO, dtype, scale.type.layout)
        upper = zero.to(gl.int16, bitcast=True).to(gl.int32) << 16
        words = upper | scale.to(dtype).to(gl.uint16, bitcast=True).to(gl.int32)
        held.index(block % 2 * 4 + each).store(words)


@gluon.jit
def _numbers(codes, held, FORM: gl.constexpr, PER_BYTE: gl.constexpr, dtype: gl.constexpr):
    """Of bytes [OUTS, C], of one group, numbers [OUTS, C], for each code of a byte."""
    scale = gl.expand_dims(held.to(gl.int16).to(dtype, bitcast=True), 1)
    zero = gl.expand_dims((held >> 16).to(gl.int16).to(dtype, bitcast=True), 1)
    ASM: gl.constexpr = _ASSEMBLIES[FORM]
    held = [codes, scale, zero]
    if PER_BYTE == 2:
        if dtype == gl.bfloat16:
            numbers = gl.inline_asm_elementwise(
                ASM, "=r,=r,h,r,r", held, dtype=(gl.bfloat16, gl.bfloat16), is_pure=True, pack=2
            )
        else:
            numbers = gl.inline_asm_elementwise(
                ASM, "=r,=r,h,r,r", held, dtype=(gl.float16, gl.float16), is_pure=True, pack=2
            )
    elif dtype == gl.bfloat16:
        numbers = (gl.inline_asm_elementwise(ASM, "=r,h,r,r", held, dtype=gl.bfloat16, is_pure=True, pack=2),)
    else:
        numbers = (gl.inline_asm_elementwise(ASM, "=r,h,r,r", held, dtype=gl.float16, is_pure=True, pack=2),)
    return numbers


@gluon.jit
def _multiply(
    total, numbers, xs, at, COLUMN: gl.constexpr, CHUNK: gl.constexpr, PER_BYTE: gl.constexpr, BYTES: gl.constexpr
):
    x = xs.index(PER_BYTE * at + COLUMN // BYTES).slice(COLUMN % BYTES, CHUNK, 1)
    return warpgroup_mma(numbers, x.permute([1, 0]), total, is_async=True)


@gluon.jit
def _await_products(total, operands, NUM_AFTER: gl.constexpr):
    """Waits for all products but some last ones; `operands` are those of the chunk that is waited for."""
    if len(operands) == 2:
        total, _low, _high = warpgroup_mma_wait(NUM_AFTER, deps=(total, operands[0], operands[1]))
    else:
        total, _numbers = warpgroup_mma_wait(NUM_AFTER, deps=(total, operands[0]))
    return total


@gluon.jit
def _add_chunk(
    total, before, codes, high, xs, scales, at,
    BYTE: gl.constexpr, COLUMN: gl.constexpr, CHUNK: gl.constexpr, WEIGHTS: gl.constexpr, HALF: gl.constexpr,
    FORM: gl.constexpr, PER_BYTE: gl.constexpr, BYTES: gl.constexpr, FACTORED: gl.constexpr, HIGH: gl.constexpr,
    dtype: gl.constexpr,
):  # fmt: skip
    """Begins the product of some bytes of a step, and waits for the first of those begun before, whose operands are
    `before`."""
    scale = scales[COLUMN * len(scales) // (BYTES * PER_BYTE)]
    if FACTORED:
        numbers = block_numbers(codes.index(at), high.index(at), scale, BYTE, HIGH, WEIGHTS)
    else:
        numbers = _numbers(codes.index(at).slice(BYTE, CHUNK, 1).load(WEIGHTS), scale, FORM, PER_BYTE, dtype)
    total = _multiply(total, numbers[0], xs, at, COLUMN, CHUNK, PER_BYTE, BYTES)
    if PER_BYTE == 2:
        total = _multiply(total, numbers[1], xs, at, COLUMN + HALF, CHUNK, PER_BYTE, BYTES)
    total = _await_products(total, before[0], len(before) * PER_BYTE)
    return total, (before[1], numbers) if len(before) == 2 else (numbers,)


@gluon.jit
def _flat(sums, OUTS: gl.constexpr, ROWS: gl.constexpr):
    """A tile's sums so that a thread has four neighbours, and neighbouring threads the next ones."""
    apart = gl.permute(gl.reshape(sums, [OUTS // 128, 8, 2, 8, ROWS // 8, 4, 2]), [0, 1, 4, 3, 5, 2, 6])
    return gl.reshape(apart, [OUTS * ROWS])


@gluon.jit
def _part(parts_ptr, sharer, first, OUTS: gl.constexpr, ROWS: gl.constexpr):
    """Where a program leaves what it has of a tile, whose first sharer is `first`: it has the end of one tile and the
    beginning of another at most."""
    return parts_ptr + (2 * sharer + (sharer == first)).to(gl.int64) * (OUTS * ROWS)


@gluon.jit
def _sharers_of(tile, num_shared, sharers, units):
    """The first and the last one, of what has so many units."""
    first = ((tile * units + 1) * sharers - 1) // (num_shared * units)
    return first, ((tile + 1) * units * sharers - 1) // (num_shared * units)


@gluon.jit
def _add_parts(
    out_ptr, scales_ptr, bias_ptr, parts_ptr, arrived_ptr, program, num_whole_tiles, num_shared, sharers, num_row_tiles,
    units, num_rows, size_out, has_bias,
    SCALED: gl.constexpr, OUTS: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """A program's share, by pieces of 16 rows of weights, which `_flat` has one after another: a quarter of a tile at
    once, of four sharers."""
    PIECES: gl.constexpr = OUTS // 16
    SIZE: gl.constexpr = OUTS * ROWS // 4
    LAYOUT: gl.constexpr = gl.BlockedLayout([4], [32], [8], [0])
    index = gl.arange(0, SIZE, LAYOUT)
    piece = program * PIECES * num_shared // sharers
    end = (program + 1) * PIECES * num_shared // sharers
    while piece < end:
        tile = piece // PIECES
        first, last = _sharers_of(tile, num_shared, sharers, units)
        end_in_tile = gl.minimum(end, (tile + 1) * PIECES)
        if first < last:
            _await_parts(arrived_ptr + tile, last - first + 1)
            _barrier()  # all have waited
            first_adder, last_adder = _sharers_of(tile, num_shared, sharers, PIECES)
            _tell_parts(arrived_ptr + tile, last - first + 1 + last_adder - first_adder)
            while piece < end_in_tile:
                within = piece % PIECES * (16 * ROWS) + index
                mask = index < (end_in_tile - piece) * (16 * ROWS)
                sums = gl.zeros([SIZE], gl.float32, LAYOUT)
                for sharer in range(first, last + 1, 4):
                    held = ()
                    for each in gl.static_range(4):
                        part = _part(parts_ptr, sharer + each, first, OUTS, ROWS) + within
                        there = mask & (sharer + each <= last)
                        held += (gl.load(part, mask=there, other=0, cache_modifier=".cg"),)
                    for each in gl.static_range(4):
                        sums += held[each]
                out = within // (16 * ROWS) * 16 + index // 2 % 2 * 8 + index // 16 % 8
                out += (num_whole_tiles + tile) // num_row_tiles * OUTS
                row = index % (16 * ROWS) // 128 * 8 + index // 4 % 4 * 2 + index % 2
                row += (num_whole_tiles + tile) % num_row_tiles * ROWS
                mask &= out < size_out
                if not SCALED:
                    sums *= gl.load(scales_ptr + out, mask=mask, other=0).to(gl.float32)
                if has_bias:
                    sums += gl.load(bias_ptr + out, mask=mask, other=0).to(gl.float32)
                place = out_ptr + row.to(gl.int64) * size_out + out
                gl.store(place, sums.to(out_ptr.dtype.element_ty), mask=mask & (row < num_rows))
                piece += PIECES // 4
        piece = end_in_tile


@gluon.jit
def _multiply_tiles(
    x_desc, out_desc, out_ptr, scales_ptr, bias_ptr, parts_ptr, arrived_ptr, xs, codes, high, held, result, num_shared,
    sharers, first, num_steps, work, num_rows, size_out, has_bias,
    GROUP: gl.constexpr, SCALED: gl.constexpr, PER_BYTE: gl.constexpr, HALF: gl.constexpr, FORM: gl.constexpr,
    FACTORED: gl.constexpr, HIGH: gl.constexpr, OUTS: gl.constexpr, ROWS: gl.constexpr, BYTES: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """What warpgroups do."""
    dtype: gl.constexpr = x_desc.dtype
    SUMS: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[8, 1], instr_shape=[16, ROWS, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    COLUMNS: gl.constexpr = BYTES * PER_BYTE
    PARTS: gl.constexpr = COLUMNS // GROUP if GROUP < COLUMNS else 1
    HELD: gl.constexpr = held.shape[0] // 2
    BLOCK: gl.constexpr = HELD * GROUP // COLUMNS
    NEAR: gl.constexpr = HALF if HALF < BYTES else BYTES  # how far in a step the numbers of a byte are apart
    # Chunks on their way, by what registers hold: fewer than a step has, for each is decoded into registers of its own.
    SMALL: gl.constexpr = PER_BYTE == 2 and HALF == 16
    DEPTH: gl.constexpr = 2 if SMALL and ROWS < 128 else 1
    CHUNK: gl.constexpr = 16 if SMALL or BYTES == 32 else 32
    HALVES: gl.constexpr = ROWS // result.shape[0]  # of a tile's results, one after the other
    program, num_programs, num_whole, _first_shared, num_row_tiles, units = work
    step, index = 0, 0
    at, last, block = 0, STAGES - 1, HELD
    while step < num_steps:
        out_tile, row_tile, unit = _begin(work, index)
        first_out = out_tile * OUTS
        first_step = step
        last_step = gl.minimum(step + (units - unit), num_steps)
        block ^= HELD  # of scales
        total = gl.zeros([OUTS, ROWS], gl.float32, SUMS)
        nothing = gl.zeros([OUTS, CHUNK], dtype, WEIGHTS)
        none = (nothing, nothing) if PER_BYTE == 2 else (nothing,)
        before = (none, none) if DEPTH == 2 else (none,)
        while step < last_step:
            slot = block + unit % BLOCK * COLUMNS // GROUP
            step += 1
            unit += 1
            _await_step(at)
            scales = ()
            for part in gl.static_range(PARTS):
                scales += (held.index(slot + part).load(gl.SliceLayout(1, WEIGHTS)),)
            for chunk in gl.static_range(BYTES // CHUNK):
                total, before = _add_chunk(
                    total, before, codes, high, xs, scales, at, chunk * CHUNK,
                    chunk * CHUNK // NEAR * (2 * NEAR) + chunk * CHUNK % NEAR if PER_BYTE == 2 else chunk * CHUNK,
                    CHUNK, WEIGHTS, NEAR, FORM, PER_BYTE, BYTES, FACTORED, HIGH, dtype,
                )  # fmt: skip
                if chunk == DEPTH - 1 and step > 1:  # what the step before had
                    _tell_free(last)
            block = gl.where((unit % BLOCK == 0) & (step < last_step), block ^ HELD, block)
            last = at
            at = gl.where(at == STAGES - 1, 0, at + 1)
        sums = total
        for each in gl.static_range(DEPTH):
            sums = _await_products(sums, before[each], 0)
        if last_step - first_step < units:
            flat = _flat(sums, OUTS, ROWS)
            within = gl.arange(0, OUTS * ROWS, flat.type.layout)
            tile = (first + (first_step - num_whole * units)) // units
            first_sharer, last_sharer = _sharers_of(tile, num_shared, sharers, units)
            gl.store(_part(parts_ptr, program, first_sharer, OUTS, ROWS) + within, flat)
            _barrier()  # all stores come before the arrival
            first_adder, last_adder = _sharers_of(tile, num_shared, sharers, OUTS // 16)
            _tell_parts(arrived_ptr + tile, last_sharer - first_sharer + 1 + last_adder - first_adder)
        else:
            outs = first_out + gl.arange(0, OUTS, gl.SliceLayout(1, SUMS))
            if not SCALED:
                sums *= gl.load(scales_ptr + outs, mask=outs < size_out, other=0).to(gl.float32)[:, None]
            if has_bias:
                sums += gl.load(bias_ptr + outs, mask=outs < size_out, other=0).to(gl.float32)[:, None]
            parts = (sums,) if HALVES == 1 else gl.split(gl.permute(gl.reshape(sums, [OUTS, 2, ROWS // 2]), [0, 2, 1]))
            for half in gl.static_range(HALVES):
                tma.store_wait(0)
                _barrier()
                result.permute([1, 0]).store(parts[half].to(dtype))
                fence_async_shared()
                _barrier()
                place = [row_tile * ROWS + half * (ROWS // HALVES), first_out]
                tma.async_copy_shared_to_global(out_desc, place, result)
        index += 1
    if program < sharers:
        num_whole_tiles = num_whole * num_programs
        _add_parts(
            out_ptr, scales_ptr, bias_ptr, parts_ptr, arrived_ptr, program, num_whole_tiles, num_shared, sharers,
            num_row_tiles, units, num_rows, size_out, has_bias, SCALED, OUTS, ROWS,
        )  # fmt: skip
    tma.store_wait(0)


@gluon.jit
def _copy_tiles(
    x_desc, codes_desc, high_desc, xs, codes, high, ready, num_steps, work,
    PER_BYTE: gl.constexpr, HALF: gl.constexpr, HIGH: gl.constexpr, OUTS: gl.constexpr, ROWS: gl.constexpr,
    BYTES: gl.constexpr, STAGES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """What a warp does meanwhile: it asks for what comes next."""
    SIZE: gl.constexpr = (OUTS + OUTS // 4 * HIGH + 2 * ROWS * PER_BYTE) * BYTES  # of a stage, in bytes
    out_tile, row_tile, unit = _begin(work, 0)
    ahead = (0, out_tile, row_tile, unit)
    for stage in gl.static_range(STAGES):
        there = stage < num_steps
        mbarrier.expect(ready.index(stage), SIZE, there)
        _load_codes(codes_desc, high_desc, codes, high, ready, stage, ahead[1], ahead[3], there, OUTS, BYTES, HIGH)
        ahead = _next(work, ahead)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    ahead = (0, out_tile, row_tile, unit)
    for stage in gl.static_range(STAGES):
        there = stage < num_steps
        _load_rows(x_desc, xs, ready, stage, ahead[2], ahead[3], there, ROWS, PER_BYTE, HALF, BYTES)
        ahead = _next(work, ahead)
    at, phase, last = 0, 0, STAGES - 1
    for step in range(num_steps):
        mbarrier.wait(ready.index(at), phase)
        _tell_step(at)
        if step > 0:
            _await_free(last)
            there = step + STAGES - 1 < num_steps
            mbarrier.expect(ready.index(last), SIZE, there)
            _load_codes(codes_desc, high_desc, codes, high, ready, last, ahead[1], ahead[3], there, OUTS, BYTES, HIGH)
            _load_rows(x_desc, xs, ready, last, ahead[2], ahead[3], there, ROWS, PER_BYTE, HALF, BYTES)
            ahead = _next(work, ahead)
        last = at
        at = gl.where(at == STAGES - 1, 0, at + 1)
        phase = gl.where(at == 0, phase ^ 1, phase)


@gluon.jit
def _scale_tiles(
    x_desc, scales_ptr, zeros_ptr, held, num_steps, work, size_out, num_groups,
    GROUP: gl.constexpr, PER_BYTE: gl.constexpr, ZEROS: gl.constexpr, ZERO: gl.constexpr, CODE_BIAS: gl.constexpr,
    PACKED: gl.constexpr, FACTORED: gl.constexpr, OUTS: gl.constexpr, BYTES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """What two warps do: scales are small and far apart, and so take as long to come as anything. Those of several
    groups come at once, two such blocks before they are used, and are there as warpgroups have them one before."""
    dtype: gl.constexpr = x_desc.dtype
    COLUMNS: gl.constexpr = BYTES * PER_BYTE
    BLOCK: gl.constexpr = held.shape[0] // 2 * GROUP // COLUMNS  # units
    out_tile, row_tile, unit = _begin(work, 0)
    ahead, begins = (0, out_tile, row_tile, unit), 0  # of the block that is in registers, and its first step
    scales, zeros = _load_scales(
        scales_ptr, zeros_ptr, size_out, num_groups, ahead, num_steps > 0, GROUP, COLUMNS, ZEROS, PACKED, FACTORED, OUTS
    )
    at, last, block, free = 0, STAGES - 1, 0, -1
    for step in range(-1, num_steps):
        if step >= 0:
            _tell_step(at)
            if step > 0:
                _await_free(last)
            last = at
            at = gl.where(at == STAGES - 1, 0, at + 1)
        if step == free:  # what the block before the last one had
            if FACTORED:
                store_steps(held, block, scales, zeros, ZERO, OUTS)
            else:
                _store_scales(held, block, scales_ptr, scales, zeros, ZEROS, ZERO, CODE_BIAS, PACKED, dtype)
            block += 1
            free = begins
            end = gl.minimum((ahead[3] // BLOCK + 1) * BLOCK, work[5])
            begins += end - ahead[3]
            ahead = _next(work, (ahead[0], ahead[1], ahead[2], end - 1))
            scales, zeros = _load_scales(
                scales_ptr, zeros_ptr, size_out, num_groups, ahead, begins < num_steps,
                GROUP, COLUMNS, ZEROS, PACKED, FACTORED, OUTS,
            )  # fmt: skip


_COUNTS = [
    "num_whole_tiles", "num_shared", "sharers", "num_row_tiles", "units", "num_rows", "size_out", "num_groups",
    "has_bias",
]  # fmt: skip


@gluon.jit(do_not_specialize=_COUNTS)
def _warpgroups_kernel(
    x_desc, codes_desc, high_desc, out_desc, out_ptr, scales_ptr, zeros_ptr, bias_ptr, parts_ptr, arrived_ptr,
    num_whole_tiles, num_shared, sharers, num_row_tiles, units, num_rows, size_out, num_groups, has_bias,
    GROUP: gl.constexpr, SCALED: gl.constexpr, PER_BYTE: gl.constexpr, HALF: gl.constexpr, FORM: gl.constexpr,
    ZEROS: gl.constexpr, ZERO: gl.constexpr, CODE_BIAS: gl.constexpr, PACKED: gl.constexpr, FACTORED: gl.constexpr,
    HIGH: gl.constexpr, OUTS: gl.constexpr, ROWS: gl.constexpr, BYTES: gl.constexpr, STAGES: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    """A tile is [OUTS, ROWS]; a step has BYTES of each row of weights."""
    xs = gl.allocate_shared_memory(x_desc.dtype, [PER_BYTE * STAGES, ROWS, BYTES], x_desc.layout)
    codes = gl.allocate_shared_memory(gl.uint8, [STAGES, OUTS, BYTES], codes_desc.layout)
    high = codes
    if HIGH:
        high = gl.allocate_shared_memory(gl.uint8, [STAGES, OUTS, BYTES // 4 * HIGH], high_desc.layout)
    held = gl.allocate_shared_memory(gl.int32, [16 if FACTORED else 8, OUTS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    result = gl.allocate_shared_memory(x_desc.dtype, out_desc.block_shape, out_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
    fence_async_shared()
    program, num_programs = gl.program_id(0), gl.num_programs(0)
    num_whole = num_whole_tiles // num_programs
    first = program * num_shared * units // sharers
    num_steps = num_whole * units
    if program < sharers:
        num_steps += (program + 1) * num_shared * units // sharers - first
    work = (program, num_programs, num_whole, first + num_whole_tiles * units, num_row_tiles, units)
    gl.warp_specialize(
        [
            (
                _multiply_tiles,
                (
                    x_desc, out_desc, out_ptr, scales_ptr, bias_ptr, parts_ptr, arrived_ptr, xs, codes, high, held,
                    result, num_shared, sharers, first, num_steps, work, num_rows, size_out, has_bias, GROUP, SCALED,
                    PER_BYTE, HALF, FORM, FACTORED, HIGH, OUTS, ROWS, BYTES, STAGES,
                ),
            ),
            (
                _copy_tiles,
                (
                    x_desc, codes_desc, high_desc, xs, codes, high, ready, num_steps, work, PER_BYTE, HALF, HIGH, OUTS,
                    ROWS, BYTES, STAGES, PDL,
                ),
            ),
            (
                _scale_tiles,
                (
                    x_desc, scales_ptr, zeros_ptr, held, num_steps, work, size_out, num_groups, GROUP, PER_BYTE,
                    ZEROS, ZERO, CODE_BIAS, PACKED, FACTORED, OUTS, BYTES, STAGES,
                ),
            ),
        ],
        [1, 2],
        [56, 56] if FACTORED else [40, 40],
    )  # fmt: skip
