"""The operators of a decoder step, one implementation per kind of device.

`of(x)` gives those for tensors like x: Triton kernels (`gpu`), or plain PyTorch (`reference`, which is also what the
others are tested against). The C++ kernels (`cpu`) run whole decoders (`ingle.device.native`); of them PyTorch's models
take attention alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from ingle.kernels.cpu import library
from ingle.kernels.options import Activation, AttentionOptions, RouterConfig

if TYPE_CHECKING:
    import torch

    from ingle.kernels.batch import Batch
    from ingle.kernels.coded import Coded
    from ingle.kernels.flow import ExpertBiases, Flow, Norm, Projection, Rotation
    from ingle.kernels.group import Group, LogitsShare
    from ingle.kernels.sampling import Features, Logprobs, Samples, SamplingTables


class Kernels(Protocol):
    """Shapes and meaning are documented in `ingle.kernels.reference`, `reference_coded`, `reference_kv`,
    `reference_latent` and `reference_sampling`.

    A decoder layer is four operators over a `Flow`, each with what a device can fuse to a matrix product:

        q = project_and_store(flow, qkv, rotation)            norm, project, rotate, write keys and values
        attended = paged_attention(q, ...)
        flow = project_and_add(attended, out, flow, norm)     project, add, begin the next norm
        flow = gated_mlp(flow, gate_up, down, activation, next_norm)    norm, gated product, project, add, next norm

    What stands between them takes `normed` rows and gives back by `add`. The plain operators below them are what the
    reference composes them of, and what parts of a layer with a shape of their own use.
    """

    def normed(self, flow: Flow) -> torch.Tensor: ...

    def project_and_store(self, flow: Flow, projection: Projection, rotation: Rotation) -> torch.Tensor: ...

    def paged_attention(
        self,
        q: torch.Tensor,
        kv_cache: torch.Tensor,
        batch: Batch,
        options: AttentionOptions,
        kv_scales: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor: ...

    def project_gated(self, flow: Flow, projection: Projection, activation: Activation) -> torch.Tensor: ...

    def project_and_add(
        self, x: torch.Tensor, projection: Projection, flow: Flow, norm: Norm, post_norm: Norm | None = None
    ) -> Flow: ...

    def gated_mlp(
        self,
        flow: Flow,
        gate_up: Projection,
        down: Projection,
        activation: Activation,
        norm: Norm,
        post_norm: Norm | None = None,
    ) -> Flow: ...

    def add(
        self, x: torch.Tensor, flow: Flow, norm: Norm, post_norm: Norm | None = None, group: Group | None = None
    ) -> Flow: ...

    def locate(
        self,
        slots: torch.Tensor,
        positions: torch.Tensor,
        token_table: torch.Tensor,
        page_tables: torch.Tensor,
        page_size: int,
    ) -> tuple[torch.Tensor, torch.Tensor]: ...

    def keep(
        self, token_ids: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor, token_table: torch.Tensor
    ) -> None: ...

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor: ...

    def add_rms_norm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        post_weight: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]: ...

    def soft_cap(self, x: torch.Tensor, cap: float) -> torch.Tensor: ...

    def gated(self, gate_up: torch.Tensor, activation: Activation) -> torch.Tensor: ...

    def multiply(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor: ...

    def multiply_coded(self, x: torch.Tensor, coded: Coded, bias: torch.Tensor | None) -> torch.Tensor: ...

    def multiply_gated(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: Activation
    ) -> torch.Tensor: ...

    def route(
        self, logits: torch.Tensor, selection_bias: torch.Tensor | None, config: RouterConfig
    ) -> tuple[torch.Tensor, torch.Tensor]: ...

    def experts(
        self,
        x: torch.Tensor,
        expert_ids: torch.Tensor,
        weights: torch.Tensor,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        activation: Activation,
        biases: ExpertBiases | None = None,
    ) -> torch.Tensor: ...

    def experts_coded(
        self,
        x: torch.Tensor,
        expert_ids: torch.Tensor,
        weights: torch.Tensor,
        gate_up: Sequence[Coded],
        down: Coded,
        activation: Activation,
        biases: ExpertBiases | None = None,
    ) -> torch.Tensor: ...

    def rotate_and_store(
        self,
        qkv: torch.Tensor,
        num_heads: int,
        cos_sin: torch.Tensor,
        q_norm: torch.Tensor | None,
        k_norm: torch.Tensor | None,
        eps: float,
        kv_cache: torch.Tensor,
        kv_places: torch.Tensor,
        kv_scales: torch.Tensor | None = None,
    ) -> torch.Tensor: ...

    def store_latent(
        self,
        down: torch.Tensor,
        q_rope: torch.Tensor,
        norm: torch.Tensor,
        eps: float,
        cos_sin: torch.Tensor,
        cache: torch.Tensor,
        kv_places: torch.Tensor,
        *,
        interleaved: bool,
    ) -> torch.Tensor: ...

    def latent_attention(
        self, q_latent: torch.Tensor, q_rope: torch.Tensor, cache: torch.Tensor, batch: Batch, scale: float
    ) -> torch.Tensor: ...

    def sample(
        self,
        logits: torch.Tensor,
        slots: torch.Tensor,
        positions: torch.Tensor,
        tables: SamplingTables,
        features: Features,
    ) -> Samples: ...

    def sample_share(
        self,
        share: LogitsShare,
        slots: torch.Tensor,
        positions: torch.Tensor,
        tables: SamplingTables,
        features: Features,
    ) -> Samples: ...

    def logprobs(self, logits: torch.Tensor, token_ids: torch.Tensor, num_alternatives: int) -> Logprobs: ...


_with_triton = True


def use_triton(wanted: bool) -> None:
    """Whether this process runs Triton's kernels on a GPU, or the reference, which needs PyTorch alone."""
    global _with_triton
    _with_triton = wanted


def of(x: torch.Tensor) -> Kernels:
    """The kernels for tensors like x."""
    if x.is_cuda and _with_triton:
        from ingle.kernels import gpu  # Triton comes with PyTorch's CUDA builds only

        return gpu
    from ingle.kernels import reference

    return reference


def paged_attention(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    batch: Batch,
    options: AttentionOptions,
    kv_scales: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """`Kernels.paged_attention` of a model that is transformers' code: by the C++ kernels where they can."""
    import torch

    if not q.is_cuda and q.dtype == torch.float32 and library.started():
        from ingle.kernels.cpu import attention

        return attention.paged_attention(q, kv_cache, batch, options, kv_scales, sinks)
    return of(q).paged_attention(q, kv_cache, batch, options, kv_scales, sinks)
