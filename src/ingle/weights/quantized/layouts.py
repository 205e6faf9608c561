"""Stored tensors of a quantized linear layer to `Groups`. A matrix has O rows (outputs) and I columns (inputs).

GPTQ (AutoGPTQ, GPTQModel): `qweight` int32 [I * bits / 32, O], bits packed along the inputs; `qzeros` int32
[groups, O * bits / 32]; `scales` [groups, O]; `g_idx` int32 [I], each input's group.
AWQ (AutoAWQ's GEMM): `qweight` int32 [I, O / 8], `qzeros` int32 [groups, O / 8], in an order within each eight.
compressed-tensors: `weight_packed` int32 [O, I * bits / 32], `weight_scale` [O, groups], `weight_zero_point` int32
[O * bits / 32, groups], `weight_g_idx`; or `weight` of 8 bits with `weight_scale` and `weight_zero_point`.
FP8 of others: `weight` with `weight_scale` or, which is the same, `weight_scale_inv`: one, [O, 1] or of blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from ingle.errors import ModelError
from ingle.weights.quantized.groups import MIDDLE, Bytes, Floats, Groups, Kind, half_holds
from ingle.weights.quantized.scheme import Layout, Scheme

_T = TypeVar("_T", bound=np.generic)
Numbers = npt.NDArray[np.generic]
Words = npt.NDArray[np.int32]
Shape = tuple[int, ...]

_FLOATS = ("F16", "BF16", "F32")
_WORDS, _INTS = ("I32",), ("I8", "U8")
_FP8 = "F8_E4M3"
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Which nibble of a word each of eight outputs has."""
_DOWNLOAD = "download the model's files again, all of them"
SCALES = ("weight_scale_inv", "weight_scale")

MARKERS: dict[Layout, str] = {"gptq": "qweight", "awq": "qweight", "packed": "weight_packed", "whole": "weight"}
"""The tensor that a module has which is stored so."""


class StoredTensor(NamedTuple):
    type: str
    """As safetensors call it: I32, F16, F8_E4M3."""
    shape: Shape
    read: Callable[[], Numbers]
    """In the file's mapping; BF16 as uint16, FP8 as uint8."""


class Tensors(Protocol):
    """The tensors of a checkpoint's files."""

    def __contains__(self, name: str) -> bool: ...

    def stored(self, name: str) -> StoredTensor:
        """Raises `ModelError` when there is no such tensor."""
        ...

    def where(self, name: str) -> str:
        """The file that has it."""
        ...


@dataclass(frozen=True)
class Module:
    """A quantized linear layer in a checkpoint."""

    name: str
    scheme: Scheme
    tensors: Tensors

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns. Raises `ModelError` where its codes have no such shape."""
        marker = self._stored(MARKERS[self.scheme.layout])
        if len(marker.shape) != 2:
            self._fail(
                MARKERS[self.scheme.layout], f"has shape {marker.shape}, and a matrix of codes has two dimensions"
            )
        first, second = marker.shape
        bits = self.scheme.bits
        if self.scheme.layout == "gptq":
            return second, first * 32 // bits
        if self.scheme.layout == "awq":
            return second * 32 // bits, first
        return (first, second * 32 // bits) if self.scheme.layout == "packed" else (first, second)

    def check(self, rows: int, columns: int) -> None:
        """Asks the headers alone. Raises `ModelError` for what is missing or misshapen, or contradicts the scheme."""
        for suffix, types, shapes in self._wanted(rows, columns):
            stored = self._stored(suffix)
            if stored.type not in types:
                self._fail(suffix, f"is {stored.type}, and {self.scheme.name} asks for {' or '.join(types)}")
            if stored.shape not in shapes:
                self._misshapen(suffix, stored.shape, shapes, columns)

    def read(self, rows: int, columns: int) -> Groups:
        """Raises as `check` does, and for codes' groups that are not what the scheme says."""
        self.check(rows, columns)
        groups = _READERS[self.scheme.layout](self, rows, columns)
        if not np.isfinite(groups.scales).all():
            self._fail(self._scale_suffix, "has scales that are not finite numbers", _DOWNLOAD)
        if groups.kind == "fp8" and (groups.codes & 127).max() == 127:
            self._fail("weight", "has numbers that are none (NaN)", _DOWNLOAD)
        return groups

    # ---- what is wanted

    def _wanted(self, rows: int, columns: int) -> Iterator[tuple[str, tuple[str, ...], tuple[Shape, ...]]]:
        scheme, groups = self.scheme, self.num_groups(columns)
        if scheme.layout == "whole":
            yield "weight", (_FP8,) if scheme.is_float else _INTS[:1], ((rows, columns),)
            yield from self._wanted_scales(rows, groups)
            if scheme.has_zeros:
                yield "weight_zero_point", _INTS[:1], self._shapes_of_scales(rows, groups)
            return
        words = columns * scheme.bits // 32
        if columns * scheme.bits % 32 or (scheme.layout != "packed" and rows * scheme.bits % 32):
            raise ModelError(
                f"{self.tensors.where(self._full(MARKERS[scheme.layout]))}: {self.name} has {rows} rows of {columns}, "
                f"which {scheme.bits} bits a number do not divide into words of 32",
                alternative="take a checkpoint that its quantizer padded",
            )
        if scheme.layout == "packed":
            yield "weight_packed", _WORDS, ((rows, words),)
            yield from self._wanted_scales(rows, groups)
            if scheme.has_zeros:
                yield "weight_zero_point", _WORDS, ((-(-rows * scheme.bits // 32), groups),)
            if self._has("weight_g_idx"):
                yield "weight_g_idx", _WORDS, ((columns,),)
            return
        packed_rows = rows * scheme.bits // 32
        yield "qweight", _WORDS, ((words, rows) if scheme.layout == "gptq" else (columns, packed_rows),)
        yield "scales", _FLOATS, ((groups, rows),)
        if scheme.has_zeros:
            yield "qzeros", _WORDS, ((groups, packed_rows),)
        if scheme.layout == "gptq" and self._has("g_idx"):
            yield "g_idx", _WORDS, ((columns,),)

    def _wanted_scales(self, rows: int, groups: int) -> Iterator[tuple[str, tuple[str, ...], tuple[Shape, ...]]]:
        yield self._scale_suffix, _FLOATS, self._shapes_of_scales(rows, groups)

    def _shapes_of_scales(self, rows: int, groups: int) -> tuple[Shape, ...]:
        if self.scheme.group_size is None:
            return (), (1,), (1, 1), (rows,), (rows, 1)
        return ((-(-rows // self.scheme.block_rows), groups),)

    @property
    def _scale_suffix(self) -> str:
        if self.scheme.layout in ("gptq", "awq"):
            return "scales"
        return next((name for name in SCALES if self._has(name)), "weight_scale")

    def num_groups(self, columns: int) -> int:
        return 1 if self.scheme.group_size is None else -(-columns // self.scheme.group_size)

    # ---- tensors and errors

    def words(self, suffix: str) -> Words:
        return self._stored(suffix).read().astype(np.int32, copy=False)

    def array(self, suffix: str) -> Numbers:
        return self._stored(suffix).read()

    def scales(self, suffix: str) -> tuple[Floats, bool]:
        """And whether float16 holds them exactly."""
        stored = self._stored(suffix)
        values = stored.read()
        if stored.type == "BF16":
            values = (values.astype(np.uint32) << 16).view(np.float32)
        scales: Floats = values.astype(np.float32, copy=False)
        return scales, stored.type == "F16" or half_holds(scales)

    def has(self, suffix: str) -> bool:
        return self._has(suffix)

    def fail(self, suffix: str, what: str, alternative: str | None = None) -> ModelError:
        return ModelError(f"{self.tensors.where(self._full(suffix))}: tensor {self._full(suffix)} {what}",
                          alternative=alternative)  # fmt: skip

    def _fail(self, suffix: str, what: str, alternative: str | None = None) -> None:
        raise self.fail(suffix, what, alternative)

    def _misshapen(self, suffix: str, shape: Shape, wanted: tuple[Shape, ...], columns: int) -> None:
        size, scheme = self.scheme.group_size, self.scheme
        groups = shape[0 if scheme.layout in ("gptq", "awq") else -1] if shape else 1
        asked = " or ".join(map(str, wanted[-1:]))
        alternative = _DOWNLOAD
        of_scales = suffix in ("scales", *SCALES)
        if of_scales and groups and columns % groups == 0 and columns // groups != (size or columns):
            alternative = f"the configuration may be another model's: these files have groups of {columns // groups}"
        self._fail(suffix, f"has shape {shape}, and {scheme.name} asks for {asked}", alternative)

    def _full(self, suffix: str) -> str:
        return f"{self.name}.{suffix}"

    def _has(self, suffix: str) -> bool:
        return self._full(suffix) in self.tensors

    def _stored(self, suffix: str) -> StoredTensor:
        if not self._has(suffix):
            marker = self._full(MARKERS[self.scheme.layout])
            file = self.tensors.where(marker) if marker in self.tensors else "the checkpoint"
            raise ModelError(
                f"{file}: has no tensor {self._full(suffix)}, which {self.scheme.name} needs beside {marker}",
                alternative=_DOWNLOAD,
            )
        return self.tensors.stored(self._full(suffix))


# ---- layouts


def _along(words: Words, bits: int) -> Bytes:
    """Codes of 2, 3, 4 or 8 bits out of words [n, m], packed along the last dimension, the lowest bits first.

    [n, m * 32 / bits], a byte each.
    """
    as_bytes = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return as_bytes
    if bits in (2, 4):
        mask = np.uint8((1 << bits) - 1)
        fields = [as_bytes >> np.uint8(shift) & mask for shift in range(0, 8, bits)]
        return np.stack(fields, -1).reshape(len(words), -1)
    stream = np.unpackbits(as_bytes, axis=1, bitorder="little").reshape(len(words), -1, bits)
    return np.packbits(stream, axis=2, bitorder="little").reshape(len(words), -1)


def _in_halves(codes: Bytes) -> Bytes:
    """Two codes of at most 4 bits to a byte: [n, m] to [n, m / 2]."""
    return codes[:, ::2] | codes[:, 1::2] << np.uint8(4)


def _gptq(module: Module, rows: int, columns: int) -> Groups:
    bits = module.scheme.bits
    by_row = np.ascontiguousarray(module.words("qweight").T)  # [rows, words]
    codes = by_row.view(np.uint8) if bits in (4, 8) else _in_halves(_along(by_row, bits))
    stored = _along(module.words("qzeros"), bits)[:, :rows]
    zeros = (stored + np.uint8(module.scheme.zero_offset)) & np.uint8((1 << bits) - 1)
    scales, half = module.scales("scales")
    return _finished(module, codes, scales.T, zeros.T, half, "g_idx", columns)


def _awq(module: Module, rows: int, columns: int) -> Groups:
    def by_output(words: Words) -> Bytes:
        """[n, rows / 8] to [n, rows]"""
        return _along(words, 4).reshape(len(words), -1, 8)[:, :, _AWQ_ORDER].reshape(len(words), -1)

    codes = _in_halves(np.ascontiguousarray(by_output(module.words("qweight")).T))
    zeros = by_output(module.words("qzeros")).T if module.scheme.has_zeros else None
    scales, half = module.scales("scales")
    return _finished(module, codes, scales.T, zeros, half, None, columns)


def _packed(module: Module, rows: int, columns: int) -> Groups:
    bits = module.scheme.bits
    codes = np.ascontiguousarray(module.words("weight_packed")).view(np.uint8)
    zeros = None
    if module.scheme.has_zeros:
        zeros = _along(np.ascontiguousarray(module.words("weight_zero_point").T), bits)[:, :rows].T
    scales, half = module.scales(module._scale_suffix)
    return _finished(module, codes, _by_row(scales, rows, 1), zeros, half, "weight_g_idx", columns)


def _whole(module: Module, rows: int, columns: int) -> Groups:
    scheme = module.scheme
    codes = module.array("weight").view(np.uint8)
    scales, half = module.scales(module._scale_suffix)
    scales = _by_row(scales, rows, scheme.block_rows)
    if scheme.is_float:
        size = scheme.group_size or columns
        return Groups("fp8", codes, scales, None, size, half, quantizes_inputs=scheme.quantizes_inputs)
    zeros = None
    if scheme.has_zeros:
        zeros = _by_row(module.array("weight_zero_point").view(np.uint8) ^ np.uint8(128), rows, scheme.block_rows)
    return Groups("int8", codes ^ np.uint8(128), scales, zeros, scheme.group_size or columns, half)


_READERS: dict[Layout, Callable[[Module, int, int], Groups]] = {
    "gptq": _gptq,
    "awq": _awq,
    "packed": _packed,
    "whole": _whole,
}


def _by_row(values: npt.NDArray[_T], rows: int, block_rows: int) -> npt.NDArray[_T]:
    """[rows, groups] of scales for the whole matrix, each row or each block of rows."""
    values = values.reshape(-1, 1) if values.ndim < 2 else values
    if len(values) != rows:
        repeats = rows if len(values) == 1 and block_rows == 1 else block_rows
        values = np.repeat(values, repeats, axis=0)[:rows]
    return np.ascontiguousarray(values)


def _finished(
    module: Module,
    codes: Bytes,
    scales: Floats,
    zeros: Bytes | None,
    half: bool,
    index: str | None,
    columns: int,
) -> Groups:
    """Zeros that are all in the middle are left out."""
    kind, size = module.scheme.kind, module.scheme.group_size or columns
    if zeros is not None:
        zeros = None if (zeros == MIDDLE[kind]).all() else np.ascontiguousarray(zeros)
    order = None
    if index is not None and module.has(index):
        order = _order(module, index, size, columns)
        if order is not None:
            codes = _reordered(codes, order, kind)
    return Groups(kind, codes, np.ascontiguousarray(scales), zeros, size, half, order)


def _order(module: Module, index: str, size: int, columns: int) -> npt.NDArray[np.int32] | None:
    """The inputs, sorted by their groups. Raises `ModelError` for groups that are not `size` inputs each."""
    groups = module.words(index)
    usual = np.arange(columns, dtype=np.int32) // np.int32(size)
    if np.array_equal(groups, usual):
        return None
    order = np.argsort(groups, kind="stable").astype(np.int32)
    if not np.array_equal(groups[order], usual):
        wrong = int(np.argmax(groups[order] != usual))
        raise module.fail(
            index, f"does not put {size} inputs into each group, as group {int(usual[wrong])} shows", _DOWNLOAD
        )
    return order


def _reordered(codes: Bytes, order: npt.NDArray[np.int32], kind: Kind) -> Bytes:
    if kind == "int8":
        return np.ascontiguousarray(codes[:, order])
    whole = np.empty((len(codes), codes.shape[1] * 2), np.uint8)
    whole[:, ::2], whole[:, 1::2] = codes & 15, codes >> 4
    return _in_halves(whole[:, order])
