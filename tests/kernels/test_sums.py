"""Sums over ranks by kernels that write into each other's memory: see `tests.kernels.sums_ranks`.

Numbers are checked against float64, and to the bit between ranks; so is that an inbox is left as it was found.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ingle.kernels.group import Peers

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("processes that share a GPU's memory: tests/parallel/test_gpu_sums.py", allow_module_level=True)

from ingle.kernels.gpu import sums
from ingle.kernels.gpu.inboxes import NOTHING_16, NOTHING_32
from tests.kernels.sums_ranks import CASES, Inboxes

ROOT = Path(__file__).parents[2]
FAST = ["one shot", "two shots", "products"]


def run(module: str, *words: str, interpret: bool) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET" or interpret}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    command = [sys.executable, "-m", f"tests.kernels.{module}", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "cases", [FAST, pytest.param([case for case in CASES if case not in FAST], marks=pytest.mark.slow)]
)
def test_ranks(cases: list[str]) -> None:
    assert run("sums_ranks", *cases, interpret=True).splitlines() == cases


def test_who_waits_for_nobody_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sums, "_TRIES", 3)
    peers = Inboxes(2).peers(0, one_shot_bytes=0)
    peers.state[2] = 1
    sums.all_reduce(torch.ones(8), peers)
    assert peers.state.tolist() == [1, 0, 1, 1]


def test_what_they_take() -> None:
    peers = Inboxes(4).peers(0, one_shot_bytes=96)
    assert peers.in_one_shot(32) and not peers.in_one_shot(48)
    assert Inboxes(2).peers(0, one_shot_bytes=0).in_one_shot(1 << 20), "two shots would send as much"
    x = torch.zeros(4, 16, dtype=torch.bfloat16)
    assert sums.suits_rows(x, peers) and sums.suits(x, peers)
    assert not sums.suits_rows(torch.zeros(4, 12, dtype=torch.bfloat16), peers), "rows are not aligned"
    assert not sums.suits(x[:, :8], peers) and not sums.suits(x.long(), peers) and not sums.suits(x[:0], peers)
    assert not sums.suits(torch.zeros(1 << 20), peers), "larger ones are left to NCCL"
    empty = torch.tensor([Peers.NOTHING], dtype=torch.int32)
    assert empty.item() == NOTHING_32.value and set(empty.view(torch.int16).tolist()) == {NOTHING_16.value}


@pytest.mark.slow
@pytest.mark.parametrize("capability", [70, 80, 90])
def test_for_cards_that_are_not_here(capability: int) -> None:
    assert "_one_shot_kernel" in run("compiled_sums", str(capability), "2", "4", "8", interpret=False)
