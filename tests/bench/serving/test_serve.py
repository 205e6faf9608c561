"""`ingle bench serve` against servers that do as a test says: the arithmetic, what it puts up with, how it ends."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from ingle.bench.cli import main
from ingle.bench.serving import results
from ingle.bench.serving.results import Report
from ingle.errors import ConfigError, EngineError, IngleError
from tests.bench.serving.fake_server import Fake, Script, fake_server, flags


def run(fake: Fake, output: Path, *more: str) -> Report:
    main(flags(fake, output, *more))
    return results.read(output)


def measured(fake: Fake) -> list[dict[str, Any]]:
    """Bodies without those of warm-ups."""
    return [body for body in fake.bodies if body["max_tokens"] != 8]


def test_a_sweep_is_measured_written_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with fake_server(Script(delay_s=0.05, gap_s=0.01)) as fake:
        report = run(fake, tmp_path / "a.json", "--concurrency", "1,3", "--num-prompts", "4", "--goodput", "ttft:1e4")
    one, three = report.levels
    assert (report.status, report.model, one.concurrency, three.concurrency) == ("complete", "fake", 1, 3)
    for level in report.levels:
        figures = level.figures
        assert (figures.num_ok, figures.num_errors, figures.output_tokens, figures.counted_by) == (4, 0, 36, "usage")
        assert figures.ttft_s and figures.tpot_s and figures.itl_s and figures.e2e_s
        assert figures.ttft_s.mean >= 0.05 and figures.tpot_s.mean >= 0.01
        assert figures.tpot_s.mean == pytest.approx(figures.itl_s.mean, rel=0.2)
        assert figures.output_tokens_per_s == pytest.approx(36 / figures.duration_s)
        assert figures.cached_tokens == 12 and figures.goodput_share == 1
        assert len(figures.ttft_s.quantiles) == len(report.percents)
    assert fake.most_open == 3 and one.figures.mean_concurrency <= 1.01
    assert three.figures.output_tokens_per_s > one.figures.output_tokens_per_s
    assert all(len(body["messages"][0]["content"].split()) == 5 for body in measured(fake))
    page = (tmp_path / "a.html").read_text()
    assert page.count("<svg viewBox") == 6 and "<script" not in page and "http-equiv" in page
    shown = capsys.readouterr().out
    assert "tok/s of one" in shown and "TTFT p99" in shown and "a.json" in shown


@pytest.mark.parametrize("each", [4, 5])
def test_several_tokens_an_event_are_counted(tmp_path: Path, each: int) -> None:
    """At the same speed, time between tokens and time per output token are those of a server that sends them alone."""
    with fake_server(Script(gap_s=0.02 * each, tokens_per_event=each)) as fake:
        report = run(fake, tmp_path / "a.json", "--concurrency", "1", "--num-prompts", "2", "--output-len", "20")
    figures = report.levels[0].figures
    assert figures.output_tokens == 40 and figures.tokens_per_event == each
    assert figures.itl_s and figures.tpot_s and figures.event_gap_s
    assert figures.event_gap_s.p50 >= 0.02 * each
    assert figures.itl_s.p50 == pytest.approx(figures.event_gap_s.p50 / each)
    assert figures.tpot_s.mean == pytest.approx(figures.itl_s.mean, rel=0.01)


def test_a_server_without_usage_is_counted_by_events_or_a_tokenizer(tmp_path: Path) -> None:
    with fake_server(Script(usage=False, refuses=("stream_options",), tokenize=False)) as fake:
        report = run(fake, tmp_path / "a.json", "--concurrency", "1", "--num-prompts", "2")
    assert report.levels[0].figures.counted_by == "events" and report.levels[0].figures.output_tokens == 18
    assert any("stream_options" in notice for notice in report.notices)
    assert any("nothing here counts tokens" in notice for notice in report.notices)
    with fake_server(Script(usage=False, refuses=("ignore_eos", "stream_options"))) as fake:
        report = run(fake, tmp_path / "a.json", "--concurrency", "1", "--num-prompts", "2")
    assert report.levels[0].figures.counted_by == "tokenizer"
    assert not any("ignore_eos" in body for body in fake.bodies)


def test_errors_are_counted_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    faults = {1: "500", 3: "error", 5: "cut"}
    with fake_server(Script(answers=lambda number: faults.get(number, "ok"))) as fake:
        report = run(fake, tmp_path / "a.json", "--concurrency", "2", "--num-prompts", "8")
    (level,) = report.levels
    assert (level.figures.num_ok, level.figures.num_errors) == (5, 3) and level.complete
    assert set(level.figures.errors) == {
        "HTTP 500: out of luck", "the server says: the engine died", "the server closed the connection"
    }  # fmt: skip
    assert sum(request.error is not None for request in level.requests) == 3
    assert "1 failed: HTTP 500: out of luck" in capsys.readouterr().out


def test_a_server_that_hangs_up_is_called_again(tmp_path: Path) -> None:
    with fake_server(Script(hangs_up=True)) as fake:
        report = run(fake, tmp_path / "a.json", "--concurrency", "1,4", "--num-prompts", "12")
    assert [(level.figures.num_ok, level.figures.num_errors) for level in report.levels] == [(12, 0)] * 2


def test_nothing_but_errors_ends_the_run(tmp_path: Path) -> None:
    with (
        fake_server(Script(answers=lambda number: "500")) as fake,
        pytest.raises(EngineError, match="the first 8 requests of a level all failed: HTTP 500: out of luck"),
    ):
        run(fake, tmp_path / "a.json", "--concurrency", "1", "--num-prompts", "20")
    assert results.read(tmp_path / "a.json").status == "partial"


def test_a_killed_server_leaves_what_was_done_and_resume_completes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "a.json"
    with fake_server(Script(answers=lambda number: "die" if number == 6 else "ok")) as fake:
        with pytest.raises(EngineError, match=r"no server answers at .* --resume .*a\.json` completes it"):
            run(fake, output, "--concurrency", "1,2", "--num-prompts", "4")
        report = results.read(output)
    assert report.status == "partial" and [level.complete for level in report.levels] == [True, False]
    assert report.levels[1].figures.num_ok == 2 and report.levels[1].figures.num_errors >= 1
    assert "1 level done, and 2 answers at 2 of 4" in capsys.readouterr().out
    assert "cut short" in output.with_suffix(".html").read_text()
    with fake_server() as fake:
        with pytest.raises(ConfigError, match="--resume takes the flags of that run"):
            main(["serve", "--resume", str(output), "--concurrency", "3"])
        main(["serve", "--resume", str(output), "--base-url", fake.url])
        assert len(measured(fake)) == 4  # of the level that was not done
    whole = results.read(output)
    assert whole.status == "complete" and [level.figures.num_ok for level in whole.levels] == [4, 4]
    assert whole.levels[0] == report.levels[0]
    with pytest.raises(ConfigError, match="that run is complete"):
        main(["serve", "--resume", str(output)])


def test_ctrl_c_keeps_what_was_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "a.json"
    with fake_server(Script(endless=True)) as fake:

        def interrupt() -> None:
            assert fake.asked.wait(30)
            os.kill(os.getpid(), signal.SIGINT)

        threading.Thread(target=interrupt).start()
        with pytest.raises(KeyboardInterrupt):
            run(fake, output, "--concurrency", "2", "--num-prompts", "4")
    report = results.read(output)
    assert (report.status, report.stopped, report.levels) == ("partial", "stopped by a signal", [])
    assert f"0 levels done; `ingle bench serve --resume {output}` completes it" in capsys.readouterr().out


def test_sessions_say_what_was_said_before(tmp_path: Path) -> None:
    with fake_server() as fake:
        report = run(fake, tmp_path / "a.json", "--turns", "3", "--concurrency", "1", "--num-prompts", "2")
    lengths = [len(body["messages"]) for body in measured(fake)]
    assert lengths == [1, 3, 5] * 2
    assert measured(fake)[1]["messages"][1] == {"role": "assistant", "content": "x" * 9}
    assert [request.turn for request in report.levels[0].requests] == [0, 1, 2] * 2


def test_prefixes_are_shared_and_the_rest_is_not(tmp_path: Path) -> None:
    with fake_server() as fake:
        run(fake, tmp_path / "a.json", "--prefix-repetition-prefix-len", "6", "--num-prefixes", "2", "--concurrency",
            "1", "--num-prompts", "8", "--endpoint", "completions")  # fmt: skip
    prompts = [body["prompt"].split() for body in measured(fake)]
    assert {len(prompt) for prompt in prompts} == {11}
    assert len({tuple(prompt[:6]) for prompt in prompts}) == 2 and len({tuple(prompt) for prompt in prompts}) == 8
    assert {path for path in fake.paths if "completions" in path} == {"/v1/completions"}


def test_arrivals_follow_the_rate_and_not_the_answers(tmp_path: Path) -> None:
    with fake_server(Script(delay_s=0.2)) as fake:
        report = run(fake, tmp_path / "a.json", "--request-rate", "100", "--num-prompts", "20", "--num-warmups", "0")
        sent = sorted(request.sent_s for request in report.levels[0].requests)
        assert report.levels[0].rate == 100 and fake.most_open > 5 and 0.05 < sent[-1] < 2
        capped = run(fake, tmp_path / "a.json", "--rate", "100", "--num-prompts", "6", "--max-concurrency", "2")
    assert capped.levels[0].figures.mean_concurrency <= 2.01


def test_what_a_file_holds_is_asked(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    lines: list[Any] = [
        {"prompt": "one", "max_tokens": 3},
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "two"},
                      {"role": "assistant", "content": "a b c d"}]},
    ]  # fmt: skip
    file.write_text("\n".join(map(json.dumps, lines)))
    with fake_server() as fake:
        main(["serve", "--base-url", fake.url, "--output", str(tmp_path / "a.json"), "--dataset-path", str(file),
              "--concurrency", "1", "--num-prompts", "3"])  # fmt: skip
    asked = {body["messages"][-1]["content"]: body["max_tokens"] for body in measured(fake)}
    assert asked == {"one": 3, "two": 4}
    assert any("asked again" in notice for notice in results.read(tmp_path / "a.json").notices)
    chats = tmp_path / "sharegpt.json"
    said = [("human", "hi"), ("gpt", "a b c d e"), ("human", "more"), ("gpt", "f")]
    chats.write_text(json.dumps([{"id": "1", "conversations": [{"from": who, "value": what} for who, what in said]}]))
    with fake_server() as fake:
        for turns in ("1", "2"):
            main(["serve", "--base-url", fake.url, "--output", str(tmp_path / "a.json"), "--dataset-path", str(chats),
                  "--dataset-name", "sharegpt", "--concurrency", "1", "--num-prompts", "1", "--turns",
                  turns])  # fmt: skip
    assert [len(body["messages"]) for body in measured(fake)] == [1, 1, 3]
    assert [body["max_tokens"] for body in measured(fake)] == [5, 5, 1]


def test_a_socket_and_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["ingle", "bench", "serve", "--api-key", "sesame"])
    with fake_server(socket=tmp_path / "s") as fake:
        run(fake, tmp_path / "a.json", "--concurrency", "1", "--num-prompts", "1", "--api-key", "sesame")
    assert all("Authorization: Bearer sesame\r\n" in head for head in fake.headers)
    assert "sesame" not in (tmp_path / "a.json").read_text() and "sesame" not in (tmp_path / "a.html").read_text()


def test_tls(tmp_path: Path) -> None:
    """The certificate names nobody that is trusted."""
    more = ("--concurrency", "1", "--num-prompts", "1")
    with fake_server(certificate=Path(__file__).parents[2] / "server" / "tls" / "server.pem") as fake:
        with pytest.raises(EngineError, match=r"no TLS with https://127.0.0.1:.*--insecure"):
            run(fake, tmp_path / "a.json", *more)
        assert run(fake, tmp_path / "a.json", *more, "--insecure").levels[0].figures.num_ok == 1


def test_the_picture_is_drawn_where_matplotlib_is(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with fake_server() as fake:
        run(fake, tmp_path / "a.json", "--concurrency", "1,2", "--num-prompts", "2")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--concurrency", "0"], "--concurrency '0': give whole numbers above 0"),
        (["--concurrency", "1,2", "--rate", "3"], "--rate takes one --concurrency"),
        (["--goodput", "itl:5"], "--goodput 'itl:5': give milliseconds of ttft, tpot, e2el"),
        (["--endpoint", "x"], "--endpoint 'x': give chat or completions"),
        (["--extra-body", "[1]"], "--extra-body: give a JSON object"),
        (["--dataset-path", "/nowhere.jsonl"], "--dataset-path /nowhere.jsonl: "),
        (["--input-len", "5000"], "--input-len 5000 and --output-len 9 are more than the context of fake, 4096"),
        (["--range-ratio", "1"], "--range-ratio 1: give a share"),
        (["--port", "8000"], "--port 8000: give --base-url http://HOST:PORT"),
        (["--output", "/nowhere/a.json"], "--output /nowhere/a.json: No such file or directory"),
        (["--output", "a.html"], "--output a.html: give a .json file"),
        (["--rate", "inf"], "--rate inf sends all at once"),
        (["--requst-rate", "8"], "unknown flag --requst-rate"),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path: Path, more: list[str], message: str) -> None:
    with fake_server() as fake, pytest.raises(ConfigError) as raised:
        run(fake, tmp_path / "a.json", *more)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_where_no_server_is(tmp_path: Path) -> None:
    with pytest.raises(IngleError, match=r"no server answers at http://127.0.0.1:9: .*refused"):
        main(["serve", "--base-url", "127.0.0.1:9", "--output", str(tmp_path / "a.json")])
    assert not (tmp_path / "a.json").exists()


def test_compare_prints_ratios_and_draws_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = []
    for name, gap in (("slow", 0.02), ("fast", 0.005)):
        with fake_server(Script(gap_s=gap)) as fake:
            run(fake, tmp_path / f"{name}.json", "--concurrency", "1,2", "--num-prompts", "2", "--num-warmups", "0")
        files.append(str(tmp_path / f"{name}.json"))
    capsys.readouterr()
    main(["compare", *files, "--output", str(tmp_path / "both.html")])
    shown = capsys.readouterr().out
    rows = [line.split() for line in shown.splitlines()]
    assert ["1", "at", "once"] in rows and ["2", "at", "once"] in rows
    ratios = [float(row[2].strip("(x)")) for row in rows if row[:1] == ["fast"]]
    assert len(ratios) == 2 and min(ratios) > 1
    page = (tmp_path / "both.html").read_text()
    assert page.count("<svg viewBox") == 6 and "slow, p99" in page and "fast, at 2" in page
    with pytest.raises(ConfigError, match=r"give an \.html file"):
        main(["compare", *files, "--output", files[0]])
    with pytest.raises(ConfigError, match="needs two files or more"):
        main(["compare", files[0]])
    with pytest.raises(ConfigError, match="holds no results of `ingle bench serve`"):
        (tmp_path / "x.json").write_text("{}")
        main(["compare", files[0], str(tmp_path / "x.json")])
