"""Experts of codes for so few tokens that they hardly share one: each pair of a token and an expert by itself, on the
CUDA cores as `coded_vector` multiplies."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ingle.kernels.coded import BITS, Coded
from ingle.kernels.gpu import coded_vector
from ingle.kernels.gpu.coded_tiles import first_column, load_tile, rows_of_tile
from ingle.kernels.gpu.coded_vector import take_steps
from ingle.kernels.gpu.device import await_previous, num_sms, pdl
from ingle.kernels.gpu.elementwise import activate, swiglu_clamped
from ingle.kernels.gpu.integers import as_integers, in_quads, multiply_quads, table_words
from ingle.kernels.options import Activation

_DOWN, _SILU, _GELU, _CLAMPED = 0, 2, 3, 4
"""What becomes of a product; those above 1 have the gate in the first half of an expert's rows."""
_LINES = 4
"""Rows of weights of a tile."""
_WARPS_A_SM = 12


def suits(x: torch.Tensor, coded: Coded) -> bool:
    """Whether these kernels may, and should, multiply rows like those of x by an expert's rows of the matrix."""
    return coded.is_e2m1 and coded.order is None and coded_vector.fits(x[:1], coded)


def gated(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    num_experts: int,
    coded: Coded,
    bias: torch.Tensor | None,
    activation: Activation,
) -> torch.Tensor:
    """activation(gate) * up of each pair: x [T, E] and expert_ids [T, K] to [T * K, I]. bias: [N, 2 * I]."""
    out = x.new_empty(expert_ids.numel(), coded.num_rows // num_experts // 2)
    epilogue = {"silu": _SILU, "gelu_tanh": _GELU, "swiglu_clamped": _CLAMPED}[activation]
    _run(x, expert_ids, coded, bias, None, out, epilogue)
    return out


def down(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    num_experts: int,
    coded: Coded,
    bias: torch.Tensor | None,
    weights: torch.Tensor,
) -> torch.Tensor:
    """What experts make of pairs' rows x [T * K, I], times weights [T, K]: [T * K, E]. bias: [N, E]."""
    out = x.new_empty(len(x), coded.num_rows // num_experts)
    _run(x, expert_ids, coded, bias, weights, out, _DOWN)
    return out


def _run(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    coded: Coded,
    bias: torch.Tensor | None,
    weights: torch.Tensor | None,
    out: torch.Tensor,
    epilogue: int,
) -> None:
    num_pairs, size_out = out.shape
    size_out *= 1 if epilogue == _DOWN else 2
    chunks = triton.next_power_of_2(coded.num_columns // coded_vector.CHUNK)
    num_warps = min(max(chunks // 64, 1), 16)
    num_tiles = triton.cdiv(size_out, _LINES)
    # As many programs as an SM runs at once, each with about as many tiles and two at least: see `coded_vector.tiling`.
    at_once = max(num_sms(x.device) * _WARPS_A_SM // num_warps, 1)
    num_programs = triton.cdiv(num_tiles, max(triton.cdiv(num_tiles * num_pairs, at_once), 2))
    early = pdl(x.device)
    low, high = BITS[coded.kind]
    _expert_vector_kernel[(num_programs, num_pairs)](
        x, expert_ids, coded_vector.pointers(coded), coded.table, bias, weights, out, x.stride(0),
        PAIRS_A_ROW=1 if epilogue == _DOWN else expert_ids.shape[1], IN=coded.num_columns, OUT=size_out,
        OUTS=_LINES if epilogue == _DOWN else _LINES // 2, CHUNKS=chunks, LOW=low, HIGH=high, APART=coded.half,
        GROUP=coded.group_size, GROUPS=coded.scales.shape[1], EPILOGUE=epilogue,
        PDL=early, COMPILED=x.is_cuda, num_warps=num_warps, launch_pdl=early,
    )  # fmt: skip


@triton.jit
def _expert_vector_kernel(
    x_ptr, ids_ptr, matrix, table_ptr, bias_ptr, weights_ptr, out_ptr, x_stride,
    PAIRS_A_ROW: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, OUTS: tl.constexpr, CHUNKS: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, APART: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
    EPILOGUE: tl.constexpr, PDL: tl.constexpr, COMPILED: tl.constexpr,
):  # fmt: skip
    """A program has a pair's inputs, as integers, and multiplies one tile of its expert's rows after the other by them,
    tiles as far from each other as there are programs."""
    LINES: tl.constexpr = OUTS if EPILOGUE == 0 else 2 * OUTS
    NUM_TILES: tl.constexpr = (OUT + LINES - 1) // LINES
    COUNT: tl.constexpr = IN // 32
    program, num_programs, pair = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    chunk = tl.arange(0, CHUNKS)
    column = first_column(chunk, APART)
    group = column // GROUP
    table = table_words(table_ptr, True, COMPILED)
    if PDL:
        await_previous()
    expert = tl.load(ids_ptr + pair).to(tl.int64)
    codes_ptr, high_ptr, scales_ptr, zeros_ptr, factors_ptr = matrix
    own = codes_ptr + expert * (OUT * COUNT * 4), high_ptr, scales_ptr + expert * (OUT * GROUPS), zeros_ptr, factors_ptr
    loaded = load_tile(
        own, program, program < NUM_TILES, 0, COUNT, OUT, OUTS, CHUNKS, EPILOGUE, 1, COUNT, LOW, HIGH, APART, GROUP,
        GROUPS, 0, False, COMPILED,
    )  # fmt: skip
    x_row = x_ptr + (pair // PAIRS_A_ROW).to(tl.int64) * x_stride
    inputs, _ = as_integers(x_row, (), column, chunk < COUNT, CHUNKS, APART, False, COMPILED)
    for tile in range(program, NUM_TILES, num_programs):
        words, steps = loaded
        # The next weights are on their way while these are multiplied.
        following = tile + num_programs
        loaded = load_tile(
            own, following, following < NUM_TILES, 0, COUNT, OUT, OUTS, CHUNKS, EPILOGUE, 1, COUNT, LOW, HIGH, APART,
            GROUP, GROUPS, 0, False, COMPILED,
        )  # fmt: skip
        outs = rows_of_tile(tile, tl.arange(0, LINES), OUT, OUTS, EPILOGUE, 1)
        quads = in_quads(words, table, table_ptr, LOW, HIGH, True, COMPILED)
        steps = take_steps(steps, own, group, GROUP, GROUPS, 0, False, 0)
        product = multiply_quads(quads, steps, inputs, GROUP, 0, False, False, 0, 0, True, COMPILED)
        total = tl.sum(product, 1)
        if bias_ptr is not None:
            total += tl.load(bias_ptr + expert * OUT + outs, mask=outs < OUT, other=0.0).to(tl.float32)
        dtype = out_ptr.dtype.element_ty
        if EPILOGUE == 0:
            total *= tl.load(weights_ptr + pair)
            tl.store(out_ptr + pair * OUT + outs, total.to(dtype), mask=outs < OUT)
        else:
            gate, up = tl.split(tl.trans(tl.reshape(total, [2, OUTS])))
            place = tile * OUTS + tl.arange(0, OUTS)
            out = swiglu_clamped(gate, up) if EPILOGUE == 4 else activate(gate, EPILOGUE == 3) * up
            tl.store(out_ptr + pair * (OUT // 2) + place, out.to(dtype), mask=place < OUT // 2)
