"""Writers of quantized layers, after what is documented of their formats, and nothing shared with the readers.

Every writer also gives the matrix that its tensors stand for, in float64 [rows, columns].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ingle.weights.quantized.scheme import Scheme

AWQ_PACK_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight outputs each nibble of a word has, from the lowest on."""


@dataclass(frozen=True)
class Written:
    tensors: Mapping[str, torch.Tensor]
    """By what follows the module's name."""
    exact: np.ndarray
    scheme: Scheme
    settings: dict[str, Any] = field(default_factory=dict)
    """As `quantization_config` of a checkpoint of such layers."""


def words(codes: np.ndarray, bits: int, axis: int) -> torch.Tensor:
    """Codes packed along an axis, each at its bit of a number of any length, cut into words of 32."""
    lines = np.moveaxis(codes, axis, -1)
    packed = []
    for line in lines.reshape(-1, lines.shape[-1]):
        whole = sum(int(code) << bits * index for index, code in enumerate(line))
        count = -(-len(line) * bits // 32)
        packed.append(np.frombuffer(whole.to_bytes(4 * count, "little"), "<i4"))
    return torch.from_numpy(np.moveaxis(np.array(packed).reshape(*lines.shape[:-1], -1), -1, axis).copy())


def random(rows: int, columns: int, groups: int, bits: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, zeros and float16 scales that make a matrix with rows of length 1, as a model has them."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 1 << bits, (rows, columns))
    scales = (rng.random((rows, groups)) + 0.5) / (1 << bits) / columns**0.5 * 3
    return codes, rng.integers(0, 1 << bits, (rows, groups)), scales.astype(np.float16)


def gptq(
    rows: int, columns: int, *, bits: int = 4, group_size: int = 64, symmetric: bool = True, act_order: bool = False,
    version: int = 1, seed: int = 0, dtype: torch.dtype = torch.float16,
) -> Written:  # fmt: skip
    size = columns if group_size == -1 else group_size
    groups = -(-columns // size)
    codes, zeros, scales = random(rows, columns, groups, bits, seed)
    if symmetric:
        zeros[:] = 1 << (bits - 1)
    index = np.arange(columns) // size
    if act_order:
        index = np.random.default_rng(seed + 1).permutation(index)
    scale = torch.from_numpy(scales).to(dtype)
    exact = (codes - zeros[:, index]) * scale.double().numpy()[:, index]
    stored = (zeros - (version == 1)) % (1 << bits)
    tensors = {
        "qweight": words(codes.T, bits, 0),
        "qzeros": words(stored.T, bits, 1),
        "scales": scale.T.contiguous(),
        "g_idx": torch.from_numpy(index.astype(np.int32)),
    }
    settings = {"quant_method": "gptq", "bits": bits, "group_size": group_size, "sym": symmetric, "desc_act": act_order,
                "checkpoint_format": "gptq" if version == 1 else "gptq_v2"}  # fmt: skip
    scheme = Scheme(
        "gptq", bits, group_size=None if group_size == -1 else size, zero_offset=2 - version, has_zeros=True
    )
    return Written(tensors, exact, scheme, settings)


def awq(rows: int, columns: int, *, group_size: int = 64, seed: int = 0) -> Written:
    codes, zeros, scales = random(rows, columns, columns // group_size, 4, seed)
    index = np.arange(columns) // group_size

    def packed(by_output: np.ndarray) -> torch.Tensor:
        """[n, rows]"""
        ordered = by_output.reshape(len(by_output), -1, 8)[:, :, AWQ_PACK_ORDER].reshape(len(by_output), -1)
        return words(ordered, 4, 1)

    tensors = {"qweight": packed(codes.T), "qzeros": packed(zeros.T), "scales": torch.from_numpy(scales.T.copy())}
    exact = (codes - zeros[:, index]) * scales.astype(np.float64)[:, index]
    settings = {"quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": True, "version": "gemm"}
    return Written(tensors, exact, Scheme("awq", 4, group_size=group_size, has_zeros=True), settings)


def fp8(
    rows: int, columns: int, *, scales: str = "block", block: tuple[int, int] = (128, 128), seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Written:  # fmt: skip
    """`scales`: block, channel or tensor."""
    torch.manual_seed(seed)
    codes = (torch.randn(rows, columns) * 60).clamp(-448, 448).to(torch.float8_e4m3fn)
    codes[0, :8] = torch.arange(8).float().mul(2.0**-9).to(torch.float8_e4m3fn)  # the smallest numbers that there are
    height, width = {"block": block, "channel": (1, columns), "tensor": (rows, columns)}[scales]
    shape = (-(-rows // height), -(-columns // width))
    scale = ((torch.rand(shape) + 0.5) / 60 / columns**0.5).to(dtype)
    spread = scale.double().repeat_interleave(height, 0)[:rows].repeat_interleave(width, 1)[:, :columns]
    blocks = scales == "block"
    settings: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
    if blocks:
        settings["weight_block_size"] = list(block)
    tensors = {"weight": codes, "weight_scale_inv" if blocks else "weight_scale": scale if blocks else
               scale.reshape(()) if scales == "tensor" else scale}  # fmt: skip
    scheme = Scheme("whole", 8, True, width if blocks else None, height if blocks else 1, quantizes_inputs=True)
    return Written(tensors, (codes.double() * spread).numpy(), scheme, settings)


def compressed(
    rows: int, columns: int, *, form: str, bits: int = 4, strategy: str = "group", group_size: int | None = 64,
    symmetric: bool = True, seed: int = 0,
) -> Written:  # fmt: skip
    """By compressed-tensors' own compressor and its own way back."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    torch.manual_seed(seed)
    kind = "float" if form == "float-quantized" else "int"
    block = [16, 32] if strategy == "block" else None
    args = QuantizationArgs(num_bits=bits, type=kind, strategy=strategy, symmetric=symmetric, group_size=group_size,
                            block_structure=block)  # fmt: skip
    weight = torch.randn(rows, columns) / columns**0.5
    height, width = {"group": (1, group_size), "channel": (1, columns), "tensor": (rows, columns), "block": block}[
        strategy
    ]
    cells = weight.view(rows // height, height, columns // width, width)
    low, high = cells.amin((1, 3)).clamp(max=0), cells.amax((1, 3)).clamp(min=0)
    most = 448.0 if kind == "float" else float((1 << bits) - 1) / 2
    scale = torch.maximum(high, -low) / most if symmetric else (high - low) / float((1 << bits) - 1)
    scale = scale.reshape(1) if strategy == "tensor" else scale
    state = {"weight": weight, "weight_scale": scale.bfloat16()}
    if not symmetric:
        state["weight_zero_point"] = (-(1 << (bits - 1)) - low / scale).round().clamp(
            -(1 << (bits - 1)), (1 << (bits - 1)) - 1).to(torch.int8)  # fmt: skip
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry(form)
    stored = compressor.compress(state, scheme)
    exact = compressor.decompress({**stored, "weight_scale": stored["weight_scale"].float()}, scheme)["weight"]
    group = {"targets": ["Linear"], "weights": args.model_dump(mode="json")}
    settings = {
        "quant_method": "compressed-tensors",
        "format": form,
        "ignore": ["lm_head"],
        "config_groups": {"g": group},
    }
    ours = Scheme("packed" if form == "pack-quantized" else "whole", bits, kind == "float",
                  width if strategy in ("group", "block") else None, height if strategy == "block" else 1,
                  has_zeros=not symmetric)  # fmt: skip
    return Written(stored, exact.double().numpy(), ours, settings)


CASES: dict[str, Callable[[int, int], Written]] = {
    "gptq": lambda rows, columns: gptq(rows, columns),
    "gptq-asymmetric": lambda rows, columns: gptq(rows, columns, symmetric=False),
    "gptq-v2": lambda rows, columns: gptq(rows, columns, symmetric=False, version=2),
    "gptq-act-order": lambda rows, columns: gptq(rows, columns, act_order=True),
    "gptq-act-order-asymmetric": lambda rows, columns: gptq(
        rows, columns, act_order=True, symmetric=False, group_size=32
    ),
    "gptq-rows": lambda rows, columns: gptq(rows, columns, group_size=-1),
    "gptq-int8": lambda rows, columns: gptq(rows, columns, bits=8),
    "gptq-int8-asymmetric": lambda rows, columns: gptq(rows, columns, bits=8, symmetric=False, act_order=True),
    "gptq-int2": lambda rows, columns: gptq(rows, columns, bits=2),
    "gptq-int3": lambda rows, columns: gptq(rows, columns, bits=3, symmetric=False, group_size=32),
    "gptq-bfloat16": lambda rows, columns: gptq(rows, columns, dtype=torch.bfloat16),
    "awq": lambda rows, columns: awq(rows, columns),
    "awq-32": lambda rows, columns: awq(rows, columns, group_size=32),
    "fp8-blocks": lambda rows, columns: fp8(rows, columns, block=(16, 32)),
    "fp8-large-blocks": lambda rows, columns: fp8(rows, columns),
    "fp8-rows": lambda rows, columns: fp8(rows, columns, scales="channel", dtype=torch.bfloat16),
    "fp8-whole": lambda rows, columns: fp8(rows, columns, scales="tensor"),
    "ct-int4": lambda rows, columns: compressed(rows, columns, form="pack-quantized"),
    "ct-int4-asymmetric": lambda rows, columns: compressed(rows, columns, form="pack-quantized", symmetric=False),
    "ct-int4-rows": lambda rows, columns: compressed(
        rows, columns, form="pack-quantized", strategy="channel", group_size=None
    ),
    "ct-int8-packed": lambda rows, columns: compressed(rows, columns, form="pack-quantized", bits=8),
    "ct-int8": lambda rows, columns: compressed(
        rows, columns, form="int-quantized", bits=8, strategy="channel", group_size=None
    ),
    "ct-int8-asymmetric": lambda rows, columns: compressed(
        rows, columns, form="int-quantized", bits=8, symmetric=False
    ),
    "ct-int8-whole": lambda rows, columns: compressed(
        rows, columns, form="int-quantized", bits=8, strategy="tensor", group_size=None
    ),
    "ct-fp8": lambda rows, columns: compressed(
        rows, columns, form="float-quantized", bits=8, strategy="channel", group_size=None
    ),
    "ct-fp8-blocks": lambda rows, columns: compressed(
        rows, columns, form="float-quantized", bits=8, strategy="block", group_size=None
    ),
}
