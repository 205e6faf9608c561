"""Every operator of a decoder step in plain PyTorch: what runs on a CPU, and what GPU kernels are tested against.

Shapes: T tokens in a step, B sequences, Hq query heads, Hkv key/value heads, D head dimension, E hidden size.
A layer's KV cache is [2, num_pages, page_size, Hkv, D]: keys, then values; in what order they lie in memory is open.
With scales [2, num_pages, Hkv, page_size] it holds codes, as `ingle.kernels.reference_kv` says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ingle.kernels import reference_kv
from ingle.kernels.batch import Batch
from ingle.kernels.coded import Coded
from ingle.kernels.flow import ExpertBiases, Flow, Norm, Projection, Rotation
from ingle.kernels.group import Group
from ingle.kernels.options import SWIGLU_ALPHA, SWIGLU_LIMIT, Activation, AttentionOptions, RouterConfig
from ingle.kernels.reference_coded import multiply_coded as multiply_coded
from ingle.kernels.reference_latent import latent_attention as latent_attention
from ingle.kernels.reference_latent import store_latent as store_latent
from ingle.kernels.reference_sampling import logprobs as logprobs
from ingle.kernels.reference_sampling import sample as sample
from ingle.kernels.reference_sampling import sample_share as sample_share


def locate(
    slots: torch.Tensor, positions: torch.Tensor, token_table: torch.Tensor, page_tables: torch.Tensor, page_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """For slots and positions, int64 [T]: the token there, and where its key and value lie, page * page_size + offset.

    token_table: int32 [S, L]; page_tables: int32 [G, S, P], of each group of layers. Tokens int64 [T], places [G, T].
    """
    pages = page_tables[:, slots, positions // page_size].long()
    return token_table[slots, positions].long(), pages * page_size + positions % page_size


def keep(token_ids: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor, token_table: torch.Tensor) -> None:
    """Writes tokens, int64 [R], where `locate` finds them."""
    token_table[slots, positions] = token_ids.int()


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) * weight over the last dimension (https://arxiv.org/abs/1910.07467): [.., E] to x's type.

    The quotient is computed in float32 and rounded to the type of the weight [E], in which the product is taken: that
    of x, or float32, after which it is rounded once.
    """
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed.to(weight.dtype) * weight).to(x.dtype)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, post_weight: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of x + residual, and that sum: both [T, E]. `residual` may be overwritten by the sum.

    With `post_weight` [E], x is replaced by its own norm first.
    """
    residual = residual + (x if post_weight is None else rms_norm(x, post_weight, eps))
    return rms_norm(residual, weight, eps), residual


def soft_cap(x: torch.Tensor, cap: float) -> torch.Tensor:
    """cap * tanh(x / cap), contiguous."""
    return torch.tanh(x / cap) * cap


def gated(gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
    """activation(gate) * up for [T, 2 * I] with the gate in the first half: [T, I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    if activation == "swiglu_clamped":
        gate, up = gate.clamp(max=SWIGLU_LIMIT), up.clamp(-SWIGLU_LIMIT, SWIGLU_LIMIT)
        return gate * torch.sigmoid(SWIGLU_ALPHA * gate) * (up + 1)
    return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up


def multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x @ weight.T + bias: x [.., E] and weight [O, E] to [.., O]."""
    return F.linear(x, weight, bias)


def multiply_gated(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: Activation
) -> torch.Tensor:
    """`gated` of x @ weight.T + bias: x [T, E] and weight [2 * I, E] to [T, I]."""
    return gated(F.linear(x, weight, bias), activation)


def route(
    logits: torch.Tensor, selection_bias: torch.Tensor | None, config: RouterConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts of each token and their weights: int32 and float32 [T, K] for logits [T, N] of any float type.

    selection_bias: float32 [N]. Which K experts of a row are taken, and in what order, is open where scores are equal.
    Groups as in DeepSeek-V2 and V3 (https://arxiv.org/abs/2405.04434, https://arxiv.org/abs/2412.19437).
    """
    wide = logits.float()
    scores = wide.sigmoid() if config.scoring == "sigmoid" else wide.softmax(dim=-1)
    choice = scores if selection_bias is None else scores + selection_bias
    if config.num_groups > 1:
        groups = choice.view(len(choice), config.num_groups, -1)
        best = groups.topk(config.group_experts, dim=-1).values.sum(dim=-1).topk(config.topk_group, dim=-1).indices
        excluded = torch.ones_like(groups[..., 0], dtype=torch.bool).scatter_(1, best, False)
        choice = groups.masked_fill(excluded[..., None], float("-inf")).view_as(choice)
    expert_ids = choice.topk(config.top_k, dim=-1).indices
    weights = scores.gather(1, expert_ids)
    if config.norm_topk_prob:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)  # sigmoids may all be 0
    return expert_ids.int(), weights * config.routed_scaling_factor


def experts(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    activation: Activation,
    biases: ExpertBiases | None = None,
) -> torch.Tensor:
    """The weighted sum of what a token's experts give, each a gated MLP: x [T, E] to [T, E].

    expert_ids, weights: [T, K]. gate_up: [N, 2 * I, E], an expert's gate in the first I rows. down: [N, E, I].
    """

    def run(x: torch.Tensor, expert: int) -> torch.Tensor:
        both, last = (None, None) if biases is None else (biases.gate_up[expert], biases.down[expert])
        return F.linear(gated(F.linear(x, gate_up[expert], both), activation), down[expert], last)

    return _by_expert(x, expert_ids, weights, len(down), run)


def experts_coded(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    weights: torch.Tensor,
    gate_up: Sequence[Coded],
    down: Coded,
    activation: Activation,
    biases: ExpertBiases | None = None,
) -> torch.Tensor:
    """`experts` of codes: rows [N * E] of down are those of all experts, and so are [N * 2 * I] of gate_up; or [N * I]
    of two matrices, the gates and the up projections."""
    num_experts = down.num_rows // x.shape[1]

    def multiply(x: torch.Tensor, coded: Coded, expert: int) -> torch.Tensor:
        size = coded.num_rows // num_experts
        rows = slice(expert * size, (expert + 1) * size)
        ordered = x if coded.order is None else x[:, coded.order[expert]]
        return F.linear(ordered, coded.decoded(rows, x.dtype))

    def run(x: torch.Tensor, expert: int) -> torch.Tensor:
        both = torch.cat([multiply(x, coded, expert) for coded in gate_up], 1)
        if biases is None:
            return multiply(gated(both, activation), down, expert)
        return multiply(gated(both + biases.gate_up[expert], activation), down, expert) + biases.down[expert]

    return _by_expert(x, expert_ids, weights, num_experts, run)


def _by_expert(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    weights: torch.Tensor,
    num_experts: int,
    run: Callable[[torch.Tensor, int], torch.Tensor],
) -> torch.Tensor:
    top_k = expert_ids.shape[1]
    order = expert_ids.flatten().argsort(stable=True)
    counts = expert_ids.flatten().bincount(minlength=num_experts).tolist()
    given = x.new_empty(len(order), x.shape[1])
    for expert, rows in enumerate(order.split_with_sizes(counts)):
        if len(rows):
            given[rows] = run(x[rows // top_k], expert)
    return (given.view(*expert_ids.shape, -1) * weights[..., None]).sum(dim=1).to(x.dtype)


def rotate(x: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    """Rotates the first R dimensions of each head of x [T, H, D] by the angles of cos_sin [T, R]."""
    half = cos_sin.shape[-1] // 2
    cos, sin = cos_sin[:, None, :half].to(x.dtype), cos_sin[:, None, half:].to(x.dtype)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


def rotate_and_store(
    qkv: torch.Tensor,
    num_heads: int,
    cos_sin: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
    kv_cache: torch.Tensor,
    kv_places: torch.Tensor,
    kv_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """Norms (if given weights [D]) and rotates the queries and keys in qkv [T, (Hq + 2 Hkv) * D]; returns q [T, Hq, D].

    Writes keys and values to the places kv_places [T] of a layer's cache, encoded where it has scales.
    """
    num_kv_heads, head_dim = kv_cache.shape[-2:]
    heads = qkv.view(qkv.shape[0], -1, head_dim)
    q, k, v = heads.split_with_sizes((num_heads, num_kv_heads, num_kv_heads), dim=1)
    if q_norm is not None and k_norm is not None:
        q, k = rms_norm(q, q_norm, eps), rms_norm(k, k_norm, eps)
    reference_kv.store(rotate(k, cos_sin), v, kv_cache, kv_scales, kv_places)
    return rotate(q, cos_sin)


@dataclass(frozen=True)
class Composed:
    """A layer's operators, composed of plain ones: what a device has where it fuses nothing."""

    rms_norm: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
    add_rms_norm: Callable[
        [torch.Tensor, torch.Tensor, torch.Tensor, float, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor]
    ]
    rotate_and_store: Callable[..., torch.Tensor]

    def normed(self, flow: Flow) -> torch.Tensor:
        """The rows with their norm, [T, E]: for what is no product, or one of a shape of its own."""
        if flow.squares is None and flow.values is not None:
            return flow.values
        return self.rms_norm(flow.residual, flow.norm.weight, flow.norm.eps)

    def project_and_store(self, flow: Flow, projection: Projection, rotation: Rotation) -> torch.Tensor:
        """Norm, project, rotate, store: the queries [T, Hq, D]; keys and values go to the layer's cache.

        The projection is to (Hq + 2 Hkv) * D: queries, keys, values, of which `rotate_and_store` makes the rest.
        """
        return self.rotate_and_store(projection.weight.multiply(self.normed(flow), projection.bias), *rotation)

    def project_gated(self, flow: Flow, projection: Projection, activation: Activation) -> torch.Tensor:
        """Norm, project to [T, 2 * I] with the gate in the first half, and activation(gate) * up: [T, I]."""
        return projection.weight.multiply_gated(self.normed(flow), projection.bias, activation)

    def project_and_add(
        self, x: torch.Tensor, projection: Projection, flow: Flow, norm: Norm, post_norm: Norm | None = None
    ) -> Flow:
        """`add` of the projection of x [T, K] to [T, E], or of the sum of those of all ranks."""
        return self.add(projection.weight.multiply(x, projection.bias), flow, norm, post_norm, projection.group)

    def gated_mlp(
        self,
        flow: Flow,
        gate_up: Projection,
        down: Projection,
        activation: Activation,
        norm: Norm,
        post_norm: Norm | None = None,
    ) -> Flow:
        """`project_gated`, then `project_and_add` of that."""
        return self.project_and_add(self.project_gated(flow, gate_up, activation), down, flow, norm, post_norm)

    def add(
        self, x: torch.Tensor, flow: Flow, norm: Norm, post_norm: Norm | None = None, group: Group | None = None
    ) -> Flow:
        """The flow with x [T, E] added, or the sum of those of a group's ranks, on its way to `norm`; with `post_norm`,
        of equal eps, what is added is normed first."""
        if group is not None:
            x = group.all_reduce(x)
        post_weight = None if post_norm is None else post_norm.weight
        values, residual = self.add_rms_norm(x, flow.residual, norm.weight, norm.eps, post_weight)
        return Flow(residual, norm, values)


composed = Composed(rms_norm, add_rms_norm, rotate_and_store)
normed, project_and_store, project_gated = composed.normed, composed.project_and_store, composed.project_gated
project_and_add, gated_mlp, add = composed.project_and_add, composed.gated_mlp, composed.add


def paged_attention(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    batch: Batch,
    options: AttentionOptions,
    kv_scales: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of each token to the cached keys of its own sequence: q [T, Hq, D] to [T, Hq, D].

    sinks: float32 [Hq], of each head the score of one more key, whose value is zero (https://arxiv.org/abs/2309.17453).
    """
    out = torch.empty_like(q)
    n = batch.num_decodes
    if n:
        page_tables, lengths = batch.page_tables[batch.inputs.slots[:n]], batch.inputs.kv_lengths[:n]
        out[:n] = _attend_decodes(q[:n], kv_cache, kv_scales, page_tables, lengths, options, sinks)
    row = n
    for chunk in batch.chunks[n:]:
        rows = slice(row, row + chunk.count)
        table = batch.page_tables[chunk.slot]
        out[rows] = _attend_chunk(q[rows], kv_cache, kv_scales, table, chunk.start, options, sinks)
        row += chunk.count
    return out


def _attend_decodes(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    kv_scales: torch.Tensor | None,
    page_tables: torch.Tensor,
    kv_lengths: torch.Tensor,
    options: AttentionOptions,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """One token a sequence, all sequences at once, padded to the longest: q [B, Hq, D] to [B, Hq, D]."""
    num_seqs, num_heads, head_dim = q.shape
    page_size, num_kv_heads = kv_cache.shape[2:4]
    if options.window is None:
        num_pages = -(-int(kv_lengths.max()) // page_size)
        places = torch.arange(num_pages * page_size, device=q.device)
        mask = places < kv_lengths[:, None]
    else:  # of each sequence just the pages that the window touches
        first_keys = (kv_lengths - options.window).clamp(min=0)
        first_pages = first_keys // page_size
        num_pages = int((-(-kv_lengths // page_size) - first_pages).max())
        pages = first_pages[:, None] + torch.arange(num_pages, device=q.device)
        page_tables = page_tables.gather(1, pages.clamp(max=page_tables.shape[1] - 1))
        places = first_pages[:, None] * page_size + torch.arange(num_pages * page_size, device=q.device)
        mask = (places < kv_lengths[:, None]) & (places >= first_keys[:, None])
    held = reference_kv.read(kv_cache, kv_scales, page_tables[:, :num_pages], q.dtype)
    k, v = held.flatten(2, 3).transpose(2, 3)  # [B, Hkv, P * page_size, D]
    grouped = q.view(num_seqs, num_kv_heads, num_heads // num_kv_heads, head_dim)
    sinks = None if sinks is None else sinks.view(num_kv_heads, 1, -1)
    return _attend(grouped, k, v, mask[:, None, None, :], options, sinks).reshape(q.shape)


def _attend_chunk(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    kv_scales: torch.Tensor | None,
    page_table: torch.Tensor,
    start: int,
    options: AttentionOptions,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Tokens [start, start + n) of one sequence: q [n, Hq, D] to [n, Hq, D]."""
    end, page_size = start + q.shape[0], kv_cache.shape[2]
    first_page = 0 if options.window is None else max(start + 1 - options.window, 0) // page_size
    first_key = first_page * page_size
    pages = page_table[first_page : -(-end // page_size)]
    held = reference_kv.read(kv_cache, kv_scales, pages, q.dtype)
    k, v = held.flatten(1, 2)[:, : end - first_key].transpose(1, 2)[:, None]  # [1, Hkv, keys, D]
    mask = None  # causal
    if (
        start
        or sinks is not None
        or options.softcap is not None
        or (options.window is not None and options.window < end)
    ):
        mask = torch.ones(q.shape[0], end - first_key, dtype=torch.bool, device=q.device).tril(start - first_key)
        if options.window is not None:
            mask = mask.triu(start - first_key + 1 - options.window)
        mask = mask[None, None]
    sinks = None if sinks is None else sinks.view(kv_cache.shape[3], -1, 1)
    return _attend(q.transpose(0, 1)[None], k, v, mask, options, sinks)[0].transpose(0, 1)


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    options: AttentionOptions,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention of q [B, Hq, n, D] to k and v [B, Hkv, m, D], each head of which serves Hq / Hkv neighbours of q.

    mask: bool [B or 1, 1, n or 1, m], true for keys that are seen; without one attention is causal. sinks:
    [Hkv, Hq / Hkv or 1, n or 1].
    """
    if options.softcap is None and sinks is None:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=options.scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    assert mask is not None
    grouped = q.view(q.shape[0], k.shape[1], -1, *q.shape[2:])  # [B, Hkv, group, n, D]
    scores = (grouped @ k[:, :, None].transpose(-1, -2)).float() * options.scale
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    scores = scores.masked_fill(~mask[:, :, None], float("-inf"))
    if sinks is not None:
        scores = torch.cat((scores, sinks[..., None].expand(*scores.shape[:-1], 1)), -1)
    weights = scores.softmax(-1)[..., : k.shape[2]].to(q.dtype)
    return (weights @ v[:, :, None]).flatten(1, 2)
