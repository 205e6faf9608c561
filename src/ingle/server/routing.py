"""Which of several replicas gets a request: the one that has done with it soonest, by what each has to do and holds.

All is counted in tokens. One that is drawn, in a batch of others, costs about what one costs that is read.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from ingle.request import EngineOutput, EngineRequest, TokenIds

BLOCK = 64
"""Tokens that are looked for as one. Less than that is computed sooner than it is worth a place."""
_BLOCK_BYTES = 4 * BLOCK
_FIRST_LENGTH = 256.0
"""Tokens of an answer, before any ended."""
_NEWEST_SHARE = 1 / 16
"""Of the last answer in the mean length."""
_LEAST_REST = 1 / 4
"""Of the mean length: what an answer that is longer already is taken to have before it."""


@dataclass
class Routed:
    """A request at its replica, until it ends."""

    replica: int
    background: bool
    to_read: int
    """Tokens of its prompt that the replica has to compute."""
    most: int | None
    """Tokens of the longest answer; None for no bound."""
    is_exact: bool
    """The answer will be so long."""
    is_held: bool
    """What becomes of it is found again by others."""
    root: int
    keys: list[int]
    """Of the full blocks of its prompt."""
    tail: TokenIds
    """What follows these, the answer so far included."""
    num_tokens: int = 0
    """Drawn so far."""
    to_do: float = 0.0
    """As it is counted in its replica's."""


@dataclass
class _Replica:
    capacity: int
    """Blocks that it holds at most."""
    to_do: float = 0.0
    """Tokens that its requests still have to read and to draw."""
    in_background: float = 0.0
    """Of these, those of requests that let others go first."""
    num_routed: int = 0
    blocks: OrderedDict[int, int] = field(default_factory=OrderedDict)
    """Keys of those that it holds, the least recently used first, and how many unfinished requests have each."""


class Router:
    """It knows of prefixes what it sent where: each replica is taken to forget what was not used for longest, as its
    prefix cache does. Where that is wrong a prefix is computed, and then the replica holds it."""

    def __init__(self, capacities: Sequence[int]) -> None:
        """`capacities`: tokens whose keys and values each replica keeps; 0 where it keeps none for others."""
        self._replicas = [_Replica(num_tokens // BLOCK) for num_tokens in capacities]
        self._mean_length = _FIRST_LENGTH

    def route(self, request: EngineRequest, among: Collection[int], *, background: bool = False) -> Routed:
        """Chooses one of `among`, and counts the request in."""
        num_prompt, uses = len(request.prompt_token_ids), _uses_cache(request)
        root = hash(request.cache_salt)
        keys, tail = [], request.prompt_token_ids[:0]
        is_held = uses and any(replica.capacity for replica in self._replicas)
        if is_held:
            keys = block_keys(root, request.prompt_token_ids)
            tail = request.prompt_token_ids[BLOCK * len(keys) :]
        held = {index: self._num_held(index, keys) for index in among}
        most_held = max(held.values())
        num_sharing = max(self._replicas[i].blocks[keys[n - 1]] if n else 0 for i, n in held.items() if n == most_held)

        def cost(index: int) -> tuple[float, float, int]:
            """What goes before it, what it has to compute itself, and that others wait for this as well. The last
            counts less where many have the prefix: to compute it once more serves all of them."""
            replica, to_read = self._replicas[index], num_prompt - BLOCK * held[index]
            before = replica.to_do if background else replica.to_do - replica.in_background
            return before + to_read + to_read / (1 + num_sharing), replica.to_do, replica.num_routed

        chosen = min(among, key=cost)
        sampling = request.sampling
        most = 0 if request.pooling is not None else sampling.max_tokens
        routed = Routed(
            replica=chosen,
            background=background,
            to_read=max(num_prompt - BLOCK * held[chosen], 1),
            most=most,
            is_exact=sampling.ignore_eos and request.grammar is None,
            is_held=is_held,
            root=root,
            keys=keys,
            tail=tail,
        )
        replica = self._replicas[chosen]
        replica.num_routed += 1
        _hold(replica, keys, using=1)
        self._count(routed)
        return routed

    def took(self, routed: Routed, output: EngineOutput) -> None:
        """This came of it."""
        if output.num_prompt_read is not None:
            return
        routed.to_read = 0
        routed.num_tokens += len(output.token_ids)
        if routed.is_held:
            routed.tail.extend(output.token_ids)
        self._count(routed)

    def end(self, routed: Routed, *, lost: bool = False) -> None:
        """Nothing more comes of it; where it is `lost`, since the engine has gone."""
        replica = self._replicas[routed.replica]
        self._add(routed, 0.0)
        for key in routed.keys:
            if key in replica.blocks:
                replica.blocks[key] = max(replica.blocks[key] - 1, 0)
        if routed.num_tokens and routed.is_held and not lost:
            _hold(replica, block_keys(routed.keys[-1] if routed.keys else routed.root, routed.tail), using=0)
        if routed.num_tokens and not lost:
            self._mean_length += (routed.num_tokens - self._mean_length) * _NEWEST_SHARE

    def forget(self, replica: int) -> None:
        """Another engine is there in its place, which holds nothing."""
        self._replicas[replica].blocks.clear()

    def to_do(self, replica: int) -> float:
        """Tokens that are still to be read and drawn there."""
        return self._replicas[replica].to_do

    def _num_held(self, index: int, keys: Sequence[int]) -> int:
        blocks = self._replicas[index].blocks
        for count, key in enumerate(keys):
            if key not in blocks:
                return count
        return len(keys)

    def _count(self, routed: Routed) -> None:
        most = self._mean_length if routed.most is None else routed.most
        if not routed.is_exact:
            most = min(most, max(self._mean_length, routed.num_tokens + self._mean_length * _LEAST_REST))
        self._add(routed, routed.to_read + max(most - routed.num_tokens, 0.0))

    def _add(self, routed: Routed, to_do: float) -> None:
        replica, more = self._replicas[routed.replica], to_do - routed.to_do
        replica.to_do += more
        if routed.background:
            replica.in_background += more
        routed.to_do = to_do


def _uses_cache(request: EngineRequest) -> bool:
    """Whether nothing is asked of tokens whose keys and values are there."""
    asks_of_all = request.sampling.prompt_logprobs is not None
    return not asks_of_all and not (request.pooling is not None and request.pooling.needs_all)


def block_keys(parent: int, token_ids: TokenIds) -> list[int]:
    """Names of full blocks, each with all that is before it.

    Python's hash of bytes is keyed by a secret of this process. Where two were equal nonetheless, a request would go to
    a replica that holds nothing for it.
    """
    data, keys = token_ids.tobytes(), []
    for start in range(0, len(data) - _BLOCK_BYTES + 1, _BLOCK_BYTES):
        parent = hash((parent, data[start : start + _BLOCK_BYTES]))
        keys.append(parent)
    return keys


def _hold(replica: _Replica, keys: Sequence[int], using: int) -> None:
    """The end of a prefix goes before its beginning."""
    blocks = replica.blocks
    for key in reversed(keys):
        blocks[key] = blocks.get(key, 0) + using
        blocks.move_to_end(key)
    while len(blocks) > replica.capacity:
        blocks.popitem(last=False)
