"""Triton kernels for NVIDIA GPUs; the functions are those of `ingle.kernels.reference`."""

from ingle.kernels.gpu.attention import paged_attention
from ingle.kernels.gpu.coded import multiply_coded
from ingle.kernels.gpu.elementwise import add_rms_norm, gated, keep, locate, rms_norm, rotate_and_store, soft_cap
from ingle.kernels.gpu.latent import latent_attention, store_latent
from ingle.kernels.gpu.layer import add, gated_mlp, normed, project_and_add, project_and_store, project_gated
from ingle.kernels.gpu.logprobs import logprobs
from ingle.kernels.gpu.moe import experts, route
from ingle.kernels.gpu.moe_coded import experts_coded
from ingle.kernels.gpu.products import multiply, multiply_gated
from ingle.kernels.gpu.sampling import sample
from ingle.kernels.gpu.sampling_shares import sample_share

__all__ = [
    "add",
    "add_rms_norm",
    "experts",
    "experts_coded",
    "gated",
    "gated_mlp",
    "keep",
    "latent_attention",
    "locate",
    "logprobs",
    "multiply",
    "multiply_coded",
    "multiply_gated",
    "normed",
    "paged_attention",
    "project_and_add",
    "project_and_store",
    "project_gated",
    "rms_norm",
    "rotate_and_store",
    "route",
    "sample",
    "sample_share",
    "soft_cap",
    "store_latent",
]
