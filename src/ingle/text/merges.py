"""The merges that a SentencePiece vocabulary stands for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_Ints = npt.NDArray[np.int64]


def merges_of(pieces: Sequence[str]) -> list[tuple[str, str]]:
    """Every cut of a piece into two others: of the first piece first, of one piece the longest left part first.

    `pieces` are all unlike. All cuts are looked up at once, in a trie of the pieces and one of the reversed pieces:
    there are over a million of them in a vocabulary of 256k, and a dictionary is asked for one at a time.
    """
    backwards = [piece for piece in reversed(pieces) if piece]
    lengths = np.fromiter(map(len, backwards), np.int64, len(backwards))
    chars = np.frombuffer("".join(backwards).encode("utf-32-le"), np.uint32).astype(np.int64)
    ends = lengths.cumsum()
    starts = ends - lengths
    left = _piece_of(_nodes(chars, starts, lengths), ends - 1)
    right = _piece_of(_nodes(chars[::-1], len(chars) - ends, lengths)[::-1], starts)
    is_cut = (left[:-1] >= 0) & (right[1:] >= 0)
    is_cut[ends[:-1] - 1] = False  # from one piece to the next
    cuts = np.flatnonzero(is_cut)[::-1]
    named = np.array(backwards, dtype=object)
    return list(zip(named[left[cuts]].tolist(), named[right[cuts + 1]].tolist(), strict=True))


def _nodes(chars: _Ints, starts: _Ints, lengths: _Ints) -> _Ints:
    """For every character of the pieces, the node of their trie to which the piece leads up to there."""
    nodes, at_end = np.empty_like(chars), np.zeros_like(starts)
    alive, depth, num_nodes = np.arange(len(starts)), 0, 1
    while len(alive):
        here = starts[alive] + depth
        _, children = np.unique(at_end[alive] << 21 | chars[here], return_inverse=True)  # a character has 21 bits
        nodes[here] = at_end[alive] = children + num_nodes
        num_nodes += int(children.max()) + 1
        depth += 1
        alive = alive[lengths[alive] > depth]
    return nodes


def _piece_of(nodes: _Ints, lasts: _Ints) -> _Ints:
    """For every character, the piece that ends in its node, else -1; each piece has its last character at `lasts`."""
    pieces = np.full(nodes.max(initial=0) + 1, -1)
    pieces[nodes[lasts]] = np.arange(len(lasts))
    return pieces[nodes]
