"""On a machine with a GPU: what its probes find is whole."""

from __future__ import annotations

import pytest

from ingle.doctor.here import Here, Question
from ingle.doctor.probe import PROBES


@pytest.mark.gpu
def test_triton_compiles_and_runs_a_kernel() -> None:
    assert PROBES["triton"]()["right"]


@pytest.mark.gpu
def test_nothing_of_the_gpu_fails() -> None:
    from ingle.doctor import gpus, software
    from ingle.doctor.finding import Reporter

    here, report = Here(Question(timeout_s=90.0)), Reporter("GPUs")
    for check in (software.check_torch, gpus.check_gpus, gpus.check_triton, gpus.check_links):
        check(here, report)
    assert [finding.text for finding in report.findings if finding.state == "fail"] == []
