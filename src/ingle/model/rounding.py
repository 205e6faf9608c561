"""What of a model of floats is rounded to codes when somebody asks for that: the matrices of its layers.

Embedding, output head, norms, routers and biases stay what they are, and so does the matrix of latent attention that is
taken apart when it is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from ingle.errors import ConfigError
from ingle.model.architecture import DecoderConfig, MlaConfig, MoeConfig
from ingle.model.mixture_names import mixture_names
from ingle.weights.quantized.rounding import ScaleType
from ingle.weights.quantized.rounding_source import RoundingPlan
from ingle.weights.quantized.scheme import Scheme, Target
from ingle.weights.source import WeightSource

TARGETS: dict[Target, Scheme] = {
    "int4": Scheme("packed", 4, group_size=128, has_zeros=True),
    "int8": Scheme("packed", 8, group_size=128),
    "fp8": Scheme("whole", 8, is_float=True, quantizes_inputs=True),
}
"""What a model may be rounded to, as it is unless somebody says more."""
GROUP_SIZES = (128, 64, 32, 16)
Matrices = Iterator[tuple[str, int, int]]
"""Names, and rows and columns."""


def plan_rounding(decoder: DecoderConfig, source: WeightSource, scheme: Scheme) -> RoundingPlan:
    """For a decoder that is as `checkpoint.as_stored` says.

    Groups become smaller where they would not divide the columns of all matrices, which other engines ask for, too.
    Raises `ConfigError` where no size does.
    """
    shapes = {name: (rows, columns) for name, rows, columns in rounded_matrices(decoder, source)}
    widths, notices = sorted({columns for _, columns in shapes.values()}), []
    if scheme.group_size is not None:
        size = _dividing(scheme.group_size, widths)
        if size != scheme.group_size:
            odd = next(width for width in widths if width % scheme.group_size)
            notices.append(f"groups of {scheme.group_size} weights -> {size}: {odd} columns do not divide by it")
        scheme = replace(scheme, group_size=size)
    kinds = source.stored_types
    scale_type: ScaleType = "BF16" if next(iter(kinds), "BF16") == "BF16" else "F16"
    return RoundingPlan(scheme, scale_type, shapes, tuple(notices))


def _dividing(size: int, widths: Sequence[int]) -> int:
    fitting = [each for each in (size, *GROUP_SIZES) if each <= size and not any(width % each for width in widths)]
    if not fitting:
        odd = next(width for width in widths if width % GROUP_SIZES[-1])
        raise ConfigError(
            f"the model has matrices of {odd} columns, which no group of {GROUP_SIZES[-1]} weights or more divides",
            alternative="round it to fp8, which has a scale for each row",
        )
    return fitting[0]


def rounded_matrices(config: DecoderConfig, source: WeightSource) -> Matrices:
    """By the names that `source` has where it may have several."""
    for index in range(config.num_layers):
        yield from _layer(config, source, index)


def _layer(config: DecoderConfig, source: WeightSource, index: int) -> Matrices:
    names, prefix, hidden = config.names, f"{config.names.layers}.{index}", config.hidden_size
    if config.mla is not None:
        yield from _latent_attention(config, config.mla, prefix)
    else:
        yield from _linear(prefix, names.qkv, [config.q_size, config.kv_size, config.kv_size], hidden)
    yield from _linear(prefix, (names.attention_out,), [hidden], config.attended_size)
    if config.moe is not None and index in config.moe.layers:
        yield from _mixture(config.moe, source, prefix, hidden)
        return
    inner = config.intermediate_size
    yield from _linear(prefix, names.gate_up, [inner, inner], hidden)
    yield from _linear(prefix, (names.mlp_down,), [hidden], inner)


def _linear(prefix: str, modules: Sequence[str], num_rows: Sequence[int], columns: int) -> Matrices:
    """One matrix product for several modules; a single one has all the rows."""
    for module, rows in zip(modules, num_rows if len(modules) > 1 else [sum(num_rows)], strict=True):
        yield f"{prefix}.{module}.weight", rows, columns


def _latent_attention(config: DecoderConfig, mla: MlaConfig, prefix: str) -> Matrices:
    hidden, q_rank, attention = config.hidden_size, mla.q_lora_rank, f"{prefix}.self_attn"
    if q_rank is not None:
        yield f"{attention}.q_a_proj.weight", q_rank, hidden
    yield f"{attention}.{'q_proj' if q_rank is None else 'q_b_proj'}.weight", config.q_size, q_rank or hidden
    yield f"{attention}.kv_a_proj_with_mqa.weight", mla.kv_lora_rank + mla.qk_rope_head_dim, hidden


def _mixture(moe: MoeConfig, source: WeightSource, prefix: str, hidden: int) -> Matrices:
    names = mixture_names(source, moe, prefix)
    shared = [(names.shared, moe.shared_intermediate_size)] if moe.shared_intermediate_size else []
    for expert, inner in [*((expert, moe.intermediate_size) for expert in names.experts), *shared]:
        for name in expert.gate_up:
            yield name, 2 * inner // len(expert.gate_up), hidden
        yield expert.down, hidden, inner
