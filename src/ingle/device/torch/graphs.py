"""Steps as CUDA graphs: one launch instead of hundreds, sampling included, whatever its rows ask of it.

A graph is captured for padded sizes the first time they are needed, or while the engine idles, so that nothing is
captured before the first answer. Its inputs are one packed tensor; everything else it finds in the per-slot tables.
Decode-only steps are padded in the number of sequences, steps with prompt chunks in the number of tokens. Padding rows
belong to a slot of their own, whose page is the reserved one, and to no attention.

A step whose masks come between forward and draw is two graphs; what is handed on are the hidden states of its rows.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

import torch

from ingle.device import Ints
from ingle.device.inputs import Layout, pack
from ingle.device.torch.tables import SlotTables, unpack
from ingle.kernels.batch import StepInputs
from ingle.kernels.group import Border, Crossing
from ingle.kernels.sampling import Features, Samples
from ingle.step import Limits, Step

K = TypeVar("K")
T = TypeVar("T")
_Key = tuple[str, Layout, Features | None]
"""What a graph captures."""

_LONE_KEYS = 512
"""A lone sequence's steps up to so many keys are a graph of their own: attention has programs for no more than those.
One that has no keys waits like the others, for room in an SM, and the kernels behind it wait for that."""
_MOST_ASKED = 4
"""Combinations of features whose graphs are captured ahead: each has as many as there are sizes."""


class Ranks(Protocol):
    """Those that compute the same steps."""

    def all_agree(self, well: bool, *, in_stage: bool) -> bool:
        """Whether something went well on all of them, or on those that have the same layers."""
        ...


class StepParts(Protocol):
    """What graphs capture, of padded inputs."""

    @property
    def border(self) -> Border | None:
        """Of a stage of a pipeline."""
        ...

    def hidden_rows(self, inputs: StepInputs, layout: Layout) -> torch.Tensor:
        """The forward: the hidden states [R, E] of the rows whose next token is drawn."""
        ...

    def draw(self, hidden: torch.Tensor, inputs: StepInputs, features: Features) -> Samples:
        """The draw for hidden states [R, E], and the drawn tokens' way into the table."""
        ...


@dataclass(slots=True)
class _Whole:
    """A step in one graph."""

    graph: torch.cuda.CUDAGraph
    packed: torch.Tensor
    samples: Samples


@dataclass(slots=True)
class CapturedForward:
    """The first of two graphs, and by features those that follow it."""

    layout: Layout
    graph: torch.cuda.CUDAGraph
    packed: torch.Tensor
    inputs: StepInputs
    hidden: torch.Tensor
    crossing: Crossing | None
    """Between stages of a pipeline."""
    draws: dict[Features, tuple[torch.cuda.CUDAGraph, Samples]]


class StepGraphs:
    """Graphs of `parts` for every step within `limits`."""

    def __init__(
        self,
        parts: StepParts,
        tables: SlotTables,
        limits: Limits,
        among: Ranks | None = None,
        *,
        in_halves: bool = False,
    ) -> None:
        """`among`: ranks that use the same graphs, where there are several. `in_halves`: forward and draw of every step
        are apart, as not all ranks draw."""
        self._ranks, self._in_halves = among, in_halves
        self._parts = parts
        self._tables = tables
        self._max_num_seqs = limits.max_num_seqs
        self._decode_sizes = decode_sizes(limits.max_num_seqs)
        self._lone_keys = (_LONE_KEYS, 0) if limits.max_model_len > _LONE_KEYS else (_LONE_KEYS,)
        self._token_sizes = token_sizes(limits.max_num_batched_tokens)
        self._wholes: dict[tuple[Layout, Features], _Whole] = {}
        self._asked: dict[Features, None] = {Features(): None}
        """What steps asked of sampling, in the order in which it came up."""
        self._drawn: dict[Features, None] = {}
        """The same of draws apart from their forward, none of which a rank has that is not in the last stage."""
        self._forwards: dict[Layout, CapturedForward] = {}
        self._given_up: set[_Key] = set()
        """Graphs that could not be captured."""
        self._least_too_large = limits.max_num_batched_tokens + 1
        """Tokens of steps whose graphs are not captured while the engine idles."""
        self._pool = torch.cuda.graph_pool_handle()
        self.capturing = threading.Lock()
        """Held while a graph is captured: no other thread may ask anything of CUDA then."""

    def run(self, step: Step, features: Features) -> Samples | None:
        """Launches a step that was applied. What it draws is padded, and gone with the next step of its size.

        None where its graph could not be captured: then nothing is launched.
        """
        self._asked[features] = None
        layout = self._layout(step)
        whole = self._whole(layout, features)
        if whole is None:
            return None
        self._replay(step, layout, whole.graph, whole.packed)
        return whole.samples

    def forward(self, step: Step) -> CapturedForward | None:
        """Launches a step that was applied, but for the draw; None as `run`."""
        layout = self._layout(step)
        forward = self._forward(layout)
        if forward is not None:
            border, crossing = self._parts.border, forward.crossing
            if border is not None and crossing is not None and crossing.landing is not None:
                border.receive_into(crossing.landing)
            self._replay(step, layout, forward.graph, forward.packed)
            if border is not None and crossing is not None and crossing.leaving is not None:
                border.send(crossing.leaving)
        return forward

    def draw(self, forward: CapturedForward, features: Features) -> Samples:
        """Launches the draw of the step whose forward was launched last, with samples as `run` has them."""
        self._drawn[features] = None
        draw = self._draw(forward, features)
        if draw is None:
            return self._parts.draw(forward.hidden, forward.inputs, features)
        graph, samples = draw
        graph.replay()
        return samples

    def reset(self) -> None:
        """Forgets all graphs, and what they hold."""
        captured = [whole.graph for whole in self._wholes.values()]
        for forward in self._forwards.values():
            captured += [forward.graph, *(graph for graph, _ in forward.draws.values())]
        for graph in captured:
            graph.reset()
        self._wholes.clear()
        self._forwards.clear()

    def capture_next(self) -> bool:
        """Captures one more of the steps that ask what others asked before, decodes first; False when none is left."""
        wanted = [_decode_layout(1, most_keys) for most_keys in self._lone_keys]
        wanted += [_decode_layout(size) for size in self._decode_sizes if size > 1]
        wanted += [self._mixed_layout(size) for size in self._token_sizes]
        if self._in_halves:
            return self._capture_next_forward(wanted)
        for features in list(self._asked)[:_MOST_ASKED]:
            for layout in wanted:
                if layout.num_tokens < self._least_too_large and (layout, features) not in self._wholes:
                    if self._whole(layout, features) is None:
                        self._least_too_large = layout.num_tokens  # larger ones take more memory
                    return True
        return False

    def _capture_next_forward(self, wanted: Sequence[Layout]) -> bool:
        for layout in wanted:
            if layout.num_tokens < self._least_too_large and layout not in self._forwards:
                if self._forward(layout) is None:
                    self._least_too_large = layout.num_tokens
                return True
        for features in list(self._drawn)[:_MOST_ASKED]:
            for layout, forward in self._forwards.items():
                if features not in forward.draws and ("draw", layout, features) not in self._given_up:
                    self._draw(forward, features)
                    return True
        return False

    def _forward(self, layout: Layout) -> CapturedForward | None:
        capture = partial(self._capture_forward, layout)
        return self._kept(self._forwards, layout, ("forward", layout, None), capture)

    def _whole(self, layout: Layout, features: Features) -> _Whole | None:
        capture = partial(self._capture, layout, features)
        return self._kept(self._wholes, (layout, features), ("whole", layout, features), capture)

    def _draw(self, forward: CapturedForward, features: Features) -> tuple[torch.cuda.CUDAGraph, Samples] | None:
        capture = partial(self._capture_draw, forward, features)
        return self._kept(forward.draws, features, ("draw", forward.layout, features), capture)

    def _kept(self, kept: dict[K, T], name: K, key: _Key, capture: Callable[[], T]) -> T | None:
        """The graph of that name, captured where there is none. It is kept only once all ranks have theirs: a rank that
        used one while others go without would meet them with other sizes."""
        found = kept.get(name)
        if found is None and (found := self._try(key, capture)) is not None:
            kept[name] = found
        return found

    def _try(self, key: _Key, capture: Callable[[], T]) -> T | None:
        """What `capture` makes, unless it raises an exception twice, now or before: then that graph is given up. What
        the first try left in PyTorch's cache may have been what the capture lacked.

        Raises what it raised where the device is lost.
        """
        if key in self._given_up:
            return None
        what = "on another rank"
        for _ in range(2):
            captured: T | None = None
            try:
                captured = capture()
            except Exception as error:
                try:
                    torch.cuda.synchronize()
                except RuntimeError:
                    raise error from None
                what = f"{type(error).__name__}: {error}".splitlines()[0]
            well = captured is not None
            if self._ranks is not None:
                well = self._ranks.all_agree(well, in_stage=key[0] == "draw")
            if well:
                return captured
            torch.cuda.empty_cache()  # behind the handler: the error's frames hold tensors
        self._given_up.add(key)
        message = "a CUDA graph for steps of %d tokens could not be captured, and they run without one: %s"
        logging.getLogger("ingle").warning(message, key[1].num_tokens, what)
        return None

    def _replay(self, step: Step, layout: Layout, graph: torch.cuda.CUDAGraph, packed: torch.Tensor) -> None:
        packed.copy_(torch.from_numpy(self._pack(step, layout)).pin_memory(), non_blocking=True)
        graph.replay()

    def _layout(self, step: Step) -> Layout:
        if step.num_decodes == len(step.chunks) and all(chunk.samples for chunk in step.chunks):
            size = next(size for size in self._decode_sizes if size >= step.num_decodes)
            if size > 1:
                return _decode_layout(size)
            length = max((chunk.end for chunk in step.chunks), default=0)
            return _decode_layout(1, _LONE_KEYS if length <= _LONE_KEYS else 0)
        return self._mixed_layout(next(size for size in self._token_sizes if size >= step.num_tokens))

    def _pack(self, step: Step, layout: Layout) -> Ints:
        return pack(step, layout, self._tables.query_block, self._tables.padding_slot)

    def _mixed_layout(self, num_tokens: int) -> Layout:
        num_seqs = min(self._max_num_seqs, num_tokens)
        # Every chunk may end in a block that is not full.
        return Layout(num_tokens, num_seqs, num_seqs, num_tokens // self._tables.query_block + num_seqs)

    def _capture(self, layout: Layout, features: Features) -> _Whole:
        packed, inputs = self._padding(layout)

        def run() -> Samples:
            return self._parts.draw(self._parts.hidden_rows(inputs, layout), inputs, features)

        run()  # compiles kernels and readies libraries, which a capture cannot
        graph = torch.cuda.CUDAGraph()
        with self.capturing, torch.cuda.graph(graph, pool=self._pool):
            samples = run()
        return _Whole(graph, packed, samples)

    def _capture_forward(self, layout: Layout) -> CapturedForward:
        packed, inputs = self._padding(layout)
        border = self._parts.border
        with nullcontext() if border is None else border.held():
            self._parts.hidden_rows(inputs, layout)
            graph = torch.cuda.CUDAGraph()
            with self.capturing, torch.cuda.graph(graph, pool=self._pool):
                hidden = self._parts.hidden_rows(inputs, layout)
        crossing = None if border is None else border.captured()
        return CapturedForward(layout, graph, packed, inputs, hidden, crossing, {})

    def _capture_draw(self, forward: CapturedForward, features: Features) -> tuple[torch.cuda.CUDAGraph, Samples]:
        # The step's own forward is there already, and what is drawn here only to compile kernels must not count: it
        # is drawn for padding rows.
        padding = StepInputs(*(torch.zeros_like(field) for field in forward.inputs))
        padding.sample_slots.fill_(self._tables.padding_slot)
        self._parts.draw(forward.hidden, padding, features)
        graph = torch.cuda.CUDAGraph()
        with self.capturing, torch.cuda.graph(graph, pool=self._pool):
            samples = self._parts.draw(forward.hidden, forward.inputs, features)
        return graph, samples

    def _padding(self, layout: Layout) -> tuple[torch.Tensor, StepInputs]:
        """The inputs of a step of padding alone, and their fields as views."""
        packed = torch.from_numpy(self._pack(Step(), layout)).to(self._tables.device)
        return packed, unpack(packed, layout)


def _decode_layout(size: int, most_keys: int = 0) -> Layout:
    return Layout(size, size, size, 0, most_keys)


def decode_sizes(max_num_seqs: int) -> list[int]:
    """Padded numbers of decoding sequences: fine where a step is short, coarser above."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, max_num_seqs + 32, 32)]
    return sorted({min(size, max_num_seqs) for size in sizes})


def token_sizes(max_num_batched_tokens: int) -> list[int]:
    """Padded numbers of tokens of a step that reads prompts.

    Multiples of 128 above 256: between them the library's products take longer than at the next one, some of them twice
    as long.
    """
    sizes = [*range(64, 256, 64), *range(256, 2048, 128), *range(2048, max_num_batched_tokens + 256, 256)]
    return sorted({min(size, max_num_batched_tokens) for size in sizes})
