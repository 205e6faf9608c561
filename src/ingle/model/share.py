"""A decoder divided among the ranks of a tensor-parallel group (https://arxiv.org/abs/1909.08053).

What a rank has is a decoder of its own with fewer heads, narrower MLPs and a part of the vocabulary, and `cuts` says
which part of each tensor that is. What does not divide is padded with zeros, where that is little.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ingle.errors import ConfigError
from ingle.model.architecture import DecoderConfig, MlaConfig, MoeConfig
from ingle.model.mixture_names import bias_of, mixture_names
from ingle.weights.cut import Cut, Range
from ingle.weights.source import WeightSource, split_name

MAX_SIZE = 64
_CHEAP = 1 / 16
"""Share of a dimension that may be padding for the sake of how its columns are stored."""
_MOST = 1 / 3
"""The same for the sake of its being divided at all."""


@dataclass(frozen=True)
class _Split:
    """A dimension of `whole` numbers, of which each rank has `each`; the last ones have fewer, and zeros behind."""

    whole: int
    each: int

    def at(self, place: int) -> Range:
        start = min(place * self.each, self.whole)
        return Range(start, min(start + self.each, self.whole), self.each)


@dataclass(frozen=True)
class _Heads:
    """Query heads with the key-value head that they share.

    Where there are fewer of those than ranks, several ranks hold one, each with some of its query heads.
    """

    per_kv: int
    """Query heads of a key-value head."""
    kv: int
    """Key-value heads."""
    each_kv: int
    """Of a rank."""
    each: int
    """Query heads of a rank."""
    sharers: int
    """Ranks that hold a key-value head."""

    def kv_at(self, place: int) -> Range:
        return _Split(self.kv, self.each_kv).at(place // self.sharers)

    def at(self, place: int) -> Range:
        if self.sharers == 1:
            kv = self.kv_at(place)
            return Range(kv.start * self.per_kv, kv.stop * self.per_kv, self.each)
        own = _Split(self.per_kv, self.each).at(place % self.sharers)
        before = place // self.sharers * self.per_kv
        return Range(before + own.start, before + own.stop, self.each)


@dataclass(frozen=True)
class Division:
    """How a decoder's dimensions are divided among `size` ranks."""

    config: DecoderConfig
    size: int
    heads: _Heads
    vocabulary: _Split
    intermediate: _Split
    expert: _Split
    shared: _Split

    @classmethod
    def of(cls, config: DecoderConfig, size: int, source: WeightSource | None = None) -> Division:
        """With a `source`, such that its columns are cut where that takes nothing. Raises `ConfigError` with the sizes
        that work."""
        why = refusal(config, size)
        if why is not None:
            sizes = ", ".join(map(str, sizes_for(config, MAX_SIZE)))
            raise ConfigError(f"--tensor-parallel-size {size}: {why}", alternative=f"these sizes divide it: {sizes}")
        moe, units = config.moe, _units(config, source)
        return cls(
            config,
            size,
            _heads(config, size),
            _split(config.vocab_size, size),
            _split(config.intermediate_size, size, units.dense),
            _split(0 if moe is None else moe.intermediate_size, size, units.expert),
            _split(0 if moe is None else moe.shared_intermediate_size, size, units.shared),
        )

    @property
    def share(self) -> DecoderConfig:
        """What each rank has."""
        moe = self.config.moe
        if moe is not None:
            moe = replace(moe, intermediate_size=self.expert.each, shared_intermediate_size=self.shared.each)
        return replace(
            self.config,
            num_heads=self.heads.each,
            num_kv_heads=self.heads.each_kv,
            intermediate_size=self.intermediate.each,
            moe=moe,
            vocab_rows=self.vocabulary.each,
        )

    def cuts(self, source: WeightSource, place: int) -> dict[str, Cut]:
        """By name as `source` has it, the part of each tensor that a rank has; of those that are not among them all."""
        return dict(_cuts(self, source, place))


def refusal(config: DecoderConfig, size: int) -> str | None:
    """Why a decoder cannot be divided so; None where it can."""
    if size == 1:
        return None
    if size > MAX_SIZE:
        return f"{MAX_SIZE} ranks are the most that share a matrix"
    if config.mla is None and config.num_kv_heads < size and size % config.num_kv_heads:
        return f"{config.num_kv_heads} key-value heads and {size} ranks do not divide one another"
    heads = _heads(config, size)
    dimensions = {f"{config.num_heads} heads": (heads.each, config.num_heads)}
    if heads.sharers > 1:
        dimensions = {f"{heads.per_kv} query heads of a key-value head": (heads.each, heads.per_kv)}
    for width in _widths(config):
        dimensions[f"{width} columns of the MLP"] = (_split(width, size).each, width)
    dimensions[f"{config.vocab_size} tokens"] = (_split(config.vocab_size, size).each, config.vocab_size)
    for what, (each, whole) in dimensions.items():
        count = heads.sharers if what.endswith("a key-value head") else size
        if each * (count - 1) >= whole or each * count > whole * (1 + _MOST):
            return f"{what} cannot be divided among {count} ranks"
    return None


def sizes_for(config: DecoderConfig, most: int) -> list[int]:
    """All that it can be divided among."""
    return [size for size in range(1, most + 1) if refusal(config, size) is None]


def _widths(config: DecoderConfig) -> Iterator[int]:
    moe = config.moe
    if moe is None or len(moe.layers) < config.num_layers:
        yield config.intermediate_size
    if moe is not None:
        yield moe.intermediate_size
        if moe.shared_intermediate_size:
            yield moe.shared_intermediate_size


def _heads(config: DecoderConfig, size: int) -> _Heads:
    if config.mla is not None:  # whose heads share one latent, which every rank has
        each = -(-config.num_heads // size)
        return _Heads(1, config.num_heads, each, each, 1)
    kv, per_kv = config.num_kv_heads, config.num_heads // config.num_kv_heads
    if kv >= size:
        each_kv = -(-kv // size)
        return _Heads(per_kv, kv, each_kv, each_kv * per_kv, 1)
    sharers = size // kv
    return _Heads(per_kv, kv, 1, -(-per_kv // sharers), sharers)


def _split(whole: int, size: int, unit: int = 1) -> _Split:
    """In multiples of `unit`, or of a divisor of it, as far as that takes little padding."""
    if whole % (size * unit) == 0:
        return _Split(whole, whole // size)
    while unit > 1:
        each = -(-whole // (size * unit)) * unit
        if each * size <= whole * (1 + _CHEAP) and each * (size - 1) < whole:
            return _Split(whole, each)
        unit //= 2
    least = -(-whole // size)
    if whole % size:
        for aligned in (64, 16, 8, 2):
            each = -(-least // aligned) * aligned
            if each * size <= whole * (1 + _CHEAP) and each * (size - 1) < whole:
                return _Split(whole, each)
    return _Split(whole, least)


@dataclass(frozen=True)
class _Units:
    """How many columns of a matrix are stored together."""

    dense: int = 1
    expert: int = 1
    shared: int = 1


def _units(config: DecoderConfig, source: WeightSource | None) -> _Units:
    """Of the first layers that have such a matrix."""
    if source is None or not source.stored_types:
        return _Units()

    def unit(name: str) -> int:
        return source.columns_unit(name) if name in source else 1

    moe, names = config.moe, config.names
    sparse = frozenset() if moe is None else moe.layers
    dense_layer = next((layer for layer in range(config.num_layers) if layer not in sparse), None)
    dense = 1 if dense_layer is None else unit(f"{names.layers}.{dense_layer}.{names.mlp_down}.weight")
    if moe is None:
        return _Units(dense)
    found = mixture_names(source, moe, f"{names.layers}.{min(moe.layers)}")
    return _Units(dense, unit(found.experts[0].down), unit(found.shared.down))


# ---- which part of each tensor


_Cuts = Iterator[tuple[str, Cut]]


def _cuts(division: Division, source: WeightSource, place: int) -> _Cuts:
    config, names = division.config, division.config.names
    hidden, vocabulary = config.hidden_size, division.vocabulary.at(place)
    for name in (names.embedding, names.lm_head):
        yield f"{name}.weight", Cut((config.vocab_size, hidden), (vocabulary,))
    for layer in range(config.num_layers):
        prefix = f"{names.layers}.{layer}"
        if config.mla is not None:
            yield from _latent_attention(division, config.mla, prefix, place)
        else:
            yield from _attention(division, prefix, place)
        if config.moe is not None and layer in config.moe.layers:
            yield from _mixture(division, config.moe, source, prefix, place)
        else:
            gate_up = [f"{prefix}.{name}" for name in names.gate_up]
            yield from _gated_mlp(gate_up, f"{prefix}.{names.mlp_down}", hidden, division.intermediate, place)


def _attention(division: Division, prefix: str, place: int) -> _Cuts:
    config, heads = division.config, division.heads
    names, dim = config.names, config.head_dim
    queries, keys = _times(heads.at(place), dim), _times(heads.kv_at(place), dim)
    yield from _linears(
        [f"{prefix}.{name}" for name in names.qkv],
        [config.q_size, config.kv_size, config.kv_size],
        [queries, keys, keys],
        config.hidden_size,
    )
    yield f"{prefix}.{names.attention_out}.weight", _columns(config.hidden_size, config.q_size, queries)
    yield f"{prefix}.{names.sinks}", Cut((config.num_heads,), (heads.at(place),))


def _latent_attention(division: Division, mla: MlaConfig, prefix: str, place: int) -> _Cuts:
    config, heads = division.config, division.heads.at(place)
    prefix = f"{prefix}.self_attn"
    queries = "q_proj" if mla.q_lora_rank is None else "q_b_proj"
    up = mla.qk_nope_head_dim + mla.v_head_dim
    for name, size, columns in (
        (queries, mla.qk_head_dim, mla.q_lora_rank or config.hidden_size),
        ("kv_b_proj", up, mla.kv_lora_rank),
    ):
        yield f"{prefix}.{name}.weight", Cut((config.num_heads * size, columns), (_times(heads, size),))
    values = _times(heads, mla.v_head_dim)
    yield f"{prefix}.o_proj.weight", _columns(config.hidden_size, config.num_heads * mla.v_head_dim, values)


def _mixture(division: Division, moe: MoeConfig, source: WeightSource, prefix: str, place: int) -> _Cuts:
    names, hidden = mixture_names(source, moe, prefix), division.config.hidden_size
    for expert in names.experts:
        gate_up, down = [split_name(name)[0] for name in expert.gate_up], split_name(expert.down)[0]
        yield from _expert(gate_up, down, hidden, division.expert, place)
        if down != expert.down:  # all are stacked there
            break
    if moe.shared_intermediate_size:
        yield from _expert(names.shared.gate_up, names.shared.down, hidden, division.shared, place)


def _expert(gate_up: Sequence[str], down: str, hidden: int, width: _Split, place: int) -> _Cuts:
    """By the names of tensors, as experts have them."""
    own = width.at(place)
    rows = (own, _behind(own, width.whole)) if len(gate_up) == 1 else (own,)
    for name in gate_up:
        whole = 2 * width.whole if len(gate_up) == 1 else width.whole
        yield name, Cut((whole, hidden), rows)
        yield bias_of(name), Cut((whole,), rows)
    yield down, _columns(hidden, width.whole, own)


def _gated_mlp(gate_up: Sequence[str], down: str, hidden: int, width: _Split, place: int) -> _Cuts:
    own = width.at(place)
    yield from _linears(gate_up, [width.whole, width.whole], [own, own], hidden)
    yield f"{down}.weight", _columns(hidden, width.whole, own)


def _linears(names: Sequence[str], num_rows: Sequence[int], own: Sequence[Range], columns: int) -> _Cuts:
    """Several modules' weights and biases; a single one has all the rows."""
    if len(names) == 1:
        starts = [sum(num_rows[:index]) for index in range(len(num_rows))]
        rows = tuple(_behind(each, start) for each, start in zip(own, starts, strict=True))
        cuts = [(names[0], sum(num_rows), rows)]
    else:
        cuts = [(name, whole, (each,)) for name, whole, each in zip(names, num_rows, own, strict=True)]
    for name, whole, rows in cuts:
        yield f"{name}.weight", Cut((whole, columns), rows)
        yield f"{name}.bias", Cut((whole,), rows)


def _columns(num_rows: int, num_columns: int, own: Range) -> Cut:
    return Cut((num_rows, num_columns), (Range(0, num_rows, num_rows),), own)


def _times(heads: Range, size: int) -> Range:
    return Range(*(count * size for count in heads))


def _behind(own: Range, start: int) -> Range:
    return Range(own.start + start, own.stop + start, own.size)
