"""bitsandbytes' layers as transformers save them, to `Groups`.

NF4 and FP4: `weight` holds the whole matrix [O, I] as one row of codes, two a byte, the first in the upper half, in a
tensor of whatever type and shape; blocks of `blocksize` neighbours share a scale, `weight.absmax`. With double
quantization that is uint8: an index into `weight.nested_quant_map`, under a scale of each block of blocks,
`weight.nested_absmax`, and with an offset. What else belongs to it is JSON in the bytes of the tensor
`weight.quant_state.bitsandbytes__nf4`.
int8: `weight` [O, I], and `SCB` [O]: the largest number of each row, for which 127 stands.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from ingle.weights.quantized.groups import Floats, Groups
from ingle.weights.quantized.module import DOWNLOAD, Module, Wanted
from ingle.weights.quantized.scheme import Layout
from ingle.weights.quantized.tables import TABLES

SCALES: Mapping[Layout, str] = {"blocks": "weight.absmax", "scb": "SCB"}
STATE = "weight.quant_state.bitsandbytes__"
"""Before the name of a table."""
_MAX_STATE_BYTES = 1 << 16
_MAX_BLOCK = 1 << 16
_ANY = ("U8", "I8", "BF16", "F16", "F32", "F64", "I32")
"""What codes may be stored as (`bnb_4bit_quant_storage`)."""
_ITEMSIZES = {"U8": 1, "I8": 1, "BF16": 2, "F16": 2, "F32": 4, "F64": 8, "I32": 4}


class _State(NamedTuple):
    rows: int
    columns: int
    block: int
    nested_block: int
    """Blocks that share a scale; 0 where scales are stored as they are."""
    offset: float

    @property
    def num_blocks(self) -> int:
        return -(-self.rows * self.columns // self.block)


def shape_of(module: Module) -> tuple[int, int]:
    state = _state(module)
    return state.rows, state.columns


def block_of(module: Module) -> int:
    """Numbers that share a scale."""
    return _state(module).block


def _state(module: Module) -> _State:
    """Raises `ModelError` for one that is not such."""
    table = module.scheme.table
    suffix = f"{STATE}{table}"
    stored = module.stored(suffix)
    if stored.type != "U8" or math.prod(stored.shape) > _MAX_STATE_BYTES:
        raise module.fail(suffix, f"is {stored.type} {stored.shape}, not the bytes of a JSON object", DOWNLOAD)
    try:
        said = json.loads(module.bytes_of(suffix).tobytes())
    except (ValueError, RecursionError):
        said = None
    if not isinstance(said, dict):
        raise module.fail(suffix, "is no JSON object", DOWNLOAD)

    def number(values: Any, name: str, most: int) -> int:
        if type(values) is not int or not 0 < values <= most:
            raise module.fail(suffix, f"says {name} {str(values)[:60]!r}, no whole number up to {most}", DOWNLOAD)
        return values

    shape = said.get("shape")
    if not isinstance(shape, list) or len(shape) != 2:
        raise module.fail(suffix, f"says shape {str(shape)[:60]}, and a matrix has two dimensions", DOWNLOAD)
    rows, columns = (number(size, "shape", 1 << 32) for size in shape)
    block = number(said.get("blocksize"), "blocksize", _MAX_BLOCK)
    nested = number(said["nested_blocksize"], "nested_blocksize", _MAX_BLOCK) if "nested_blocksize" in said else 0
    offset = said.get("nested_offset", 0.0)
    if type(offset) not in (int, float) or not math.isfinite(offset):
        raise module.fail(suffix, f"says nested_offset {str(offset)[:60]}, no number", DOWNLOAD)
    return _State(rows, columns, block, nested, float(offset))


def wanted_blocks(module: Module, rows: int, columns: int) -> Iterator[Wanted]:
    state = _state(module)
    if columns % 2:
        raise module.fail("weight", f"has rows of {columns}, which end amid a byte of two codes")
    stored = module.stored("weight")
    held = math.prod(stored.shape) * _ITEMSIZES.get(stored.type, 0)
    if stored.type not in _ANY or held != rows * columns // 2:
        raise module.fail(
            "weight",
            f"is {stored.type} {stored.shape}, and {module.scheme.name} asks for {rows * columns // 2} bytes",
            DOWNLOAD,
        )
    blocks = state.num_blocks
    if not state.nested_block:
        yield Wanted("weight.absmax", ("F32",), ((blocks,),))
        return
    yield Wanted("weight.absmax", ("U8",), ((blocks,),))
    yield Wanted("weight.nested_absmax", ("F32",), ((-(-blocks // state.nested_block),),))
    yield Wanted("weight.nested_quant_map", ("F32",), ((256,),))


def read_blocks(module: Module, rows: int, columns: int) -> Groups:
    state, table = _state(module), module.scheme.table
    assert table is not None
    if module.has("weight.quant_map"):
        stored = module.floats("weight.quant_map").reshape(-1)
        if stored.shape != (16,) or not np.allclose(stored, TABLES[table], atol=1e-4):
            raise module.fail("weight.quant_map", f"is not the table of {table.upper()}", DOWNLOAD)
    packed = module.bytes_of("weight").reshape(rows, columns // 2)
    codes = packed >> np.uint8(4) | packed << np.uint8(4)
    size = math.gcd(state.block, columns)  # where a row ends amid a block
    scales = _absmax(module, state)
    of_group = np.arange(0, rows * columns, size) // state.block
    by_row = scales.reshape(rows, -1) if size == state.block else scales[of_group].reshape(rows, -1)
    return Groups("int4", codes, by_row, None, size, table=table)


def _absmax(module: Module, state: _State) -> Floats:
    if not state.nested_block:
        return module.floats("weight.absmax")
    of_block = np.repeat(module.floats("weight.nested_absmax"), state.nested_block)[: state.num_blocks]
    values = module.floats("weight.nested_quant_map")[module.array("weight.absmax").astype(np.intp)]
    return values * of_block + np.float32(state.offset)


def wanted_int8(module: Module, rows: int, columns: int) -> Iterator[Wanted]:
    yield Wanted("weight", ("I8",), ((rows, columns),))
    yield Wanted("SCB", ("F32", "F16", "BF16"), ((rows,), (rows, 1)))


def read_int8(module: Module, rows: int, columns: int) -> Groups:
    if module.has("weight_format") and np.any(module.array("weight_format")):
        raise module.fail(
            "weight_format", "says that the rows lie in the order of a GPU", "save the model anew, with transformers"
        )
    codes = module.array("weight").view(np.uint8) ^ np.uint8(128)
    scales = module.floats("SCB").reshape(rows, 1) / np.float32(127)
    return Groups("int8", codes, scales, None, columns)
