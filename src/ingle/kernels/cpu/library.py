"""The compiled kernels as ctypes knows them: the functions and structures of `csrc/operators.h`."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_char_p, c_float, c_int8, c_int32, c_int64, c_void_p

import torch

from ingle.kernels.cpu import compile, threads

KV_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}


class Matrix(ctypes.Structure):
    _fields_ = (
        ("data", c_void_p),
        ("rows", c_int64),
        ("columns", c_int64),
        ("bits", c_int32),
        ("group_size", c_int32),
        ("wide_scales", c_int32),
        ("has_minima", c_int32),
        ("codebook", c_int8 * 16),
    )


class Rotation(ctypes.Structure):
    _fields_ = (
        ("qkv", c_void_p),
        ("cos_sin", c_void_p),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("kv_slots", c_void_p),
        ("num_tokens", c_int64),
        ("num_heads", c_int64),
        ("num_kv_heads", c_int64),
        ("head_dim", c_int64),
        ("rotary_dim", c_int64),
        ("eps", c_float),
        ("kv_type", c_int32),
    )


class Attention(ctypes.Structure):
    _fields_ = (
        ("q", c_void_p),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("page_tables", c_void_p),
        ("slots", c_void_p),
        ("kv_lengths", c_void_p),
        ("query_starts", c_void_p),
        ("out", c_void_p),
        ("num_seqs", c_int64),
        ("num_heads", c_int64),
        ("num_kv_heads", c_int64),
        ("head_dim", c_int64),
        ("page_size", c_int64),
        ("pages_per_slot", c_int64),
        ("q_stride", c_int64),
        ("window", c_int64),
        ("scale", c_float),
        ("softcap", c_float),
        ("kv_type", c_int32),
    )


_SIGNATURES = {
    "ingle_start": (c_int32, POINTER(c_int32)),
    "ingle_instructions": (),
    "ingle_matrix_bytes": (POINTER(Matrix),),
    "ingle_pack_rows": (POINTER(Matrix), c_void_p, c_void_p, c_void_p, c_int64, c_int64),
    "ingle_multiply": (POINTER(Matrix), c_void_p, c_int64, c_void_p, c_int64),
    "ingle_gather_rows": (POINTER(Matrix), c_void_p, c_int64, c_void_p),
    "ingle_rms_norm": (c_void_p, c_void_p, c_float, c_int64, c_int64, c_void_p),
    "ingle_add_rms_norm": (c_void_p, c_void_p, c_void_p, c_float, c_int64, c_int64, c_void_p),
    "ingle_gated": (c_void_p, c_int32, c_int64, c_int64, c_void_p),
    "ingle_rotate_and_store": (POINTER(Rotation),),
    "ingle_attention": (POINTER(Attention),),
    "ingle_sample_greedy": (c_void_p, c_int64, c_int64, c_void_p, c_void_p),
}

_RESULTS: dict[str, type] = {"ingle_instructions": c_char_p, "ingle_matrix_bytes": c_int64}

_loaded: ctypes.CDLL | None = None


def load(path: str) -> ctypes.CDLL:
    """A compiled library, its functions typed."""
    library = ctypes.CDLL(path)
    for name, argument_types in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes = argument_types
        function.restype = _RESULTS.get(name)
    return library


def start(num_threads: int) -> str | None:
    """Readies the kernels for this process, to run on so many threads; or says why they cannot be had.

    The first call of a process decides the threads.
    """
    global _loaded
    if _loaded is None:
        try:
            library = load(str(compile.library()))
        except (compile.CompileError, OSError) as error:
            return str(error)
        cpus = threads.places(num_threads)
        library.ingle_start(num_threads, None if cpus is None else (c_int32 * num_threads)(*cpus))
        _loaded = library
    return None


def started() -> bool:
    return _loaded is not None


def instructions() -> str:
    """The instruction set that the started kernels multiply with."""
    name: bytes = get().ingle_instructions()
    return name.decode()


def get() -> ctypes.CDLL:
    """The kernels of this process, once `start` has readied them."""
    if _loaded is None:
        raise RuntimeError("the CPU kernels are used before they were started")
    return _loaded
