"""What the KV cache holds: which layers share pages, and what a token takes in a layer. Plain arithmetic.

Layers with one window form groups of equally many places. A page belongs to one group and holds `page_size` tokens for
all layers of it, so that pages of all groups are alike and come from one pool; a group that reads no further back than
its window gives its pages back on the way. A model whose layers are all alike has one group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

ITEMSIZES = {"float32": 4, "float16": 2, "bfloat16": 2}
CODES = ("int8", "fp8_e4m3", "fp8_e5m2")
"""Types of one byte that stand for a number together with a scale: each key, and each value, of a head has its own."""
SCALE_BYTES = 4
"""Of a scale, float32."""
_MAX_GROUPS = 16
"""Each costs a page table, and a page taken every `page_size` tokens of every sequence."""
_MAX_PADDING = 0.1
"""Share of the places that may be empty."""


@dataclass(frozen=True)
class KvGroup:
    """Layers that share pages."""

    layers: tuple[int, ...]
    """The layer in each place; the last places may be empty."""
    window: int | None
    """How many tokens one of these layers looks back at most, the present one included; None for all."""

    def of_layers(self, layers: range) -> KvGroup:
        """Of these neighbouring layers alone, counted from their first."""
        return KvGroup(tuple(layer - layers.start for layer in self.layers if layer in layers), self.window)


@dataclass(frozen=True)
class KvSpec:
    """The cache of a model: [places, sides, pages, page_size, heads, dim] numbers of one type.

    Behind the codes of a page are their scales, [heads, page_size]: what moves pages moves both.
    """

    groups: tuple[KvGroup, ...]
    sides: int
    """2 for keys and values; 1 for what is both."""
    heads: int
    dim: int
    dtype: str
    """A key of `ITEMSIZES`, or one of `CODES`."""

    @property
    def is_coded(self) -> bool:
        return self.dtype in CODES

    @cached_property
    def num_places(self) -> int:
        """Layers of a group, empty places included."""
        return max(len(group.layers) for group in self.groups)

    @cached_property
    def located(self) -> tuple[tuple[int, int], ...]:
        """Of each layer: its group, and its place there."""
        places = {
            layer: (index, place) for index, group in enumerate(self.groups) for place, layer in enumerate(group.layers)
        }
        return tuple(places[layer] for layer in range(len(places)))

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Of each group."""
        return tuple(group.window for group in self.groups)

    @property
    def layer_bytes(self) -> int:
        """That a token takes in a layer."""
        row = self.dim + SCALE_BYTES if self.is_coded else self.dim * ITEMSIZES[self.dtype]
        return self.sides * self.heads * row

    @property
    def token_bytes(self) -> int:
        """That a token takes in all layers, as long as all of them keep it; empty places not counted."""
        return len(self.located) * self.layer_bytes

    def page_bytes(self, page_size: int) -> int:
        return page_size * self.num_places * self.layer_bytes

    def side_bytes(self, page_size: int) -> int:
        """Of a page, what one side of one place takes."""
        return page_size * self.layer_bytes // self.sides


def cache_dtype(wanted: str, floats: str) -> str:
    """The type of a cache for what a user wants of it, where floats are of the type `floats`."""
    return {**dict.fromkeys(("auto", "float16", "bfloat16"), floats), "fp8": "fp8_e4m3"}.get(wanted, wanted)


def group_layers(windows: Sequence[int | None]) -> tuple[KvGroup, ...]:
    """Groups for layers with these windows.

    They are as large as the smallest kind of layer allows without too many places left empty. Where that takes too many
    groups, all layers form one, which keeps what any of them reads.
    """
    kinds: dict[int | None, list[int]] = {}
    for layer, window in enumerate(windows):
        kinds.setdefault(window, []).append(layer)
    for size in range(min(map(len, kinds.values())), 0, -1):
        groups = [
            KvGroup(tuple(layers[start : start + size]), window)
            for window, layers in kinds.items()
            for start in range(0, len(layers), size)
        ]
        if len(groups) > _MAX_GROUPS:
            break
        if size * len(groups) - len(windows) <= _MAX_PADDING * size * len(groups):
            return tuple(groups)
    return (one_group(windows),)


def one_group(windows: Sequence[int | None]) -> KvGroup:
    """All layers in one, which keeps what any of them reads."""
    furthest = None if None in windows else max(window for window in windows if window is not None)
    return KvGroup(tuple(range(len(windows))), furthest)


def first_page_seen(window: int | None, position: int, page_size: int) -> int:
    """The index of the first page that the token at `position`, or one after it, reads."""
    return 0 if window is None else max(position - window + 1, 0) // page_size


def pages_held(windows: Sequence[int | None], length: int, page_size: int, chunk: int) -> int:
    """Pages that a sequence of `length` tokens holds at most in groups of these windows, read `chunk` tokens at a time.

    In a group with a window those are the pages of the chunk, and of what its first token sees.
    """
    num_pages = -(-length // page_size)
    return sum(
        num_pages if window is None else min(num_pages, -(-(window - 1 + chunk) // page_size) + 1) for window in windows
    )


def longest(windows: Sequence[int | None], num_pages: int, page_size: int, chunk: int, most: int) -> int:
    """Of sequences of up to `most` tokens, the length of the longest that needs no more than `num_pages`."""
    low, high = 0, -(-most // page_size)  # in pages
    while low < high:
        middle = (low + high + 1) // 2
        if pages_held(windows, middle * page_size, page_size, chunk) <= num_pages:
            low = middle
        else:
            high = middle - 1
    return min(low * page_size, most)
