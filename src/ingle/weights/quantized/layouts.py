"""Stored tensors of a quantized linear layer to `Groups`. A matrix has O rows (outputs) and I columns (inputs).

GPTQ (AutoGPTQ, GPTQModel): `qweight` int32 [I * bits / 32, O], bits packed along the inputs; `qzeros` int32
[groups, O * bits / 32]; `scales` [groups, O]; `g_idx` int32 [I], each input's group.
AWQ (AutoAWQ's GEMM): `qweight` int32 [I, O / 8], `qzeros` int32 [groups, O / 8], in an order within each eight. Its
GEMV: `qweight` int32 [O, I / 8], `qzeros` int32 [O, n], `scales` [O, 8 n], in order; n is padded.
compressed-tensors: `weight_packed` int32 [O, I * bits / 32], `weight_scale` [O, groups], `weight_zero_point` int32
[O * bits / 32, groups], `weight_g_idx`; or `weight` of 8 bits with `weight_scale` and `weight_zero_point`.
FP8 of others: `weight` with `weight_scale` or, which is the same, `weight_scale_inv`: one, [O, 1] or of blocks.
MXFP4 and NVFP4: uint8 [O, I / 2], the first code in a lower half, as `weight_packed` (compressed-tensors) or `weight`
(ModelOpt); `weight_scale` [O, I / 32] of exponents or [O, I / 16] of FP8, which is divided by `weight_global_scale`
(compressed-tensors) or multiplied with `weight_scale_2` (ModelOpt).
bitsandbytes' are in `bitsandbytes.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from ingle.errors import ModelError
from ingle.weights.quantized import bitsandbytes, unpack
from ingle.weights.quantized.groups import MIDDLE, Bytes, Floats, Groups, half_holds
from ingle.weights.quantized.module import DOWNLOAD, EXPONENTS, FLOATS, FP8, Module, Shape, Wanted
from ingle.weights.quantized.scheme import Layout, Scheme

_T = TypeVar("_T", bound=np.generic)
_WORDS, _INTS = ("I32",), ("I8", "U8")
SCALES = ("weight_scale_inv", "weight_scale")


def shape_of(module: Module) -> tuple[int, int]:
    """Rows and columns. Raises `ModelError` where its codes have no such shape."""
    layout, bits = module.scheme.layout, module.scheme.bits
    if layout == "blocks":
        return bitsandbytes.shape_of(module)
    shape = module.stored(module.marker).shape
    if len(shape) != 2:
        raise module.fail(module.marker, f"has shape {shape}, and a matrix of codes has two dimensions")
    return _LAYOUTS[layout].shape(*shape, bits)


def check(module: Module, rows: int, columns: int) -> None:
    """Asks the headers alone. Raises `ModelError` for what is missing or misshapen, or contradicts the scheme."""
    for wanted in _LAYOUTS[module.scheme.layout].wanted(module, rows, columns):
        module.require(wanted, columns)


def read(module: Module, rows: int, columns: int) -> Groups:
    """Raises as `check` does, and for codes' groups that are not what the scheme says."""
    check(module, rows, columns)
    groups = _LAYOUTS[module.scheme.layout].read(module, rows, columns)
    if not np.isfinite(groups.scales).all():
        raise module.fail(scales_of(module), "has scales that are not finite numbers", DOWNLOAD)
    if groups.kind == "fp8" and (groups.codes & 127).max() == 127:
        raise module.fail("weight", "has numbers that are none (NaN)", DOWNLOAD)
    return groups


def scales_of(module: Module) -> str:
    """The tensor that has a module's scales."""
    layout = module.scheme.layout
    if layout in ("gptq", "awq", "gemv"):
        return "scales"
    if layout in bitsandbytes.SCALES:
        return bitsandbytes.SCALES[layout]
    return next((name for name in SCALES if module.has(name)), "weight_scale")


def columns_unit(module: Module) -> int:
    """Neighbouring columns that are better not cut apart: those that share a scale, and a byte."""
    if module.scheme.layout == "blocks":
        return bitsandbytes.block_of(module)
    return module.scheme.group_size or (2 if module.scheme.kind == "int4" else 1)


def num_groups(scheme: Scheme, columns: int) -> int:
    return 1 if scheme.group_size is None else -(-columns // scheme.group_size)


# ---- what is wanted


def _undivided(module: Module, rows: int, columns: int) -> ModelError:
    bits = module.scheme.bits
    where = module.tensors.where(f"{module.name}.{module.marker}")
    return ModelError(
        f"{where}: {module.name} has {rows} rows of {columns}, "
        f"which {bits} bits a number do not divide into words of 32",
        alternative="take a checkpoint that its quantizer padded",
    )


def _wanted_gptq(module: Module, rows: int, columns: int) -> Iterator[Wanted]:
    scheme, groups = module.scheme, num_groups(module.scheme, columns)
    if columns * scheme.bits % 32 or rows * scheme.bits % 32:
        raise _undivided(module, rows, columns)
    words, packed_rows = columns * scheme.bits // 32, rows * scheme.bits // 32
    yield Wanted("qweight", _WORDS, ((words, rows) if scheme.layout == "gptq" else (columns, packed_rows),))
    yield Wanted("scales", FLOATS, ((groups, rows),))
    if scheme.has_zeros:
        yield Wanted("qzeros", _WORDS, ((groups, packed_rows),))
    if scheme.layout == "gptq" and module.has("g_idx"):
        yield Wanted("g_idx", _WORDS, ((columns,),))


def _wanted_gemv(module: Module, rows: int, columns: int) -> Iterator[Wanted]:
    if columns % 8:
        raise _undivided(module, rows, columns)
    words = _gemv_words(module.scheme, columns)
    yield Wanted("qweight", _WORDS, ((rows, columns // 8),))
    yield Wanted("scales", FLOATS, ((rows, words * 8),))
    yield Wanted("qzeros", _WORDS, ((rows, words),))


def _gemv_words(scheme: Scheme, columns: int) -> int:
    """Of a row's zeros: whole, and of small groups so many that they fill a larger one's."""
    words = -(-num_groups(scheme, columns) // 8)
    together = max(128 // (scheme.group_size or 128), 1)
    return -(-words // together) * together


def _wanted_packed(module: Module, rows: int, columns: int) -> Iterator[Wanted]:
    scheme, groups = module.scheme, num_groups(module.scheme, columns)
    if columns * scheme.bits % 32:
        raise _undivided(module, rows, columns)
    yield Wanted("weight_packed", _WORDS, ((rows, columns * scheme.bits // 32),))
    yield Wanted(scales_of(module), FLOATS, _shapes_of_scales(scheme, rows, groups))
    if scheme.has_zeros:
        yield Wanted("weight_zero_point", _WORDS, ((-(-rows * scheme.bits // 32), groups),))
    if module.has("weight_g_idx"):
        yield Wanted("weight_g_idx", _WORDS, ((columns,),))


def _wanted_whole(module: Module, rows: int, columns: int) -> Iterator[Wanted]:
    scheme = module.scheme
    shapes = _shapes_of_scales(scheme, rows, num_groups(scheme, columns))
    yield Wanted("weight", (FP8,) if scheme.is_float else _INTS[:1], ((rows, columns),))
    yield Wanted(scales_of(module), (*FLOATS, EXPONENTS, "U8") if scheme.is_float else FLOATS, shapes)
    if scheme.has_zeros:
        yield Wanted("weight_zero_point", _INTS[:1], shapes)


def _shapes_of_scales(scheme: Scheme, rows: int, groups: int) -> tuple[Shape, ...]:
    if scheme.group_size is None:
        return (), (1,), (1, 1), (rows,), (rows, 1)
    return ((-(-rows // scheme.block_rows), groups),)


def _wanted_nibbles(module: Module, rows: int, columns: int) -> Iterator[Wanted]:
    scheme = module.scheme
    assert scheme.group_size is not None
    if columns % scheme.group_size:
        raise module.fail(
            module.marker, f"has rows of {columns}, no multiple of the {scheme.group_size} that share a scale"
        )
    types = (FP8,) if scheme.table == "nvfp4" else ("U8", EXPONENTS)
    yield Wanted(module.marker, ("U8",), ((rows, columns // 2),))
    yield Wanted("weight_scale", types, ((rows, columns // scheme.group_size),))
    if scheme.table == "nvfp4":
        yield Wanted(_whole_scale(module), ("F32",), ((), (1,)))


def _whole_scale(module: Module) -> str:
    return "weight_global_scale" if module.marker == "weight_packed" else "weight_scale_2"


# ---- what is there


def _read_gptq(module: Module, rows: int, columns: int) -> Groups:
    bits, words, order = module.scheme.bits, module.words("qweight"), _order(module, "g_idx", columns)

    def codes(start: int, stop: int) -> Bytes:
        return unpack.of_inputs(words[:, start:stop], bits, order)

    stored = unpack.along(module.words("qzeros"), bits)[:, :rows]
    zeros = (stored + np.uint8(module.scheme.zero_offset)) & np.uint8((1 << bits) - 1)
    whole = unpack.by_outputs(rows, columns, module.scheme.kind, codes)
    return _finished(module, whole, module.floats("scales").T, zeros.T, order, columns)


def _read_awq(module: Module, rows: int, columns: int) -> Groups:
    words = module.words("qweight")

    def codes(start: int, stop: int) -> Bytes:
        return unpack.of_awq(words[:, start // 8 : stop // 8])

    zeros = unpack.along(module.words("qzeros"), 4).reshape(-1, rows // 8, 8)[:, :, unpack.AWQ_ORDER]
    whole = unpack.by_outputs(rows, columns, "int4", codes)
    return _finished(module, whole, module.floats("scales").T, zeros.reshape(len(zeros), -1).T, None, columns)


def _read_gemv(module: Module, rows: int, columns: int) -> Groups:
    groups = num_groups(module.scheme, columns)
    codes = np.ascontiguousarray(module.words("qweight")).view(np.uint8)
    zeros = unpack.along(module.words("qzeros"), 4)[:, :groups]
    return _finished(module, codes, module.floats("scales")[:, :groups], zeros, None, columns)


def _read_packed(module: Module, rows: int, columns: int) -> Groups:
    bits, kind, order = module.scheme.bits, module.scheme.kind, _order(module, "weight_g_idx", columns)
    words = module.words("weight_packed")

    def sorted_codes(start: int, stop: int) -> Bytes:
        assert order is not None
        return unpack.ordered(np.ascontiguousarray(unpack.along(words[start:stop], bits).T), order, bits)

    codes = np.ascontiguousarray(words).view(np.uint8)
    if order is not None:
        codes = unpack.by_outputs(rows, columns, kind, sorted_codes)
    zeros = None
    if module.scheme.has_zeros:
        zeros = unpack.along(np.ascontiguousarray(module.words("weight_zero_point").T), bits)[:, :rows].T
    scales = _by_row(module.floats(scales_of(module)), rows, 1)
    return _finished(module, codes, scales, zeros, order, columns)


def _read_whole(module: Module, rows: int, columns: int) -> Groups:
    scheme = module.scheme
    codes, suffix = module.array("weight").view(np.uint8), scales_of(module)
    stored = module.floats(suffix)
    half, scales = half_holds(stored), _by_row(stored, rows, scheme.block_rows)
    size = scheme.group_size or columns
    if scheme.is_float:
        return Groups("fp8", codes, scales, None, size, half, quantizes_inputs=scheme.quantizes_inputs)
    zeros = None
    if scheme.has_zeros:
        zeros = _by_row(module.array("weight_zero_point").view(np.uint8) ^ np.uint8(128), rows, scheme.block_rows)
    return Groups("int8", codes ^ np.uint8(128), scales, zeros, size, half)


def _read_nibbles(module: Module, rows: int, columns: int) -> Groups:
    scheme, scales = module.scheme, module.floats("weight_scale")
    assert scheme.group_size is not None
    unit = 1.0
    if scheme.table == "nvfp4":
        suffix = _whole_scale(module)
        whole = module.floats(suffix).reshape(())
        if not np.isfinite(whole) or whole <= 0:
            raise module.fail(suffix, f"is {whole}, no scale", DOWNLOAD)
        unit = float(1 / whole if suffix == "weight_global_scale" else whole)
    codes = np.asarray(module.array(module.marker), np.uint8)
    half = half_holds(scales)
    return Groups("int4", codes, scales, None, scheme.group_size, half, unit=unit, table=scheme.table)


class _Layout(NamedTuple):
    shape: Callable[[int, int, int], tuple[int, int]]
    """Rows and columns by the shape of what has the codes, and their bits."""
    wanted: Callable[[Module, int, int], Iterator[Wanted]]
    read: Callable[[Module, int, int], Groups]


def _as_it_is(first: int, second: int, bits: int) -> tuple[int, int]:
    return first, second


def _by_words(first: int, second: int, bits: int) -> tuple[int, int]:
    return first, second * 32 // bits


_LAYOUTS: dict[Layout, _Layout] = {
    "gptq": _Layout(lambda first, second, bits: (second, first * 32 // bits), _wanted_gptq, _read_gptq),
    "awq": _Layout(lambda first, second, bits: (second * 32 // bits, first), _wanted_gptq, _read_awq),
    "gemv": _Layout(_by_words, _wanted_gemv, _read_gemv),
    "packed": _Layout(_by_words, _wanted_packed, _read_packed),
    "whole": _Layout(_as_it_is, _wanted_whole, _read_whole),
    "nibbles": _Layout(lambda first, second, bits: (first, second * 2), _wanted_nibbles, _read_nibbles),
    "blocks": _Layout(_as_it_is, bitsandbytes.wanted_blocks, bitsandbytes.read_blocks),
    "scb": _Layout(_as_it_is, bitsandbytes.wanted_int8, bitsandbytes.read_int8),
}


def _by_row(values: npt.NDArray[_T], rows: int, block_rows: int) -> npt.NDArray[_T]:
    """[rows, groups] of scales for the whole matrix, each row or each block of rows."""
    values = values.reshape(-1, 1) if values.ndim < 2 else values
    if len(values) != rows:
        repeats = rows if len(values) == 1 and block_rows == 1 else block_rows
        values = np.repeat(values, repeats, axis=0)[:rows]
    return np.ascontiguousarray(values)


def _finished(
    module: Module, codes: Bytes, scales: Floats, zeros: Bytes | None, order: unpack.Order | None, columns: int
) -> Groups:
    """Zeros that are all in the middle are left out."""
    kind, size = module.scheme.kind, module.scheme.group_size or columns
    half = module.stored(scales_of(module)).type == "F16" or half_holds(scales)
    if zeros is not None:
        zeros = None if (zeros == MIDDLE[kind]).all() else np.ascontiguousarray(zeros)
    return Groups(kind, codes, np.ascontiguousarray(scales), zeros, size, half, order)


def _order(module: Module, index: str, columns: int) -> unpack.Order | None:
    """The inputs, sorted by their groups; None where they are so.

    Raises `ModelError` for groups that are not of the scheme's size each.
    """
    if not module.has(index):
        return None
    groups, size = module.words(index), module.scheme.group_size or columns
    usual = np.arange(columns, dtype=np.int32) // np.int32(size)
    if np.array_equal(groups, usual):
        return None
    order = np.argsort(groups, kind="stable").astype(np.int32)
    if not np.array_equal(groups[order], usual):
        wrong = int(np.argmax(groups[order] != usual))
        raise module.fail(
            index, f"does not put {size} inputs into each group, as group {int(usual[wrong])} shows", DOWNLOAD
        )
    return order
