"""Which node of a cluster gets which rank."""

from __future__ import annotations

import re

import pytest

from ingle.errors import ConfigError
from ingle.parallel.cluster import check_ray, gpus_of
from ingle.parallel.cluster_messages import Given
from ingle.parallel.interfaces import interface_of
from ingle.parallel.placement import Node, Placement, place


def nodes(*units: int) -> list[Node]:
    return [Node(f"id{index}", f"10.0.0.{index + 1}", count) for index, count in enumerate(units)]


def test_the_ranks_of_a_stage_are_on_one_node() -> None:
    assert place(nodes(4, 4), "id0", (4, 2), "GPU") == Placement((4, 4), (0, 0, 0, 0, 1, 1, 1, 1), spread=True)
    assert place(nodes(1, 1), "id1", (1, 2), "CPU") == Placement((1, 1), (0, 1), spread=True)
    assert place(nodes(16, 3), "id0", (1, 2), "CPU", 8) == Placement((8, 8), (0, 1), spread=True)


@pytest.mark.parametrize(("units", "layout"), [((2, 2), (4, 1)), ((2, 4), (4, 1)), ((3, 3, 2), (2, 4))])
def test_where_no_other_way_is_they_are_on_several(units: tuple[int, ...], layout: tuple[int, int]) -> None:
    num_ranks = layout[0] * layout[1]
    placement = place(nodes(*units), "id0", layout, "GPU")
    assert placement.units == (1,) * num_ranks and placement.bundles == tuple(range(num_ranks))
    assert not placement.spread and placement.notice is not None and "cross the network" in placement.notice


@pytest.mark.parametrize(
    ("units", "layout", "said"),
    [
        (
            (1, 2),
            (2, 2),
            "takes 4 ranks, with 1 GPU to each, and Ray's cluster has: 1 GPU on this node, 2 GPUs on 10.0.0.2",
        ),
        ((0, 2), (2, 1), "no GPUs on this node, of which that takes 1; type the command on one of 10.0.0.2"),
        (
            (0, 0),
            (2, 1),
            "rank 0 is on this node, and Ray's cluster has no GPUs on this node, of which that takes 1",
        ),
    ],
)
def test_no_room(units: tuple[int, ...], layout: tuple[int, int], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said) + "$"):
        place(nodes(*units), "id0", layout, "GPU")


def test_the_ranks_of_a_node_see_the_same_gpus() -> None:
    seats = [Given("a", "", 0, ["10"]), Given("b", "", 0, ["0"]), Given("a", "", 0, ["9"])]
    assert gpus_of(seats, "a") == ["9", "10"]


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"ray needs Ray, on every node; pip install 'ingle\[ray\]'$"):
        check_ray()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    for address in ("ray://head:10001", "local"):
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(ConfigError, match=f"RAY_ADDRESS={address} names no cluster"):
            check_ray()
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    check_ray()


def test_the_interface_of_an_address() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.250") is None and interface_of("a-name") is None
