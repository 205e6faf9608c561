"""`ingle bench serve` against the real server: lengths are what was asked for, by the model's own tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest

from ingle.bench.cli import main
from ingle.bench.serving import results
from tests.e2e.conftest import Server


@pytest.mark.parametrize(("endpoint", "overhead"), [("chat", None), ("completions", 0)])
def test_a_sweep_of_the_real_server(server: Server, tmp_path: Path, endpoint: str, overhead: int | None) -> None:
    output = tmp_path / "a.json"
    main(["serve", "--base-url", f"{server.url}/v1", "--endpoint", endpoint, "--concurrency", "2", "--num-prompts", "2",
          "--num-warmups", "0", "--input-len", "40", "--output-len", "10", "--output", str(output)])  # fmt: skip
    report = results.read(output)
    assert report.status == "complete" and report.model == "smollm2:135m" and report.notices == []
    assert report.data["tokens_counted_by"] == "the server's /tokenize" and report.server["version"]
    assert report.server["card"]["meta"]["device"] == "cpu"
    for level in report.levels:
        figures = level.figures
        assert (figures.num_ok, figures.num_errors, figures.output_tokens, figures.short_answers) == (2, 0, 20, 0)
        assert figures.counted_by == "usage" and figures.ttft_s and figures.tpot_s and figures.e2e_s
        assert figures.ttft_s.mean + 9 * figures.tpot_s.mean == pytest.approx(figures.e2e_s.mean, rel=0.2)
        (counted,) = {request.prompt_tokens for request in level.requests}
        assert counted == 40 + overhead if overhead is not None else counted and counted > 40  # the template's
