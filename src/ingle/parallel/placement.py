"""Where in a cluster the ranks go: those that share layers on one node, stages on several. Pure; nothing is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ingle.errors import ConfigError

Unit = Literal["GPU", "CPU"]


@dataclass(frozen=True)
class Node:
    id: str
    host: str
    units: int
    """GPUs, or CPUs, that it has in all."""


@dataclass(frozen=True)
class Placement:
    """What a placement group is asked for."""

    units: tuple[int, ...]
    """Of each bundle, which lies on one node. The first is to lie on this one."""
    bundles: tuple[int, ...]
    """The bundle of each rank."""
    spread: bool
    """Whether they are better on different nodes, or on few."""
    notice: str | None = None


def place(
    nodes: Sequence[Node], here: str, layout: tuple[int, int], unit: Unit, each: int = 1, *, replicas: bool = False
) -> Placement:
    """For `layout`, of so many ranks to a stage and so many stages, with `each` units to a rank; or of so many
    `replicas` in place of stages.

    Rank 0 is this process, on the node `here`, and in the last stage. Raises `ConfigError` where there is no room for
    all of them, whoever uses the cluster now.
    """
    tensor, pipeline = layout
    num_ranks = tensor * pipeline
    rooms = {node.id: node.units // each for node in nodes}
    kind = "replica" if replicas else "rank"
    what = f"{num_ranks} {kind}s, with {each} {unit}{'s' if each > 1 else ''} to each"
    if rooms.get(here, 0) < 1:
        others = [node.host for node in nodes if rooms[node.id]]
        raise ConfigError(
            f"--distributed-executor-backend ray: {kind} 0 is on this node, and Ray's cluster has "
            f"{_listed(nodes, here, unit)[0]}, of which that takes {each}",
            alternative=f"type the command on one of {', '.join(others)}" if others else None,
        )
    if sum(rooms.values()) < num_ranks:
        raise ConfigError(
            f"--distributed-executor-backend ray: that takes {what}, and Ray's cluster has: "
            + ", ".join(_listed(nodes, here, unit))
        )
    if rooms[here] >= tensor and sum(room // tensor for room in rooms.values()) >= pipeline:
        bundles = tuple(rank // tensor for rank in range(num_ranks))
        return Placement((tensor * each,) * pipeline, bundles, spread=True)
    notice = (
        f"the {tensor} ranks that share a layer are on several nodes, as nothing else has room for them: their sums, "
        "two a layer, cross the network"
    )
    return Placement((each,) * num_ranks, tuple(range(num_ranks)), spread=False, notice=notice)


def _listed(nodes: Sequence[Node], here: str, unit: Unit) -> list[str]:
    """This one first."""
    ordered = sorted(nodes, key=lambda node: node.id != here)
    return [
        f"{node.units or 'no'} {unit}{'' if node.units == 1 else 's'}"
        + (" on this node" if node.id == here else f" on {node.host}")
        for node in ordered
    ]
