"""The compiled kernels as ctypes knows them: the functions and structures of `csrc/operators.h`."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_char_p, c_float, c_int16, c_int32, c_int64, c_uint64, c_void_p
from pathlib import Path

from ingle.kernels.cpu import compile

KV_TYPES = {"float32": 0, "float16": 1, "bfloat16": 2, "int8": 3, "fp8_e4m3": 4, "fp8_e5m2": 5}
FLOAT8 = -8
"""The bits of codes that are FP8, as `csrc/matrix.h` calls them."""
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "swiglu_clamped": 2}
HALVES, WIDE, STEPS = 0, 1, 2
"""Scales of groups, as `csrc/matrix.h` calls them."""
IN_SCALES = 2
"""The same of minima."""
SCORINGS = {"softmax": 0, "sigmoid": 1}


class Matrix(ctypes.Structure):
    _fields_ = (
        ("data", c_void_p),
        ("rows", c_int64),
        ("columns", c_int64),
        ("bits", c_int32),
        ("group_size", c_int32),
        ("scales", c_int32),
        ("has_minima", c_int32),
        ("codebook", c_int16 * 16),
        ("order", c_void_p),
        ("unit", c_float),
        ("inputs", c_int64),
        ("operand_bits", c_int32),
    )


class Rounding(ctypes.Structure):
    _fields_ = (
        ("ratios", c_void_p),
        ("num_ratios", c_int64),
        ("group_size", c_int64),
        ("bits", c_int32),
        ("scale_type", c_int32),
    )


class Rotation(ctypes.Structure):
    _fields_ = (
        ("qkv", c_void_p),
        ("cos_sin", c_void_p),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("kv_places", c_void_p),
        ("query_factors", c_void_p),
        ("num_tokens", c_int64),
        ("num_heads", c_int64),
        ("num_kv_heads", c_int64),
        ("head_dim", c_int64),
        ("rotary_dim", c_int64),
        ("page_size", c_int64),
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
        ("as_integers", c_int32),
        ("sinks", c_void_p),
    )


class Projection(ctypes.Structure):
    _fields_ = (("parts", POINTER(POINTER(Matrix))), ("bias", c_void_p), ("num_parts", c_int64), ("rows", c_int64))


class Mixture(ctypes.Structure):
    _fields_ = (
        ("router", c_void_p),
        ("router_bias", c_void_p),
        ("selection_bias", c_void_p),
        ("gate_up", POINTER(Projection)),
        ("down", POINTER(Projection)),
        ("shared_gate_up", Projection),
        ("shared_down", Projection),
        ("shared_gate", c_void_p),
        ("num_experts", c_int64),
        ("top_k", c_int64),
        ("num_groups", c_int64),
        ("topk_group", c_int64),
        ("group_experts", c_int64),
        ("scaling", c_float),
        ("scoring", c_int32),
        ("normalizes", c_int32),
    )


class Latent(ctypes.Structure):
    _fields_ = (
        ("q_down", Projection),
        ("q_up", Projection),
        ("kv_down", Projection),
        ("key_up", POINTER(POINTER(Matrix))),
        ("value_up", POINTER(POINTER(Matrix))),
        ("q_norm", c_void_p),
        ("kv_norm", c_void_p),
        ("num_heads", c_int64),
        ("rank", c_int64),
        ("nope_dim", c_int64),
        ("rope_dim", c_int64),
        ("value_dim", c_int64),
        ("eps", c_float),
        ("interleaved", c_int32),
    )


class Layer(ctypes.Structure):
    _fields_ = (
        ("qkv", Projection),
        ("out", Projection),
        ("gate_up", Projection),
        ("down", Projection),
        ("latent", POINTER(Latent)),
        ("mixture", POINTER(Mixture)),
        ("sinks", c_void_p),
        ("input_norm", c_void_p),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("attention_post_norm", c_void_p),
        ("mlp_norm", c_void_p),
        ("mlp_post_norm", c_void_p),
        ("window", c_int64),
        ("scale", c_float),
        ("softcap", c_float),
        ("qk_eps", c_float),
        ("activation", c_int32),
        ("rope", c_int32),
    )


class Step(ctypes.Structure):
    _fields_ = (
        ("layers", POINTER(Layer)),
        ("residual", c_void_p),
        ("out", c_void_p),
        ("norm", c_void_p),
        ("kv_cache", c_void_p),
        ("kv_places", c_void_p),
        ("query_factors", c_void_p),
        ("cos_sin", c_void_p * 2),
        ("rotary_dims", c_int64 * 2),
        ("num_layers", c_int64),
        ("num_tokens", c_int64),
        ("hidden_size", c_int64),
        ("layer_bytes", c_int64),
        ("attention", Attention),
        ("eps", c_float),
        ("located", c_void_p),
        ("table_size", c_int64),
        ("wanted", c_void_p),
        ("wanted_starts", c_void_p),
        ("num_wanted", c_int64),
    )


_STRUCTURES: tuple[type[ctypes.Structure], ...] = (
    Matrix, Rounding, Rotation, Attention, Projection, Mixture, Latent, Layer, Step
)  # fmt: skip
"""As `ingle_structure_sizes` counts them."""

_SIGNATURES = {
    "ingle_structure_sizes": (),
    "ingle_start": (c_int32,),
    "ingle_settle_memory": (),
    "ingle_num_jobs": (),
    "ingle_instructions": (),
    "ingle_factors": (POINTER(Matrix),),
    "ingle_matrix_bytes": (POINTER(Matrix),),
    "ingle_pack_rows": (POINTER(Matrix), c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_int64),
    "ingle_pack_groups": (POINTER(Matrix), c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_int64),
    "ingle_pack_blocks": (POINTER(Matrix), c_int32, c_void_p, c_void_p, c_void_p, c_int64, c_int64),
    "ingle_round_rows": (POINTER(Rounding), c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_void_p, c_void_p),
    "ingle_multiply": (POINTER(Matrix), c_void_p, c_int64, c_void_p, c_int64),
    "ingle_gather_rows": (POINTER(Matrix), c_void_p, c_int64, c_void_p),
    "ingle_rms_norm": (c_void_p, c_void_p, c_float, c_int64, c_int64, c_void_p),
    "ingle_add_rms_norm": (c_void_p, c_void_p, c_void_p, c_float, c_int64, c_int64, c_void_p),
    "ingle_gated": (c_void_p, c_int32, c_int64, c_int64, c_void_p),
    "ingle_rotate_and_store": (POINTER(Rotation),),
    "ingle_attention": (POINTER(Attention),),
    "ingle_mix": (POINTER(Mixture), c_int32, c_void_p, c_int64, c_int64, c_void_p),
    "ingle_layers": (POINTER(Step),),
    "ingle_sample_greedy": (c_void_p, c_int64, c_int64, c_void_p, c_void_p),
}

_RESULTS: dict[str, type] = {
    "ingle_structure_sizes": POINTER(c_int64),
    "ingle_num_jobs": c_uint64,
    "ingle_instructions": c_char_p,
    "ingle_factors": c_char_p,
    "ingle_matrix_bytes": c_int64,
    "ingle_pack_blocks": c_int32,
}

_loaded: ctypes.CDLL | None = None


def load(path: str) -> ctypes.CDLL:
    """A compiled library, its functions typed. Raises `OSError` for a file that is none, or knows other structures."""
    library = ctypes.CDLL(path)
    for name, argument_types in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes = argument_types
        function.restype = _RESULTS.get(name)
    sizes = library.ingle_structure_sizes()
    for structure, size in zip(_STRUCTURES, sizes[: len(_STRUCTURES)], strict=True):
        if ctypes.sizeof(structure) != size:
            name, ours = structure.__name__, ctypes.sizeof(structure)
            raise OSError(f"{path}: its structure {name} has {size} bytes, and {ours} were expected")
    return library


def start(num_threads: int, report: compile.Report | None = None) -> str | None:
    """Readies the kernels for this process, to run on so many threads; or says why they cannot be had.

    `report` hears how far it is where they are compiled first. Called again, it adds the threads that are missing.
    """
    global _loaded
    if _loaded is None:
        try:
            _loaded = load(str(compile.library(report=report)))
        except compile.CompileError as error:
            return str(error)
        except OSError as error:
            return f"they do not load: {error}"
    _loaded.ingle_start(num_threads)
    return None


def path() -> Path:
    """Of the started kernels' library."""
    return Path(get()._name)


def forget() -> None:
    """This process does without them, as if they had not been started."""
    global _loaded
    _loaded = None


def settle_memory() -> None:
    """Gives what loading needed back to the system, and from then on keeps what steps need."""
    get().ingle_settle_memory()


def started() -> bool:
    return _loaded is not None


def num_jobs() -> int:
    """Parts of operators that were begun so far: it grows while a long step gets on. From any thread."""
    count: int = get().ingle_num_jobs()
    return count


def instructions() -> str:
    """The instruction set that the started kernels multiply with."""
    name: bytes = get().ingle_instructions()
    return name.decode()


def factors(matrix: Matrix) -> str:
    """What a matrix and activations are multiplied as."""
    name: bytes = get().ingle_factors(ctypes.byref(matrix))
    return name.decode()


def get() -> ctypes.CDLL:
    """The kernels of this process, once `start` has readied them."""
    if _loaded is None:
        raise RuntimeError("the CPU kernels are used before they were started")
    return _loaded
