"""What passes between a layer's operators: rows with a norm that is pending on them, and parameters as operators see
them."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

from ingle.kernels.batch import Batch
from ingle.kernels.coded import Coded
from ingle.kernels.group import Group
from ingle.kernels.options import Activation


class Norm(Protocol):
    """An RMSNorm, as `ingle.kernels.reference.rms_norm` computes it."""

    @property
    def weight(self) -> torch.Tensor:
        """[E]"""
        ...

    @property
    def eps(self) -> float: ...

    @property
    def before(self) -> Matrix | None:
        """What the normed rows are multiplied by, where nothing else takes them: they may come in the form it takes."""
        ...


class Matrix(Protocol):
    """A matrix [O, E], however it is stored."""

    @property
    def plain(self) -> torch.Tensor | None:
        """All of it in one tensor of a float type, where it is held so: what a device's own products may take."""
        ...

    @property
    def coded(self) -> Coded | None:
        """All of it as codes with scales, where it is held so."""
        ...

    @property
    def coded_parts(self) -> tuple[Coded, ...] | None:
        """Its parts one below the other, where all of them are held so."""
        ...

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x @ matrix.T + bias [O]: [.., E] to [.., O] of the same type."""
        ...

    def multiply_gated(self, x: torch.Tensor, bias: torch.Tensor | None, activation: Activation) -> torch.Tensor:
        """`ingle.kernels.reference.gated` of that product: [T, E] to [T, O / 2]."""
        ...


class Projection(Protocol):
    """x @ weight.T + bias."""

    @property
    def weight(self) -> Matrix: ...

    @property
    def bias(self) -> torch.Tensor | None:
        """[O]"""
        ...

    @property
    def group(self) -> Group | None:
        """Ranks with whose products this one has to be added up; None where it is whole."""
        ...


class ExpertBiases(NamedTuple):
    """Of all experts of a layer."""

    gate_up: torch.Tensor
    """[N, 2 * I]"""
    down: torch.Tensor
    """[N, E]"""


class Quantized(NamedTuple):
    """Rows in FP8."""

    values: torch.Tensor
    """float8_e4m3fn [T, E]"""
    scales: torch.Tensor
    """float32 [T, G], of groups of a row's columns, or of all of them; those of a group side by side in memory."""


class Flow(NamedTuple):
    """Rows on their way through the layers, and the norm that the next product takes of them.

    How far that norm is computed is the device's choice, and only its operators look. Each of them uses up the flow
    that it adds to: the residual may be overwritten.
    """

    residual: torch.Tensor
    """[T, E], the sum so far."""
    norm: Norm
    values: torch.Tensor | None = None
    """[T, E]: None where nothing of the norm is computed; the normed rows; or, with `squares`, the residual times the
    norm's weight."""
    squares: torch.Tensor | None = None
    """float32 [T, P]: the sum of a residual's squares, in P pieces."""
    quantized: Quantized | None = None
    """The normed rows as the matrix takes them that the norm stands before, in place of `values`."""


class Rotation(NamedTuple):
    """What becomes of projections: the arguments of `ingle.kernels.reference.rotate_and_store` after the first."""

    num_heads: int
    cos_sin: torch.Tensor
    """float32 [T, R]"""
    q_norm: torch.Tensor | None
    """[D]"""
    k_norm: torch.Tensor | None
    """[D]"""
    eps: float
    """Of those norms."""
    kv_cache: torch.Tensor
    """The layer's."""
    kv_places: torch.Tensor
    """int64 [T]"""
    kv_scales: torch.Tensor | None = None
    """The layer's, where its cache holds codes."""


class LayerCache(NamedTuple):
    """A step, and where one layer has its keys and values."""

    kv_cache: torch.Tensor
    """[sides, num_pages, page_size, heads, dim], as `ingle.kv.KvSpec` has them."""
    batch: Batch
    kv_scales: torch.Tensor | None = None
    """float32 [sides, num_pages, heads, page_size]: of each key and value, where `kv_cache` holds codes."""

    @property
    def kv_places(self) -> torch.Tensor:
        """int64 [T], where this layer writes each token's key and value: page * page_size + offset."""
        return self.batch.kv_places
