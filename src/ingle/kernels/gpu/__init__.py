"""Triton kernels for NVIDIA GPUs; the functions are those of `ingle.kernels.reference`."""

from ingle.kernels.gpu.attention import paged_attention
from ingle.kernels.gpu.elementwise import add_rms_norm, rms_norm, rotate_and_store, silu_mul
from ingle.kernels.gpu.sampling import sample

__all__ = ["add_rms_norm", "paged_attention", "rms_norm", "rotate_and_store", "sample", "silu_mul"]
