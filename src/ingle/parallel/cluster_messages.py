"""What the engine's process and the one that speaks with Ray say to each other."""

from __future__ import annotations

import msgspec

from ingle.parallel.hosts import Program
from ingle.parallel.placement import Unit

# ---- to it


class SeatsWanted(msgspec.Struct, frozen=True, tag="wanted"):
    """The first message: seats for so many ranks to a stage and so many stages."""

    tensor: int
    pipeline: int
    unit: Unit
    each: int
    """Of these, for each rank."""
    replicas: bool
    """Whether these are no stages of one model, but engines of their own."""
    version: str
    """Of ingle, which is the same on every node."""


class Begin(msgspec.Struct, frozen=True, tag="begin"):
    """Starts these ranks in their seats."""

    ranks: list[int]
    arguments: list[str]
    secret: bytes
    program: Program


class Kill(msgspec.Struct, frozen=True, tag="kill"):
    """Ends one that another may follow."""

    rank: int


ToCluster = SeatsWanted | Begin | Kill

# ---- from it


class Told(msgspec.Struct, frozen=True, tag="told"):
    """What it does, for people."""

    stage: str


class Given(msgspec.Struct, frozen=True):
    """A seat."""

    node: str
    host: str
    port: int
    """At which the node's Ray listens."""
    gpus: list[str]
    """As Ray calls them."""


class Seated(msgspec.Struct, frozen=True, tag="seated"):
    """The seats of all ranks. The first node is this one."""

    seats: list[Given]
    notice: str | None


class Began(msgspec.Struct, frozen=True, tag="began"):
    pids: list[int]


class Ended(msgspec.Struct, frozen=True, tag="ended"):
    """A rank has ended, or is stopped."""

    rank: int
    code: int | None = None
    words: str = ""
    """The last that it wrote."""
    stopped: bool = False
    lost: str | None = None
    """What Ray says, where it has lost the process that kept the rank."""


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """There are no seats. `of_flags`: what was asked for cannot be given, whoever uses the cluster now."""

    what: str
    alternative: str | None = None
    of_flags: bool = False


FromCluster = Told | Seated | Began | Ended | Refused
