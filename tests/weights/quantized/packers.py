"""Writers of quantized layers, after what is documented of their formats, and nothing shared with the readers.

Every writer also gives the matrix that its tensors stand for, in float64 [rows, columns].
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
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


def gemv(rows: int, columns: int, *, group_size: int = 64, seed: int = 0) -> Written:
    """AutoAWQ's layout for few rows: in order along the inputs, zeros and scales padded."""
    groups = columns // group_size
    codes, zeros, scales = random(rows, columns, groups, 4, seed)
    index = np.arange(columns) // group_size
    together = {64: 2, 32: 4}.get(group_size, 1)
    width = (groups + 8 * together - 1) // (8 * together) * together
    padded = np.zeros((rows, width * 8), np.int64)
    padded[:, :groups] = zeros
    padded_scales = np.zeros((rows, width * 8), np.float16)
    padded_scales[:, :groups] = scales
    tensors = {"qweight": words(codes, 4, 1), "qzeros": words(padded, 4, 1), "scales": torch.from_numpy(padded_scales)}
    exact = (codes - zeros[:, index]) * scales.astype(np.float64)[:, index]
    settings = {"quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": True, "version": "gemv"}
    return Written(tensors, exact, Scheme("gemv", 4, group_size=group_size, has_zeros=True), settings)


NF4 = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0])  # fmt: skip
FP4 = np.array([0, 0.005208333333, 0.66666667, 1, 0.33333333, 0.5, 0.16666667, 0.25])
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def bitsandbytes(
    rows: int, columns: int, *, table: str = "nf4", block: int = 64, nested: bool = True,
    storage: torch.dtype = torch.uint8, seed: int = 0,
) -> Written:  # fmt: skip
    """As `bitsandbytes.functional.QuantState.as_dict(packed=True)` names and packs it."""
    rng = np.random.default_rng(seed)
    values = (NF4 if table == "nf4" else np.concatenate([FP4, -FP4])).astype(np.float32)
    codes = rng.integers(0, 16, rows * columns)
    blocks = -(-rows * columns // block)
    absmax = ((rng.random(blocks) + 0.5) / columns**0.5 * 1.2).astype(np.float32)
    state: dict[str, Any] = {"quant_type": table, "blocksize": block, "dtype": "bfloat16", "shape": [rows, columns]}
    packed = torch.from_numpy((codes[::2] << 4 | codes[1::2]).astype(np.uint8)).view(storage).reshape(-1, 1)
    tensors = {"weight": packed, "weight.quant_map": torch.from_numpy(values)}
    if nested:
        offset, of_map = float(absmax.mean()), np.linspace(-1, 1, 256).astype(np.float32)
        outer = np.maximum.reduceat(np.abs(absmax - offset), np.arange(0, blocks, 256)).astype(np.float32)
        indices = rng.integers(0, 256, blocks).astype(np.uint8)
        absmax = (of_map[indices].astype(np.float64) * outer.repeat(256)[:blocks] + offset).astype(np.float32)
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
        tensors |= {"weight.absmax": torch.from_numpy(indices), "weight.nested_absmax": torch.from_numpy(outer),
                    "weight.nested_quant_map": torch.from_numpy(of_map)}  # fmt: skip
    else:
        tensors["weight.absmax"] = torch.from_numpy(absmax)
    said = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    tensors[f"weight.quant_state.bitsandbytes__{table}"] = said
    exact = values[codes].astype(np.float64) * absmax.astype(np.float64).repeat(block)[: rows * columns]
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "_load_in_4bit": True,
                "bnb_4bit_quant_type": table, "bnb_4bit_use_double_quant": nested, "llm_int8_skip_modules": None,
                "bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_quant_storage": "uint8"}  # fmt: skip
    scheme = Scheme("blocks", 4, table="nf4" if table == "nf4" else "fp4")
    return Written(tensors, exact.reshape(rows, columns), scheme, settings)


def bitsandbytes_int8(rows: int, columns: int, *, seed: int = 0) -> Written:
    rng = np.random.default_rng(seed)
    codes = rng.integers(-127, 128, (rows, columns)).astype(np.int8)
    largest = ((rng.random(rows) + 0.5) / columns**0.5 * 1.2).astype(np.float32)
    tensors = {"weight": torch.from_numpy(codes), "SCB": torch.from_numpy(largest),
               "weight_format": torch.tensor(0, dtype=torch.uint8)}  # fmt: skip
    exact = codes * largest.astype(np.float64)[:, None] / 127
    settings = {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False,
                "llm_int8_skip_modules": ["lm_head"], "llm_int8_threshold": 6.0}  # fmt: skip
    return Written(tensors, exact, Scheme("scb", 8), settings)


def modelopt_nvfp4(rows: int, columns: int, *, seed: int = 0) -> Written:
    """NVIDIA's: a scale of FP8 for 16 numbers, and one of all."""
    rng = np.random.default_rng(seed)
    values = np.concatenate([E2M1, -E2M1])
    codes = rng.integers(0, 16, (rows, columns))
    scale = torch.from_numpy(rng.random((rows, columns // 16)) * 400 + 20).to(torch.float8_e4m3fn)
    whole = torch.tensor(float(1 / 700 / columns**0.5))
    packed = torch.from_numpy((codes[:, 1::2] << 4 | codes[:, ::2]).astype(np.uint8))
    tensors = {"weight": packed, "weight_scale": scale, "weight_scale_2": whole, "input_scale": torch.tensor(0.01)}
    exact = values[codes] * (scale.double() * whole.double()).numpy().repeat(16, 1)
    settings = {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16, "ignore": ["lm_head"]}
    return Written(tensors, exact, Scheme("nibbles", 4, group_size=16, table="nvfp4"), settings)


def compressed_fp4(rows: int, columns: int, *, form: str, seed: int = 0) -> Written:
    """By compressed-tensors' own compressor; what its codes stand for by its own unpacking."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    torch.manual_seed(seed)
    size, nvidia = (16, True) if form == "nvfp4-pack-quantized" else (32, False)
    args = QuantizationArgs(num_bits=4, type="float", strategy="tensor_group" if nvidia else "group", symmetric=True,
                            group_size=size, scale_dtype=torch.float8_e4m3fn if nvidia else torch.uint8)  # fmt: skip
    weight = torch.randn(rows, columns) / columns**0.5
    largest = weight.view(rows, -1, size).abs().amax(-1)
    state = {"weight": weight}
    if nvidia:
        whole = 448 * 6 / weight.abs().max()
        state |= {
            "weight_global_scale": whole.reshape(1),
            "weight_scale": (largest / 6 * whole).to(torch.float8_e4m3fn).float(),
        }
    else:
        state["weight_scale"] = torch.exp2(torch.floor(torch.log2(largest)) - 2)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry(form)
    stored = compressor.compress(dict(state), scheme)
    numbers = unpack_fp4_from_uint8(stored["weight_packed"], rows, columns).double()
    scales = state["weight_scale"].double() / state.get("weight_global_scale", torch.ones(1)).double()
    exact = numbers * scales.repeat_interleave(size, 1)
    group = {"targets": ["Linear"], "weights": args.model_dump(mode="json"), "input_activations": None}
    settings = {
        "quant_method": "compressed-tensors",
        "format": form,
        "ignore": ["lm_head"],
        "config_groups": {"g": group},
    }
    ours = Scheme("nibbles", 4, group_size=size, table="nvfp4" if nvidia else "mxfp4")
    return Written({name: tensor.data for name, tensor in stored.items()}, exact.double().numpy(), ours, settings)


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


def compressed_mxfp8(rows: int, columns: int, *, seed: int = 0) -> Written:
    """By compressed-tensors' own compressor and its own way back."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    torch.manual_seed(seed)
    args = QuantizationArgs(num_bits=8, type="float", strategy="group", symmetric=True, group_size=32,
                            scale_dtype=torch.uint8)  # fmt: skip
    weight = torch.randn(rows, columns) / columns**0.5
    scale = torch.exp2(torch.floor(torch.log2(weight.view(rows, -1, 32).abs().amax(-1))) - 7)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry("mxfp8-quantized")
    stored = compressor.compress({"weight": weight, "weight_scale": scale}, scheme)
    exact = stored["weight"].double() * scale.double().repeat_interleave(32, 1)
    group = {"targets": ["Linear"], "weights": args.model_dump(mode="json"), "input_activations": None}
    settings = {"quant_method": "compressed-tensors", "format": "mxfp8-quantized", "config_groups": {"g": group}}
    return Written(stored, exact.numpy(), Scheme("whole", 8, True, 32), settings)


def installed(case: str) -> bool:
    """What writes it."""
    return not case.startswith("ct-") or find_spec("compressed_tensors") is not None


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
    "awq-gemv": lambda rows, columns: gemv(rows, columns),
    "awq-gemv-32": lambda rows, columns: gemv(rows, columns, group_size=32),
    "nf4": lambda rows, columns: bitsandbytes(rows, columns),
    "nf4-plain": lambda rows, columns: bitsandbytes(rows, columns, nested=False, storage=torch.bfloat16),
    "nf4-128": lambda rows, columns: bitsandbytes(rows, columns, block=128),
    "fp4": lambda rows, columns: bitsandbytes(rows, columns, table="fp4", nested=False),
    "bnb-int8": lambda rows, columns: bitsandbytes_int8(rows, columns),
    "ct-mxfp4": lambda rows, columns: compressed_fp4(rows, columns, form="mxfp4-pack-quantized"),
    "ct-mxfp8": lambda rows, columns: compressed_mxfp8(rows, columns),
    "ct-nvfp4": lambda rows, columns: compressed_fp4(rows, columns, form="nvfp4-pack-quantized"),
    "nvfp4": lambda rows, columns: modelopt_nvfp4(rows, columns),
}
