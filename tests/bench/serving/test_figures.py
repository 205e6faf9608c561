"""The arithmetic, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from ingle.bench.serving.address import parse_address
from ingle.bench.serving.answer import Stream
from ingle.bench.serving.connection import AnswerBroken
from ingle.bench.serving.figures import Exchange, figures_of, spread
from ingle.bench.serving.pictures.axis import label, linear_ticks, log_ticks
from ingle.errors import ConfigError


def exchange(sent_s: float, events: list[float], tokens: int, ended_s: float | None = None, **more: object) -> Exchange:
    return Exchange(0, 0, sent_s, tokens, events, events[-1] if ended_s is None else ended_s, 7, None, tokens, **more)  # type: ignore[arg-type]


def test_a_level_by_hand() -> None:
    """Two requests: 5 tokens from 1 s on, one each 0.1 s; 9 tokens from 1.5 s on, in three events 0.3 s apart."""
    one = exchange(0.0, [1.0, 1.1, 1.2, 1.3, 1.4], 5)
    two = exchange(0.5, [1.5, 1.8, 2.1], 9)
    failed = Exchange(1, 0, 0.5, 5, ended_s=0.6, error="HTTP 500: no")
    figures = figures_of([one, two, failed], {"ttft": 1.01, "tpot": 0.11})
    assert (figures.num_ok, figures.num_errors, figures.errors) == (2, 1, {"HTTP 500: no": 1})
    assert figures.duration_s == pytest.approx(2.1)
    assert figures.output_tokens_per_s == pytest.approx(14 / 2.1)
    assert figures.total_tokens_per_s == pytest.approx((14 + 14) / 2.1)
    assert figures.mean_concurrency == pytest.approx((1.4 + 1.6 + 0.1) / 2.1)
    assert figures.tokens_per_event == pytest.approx(14 / 8)
    assert figures.ttft_s and figures.tpot_s and figures.itl_s and figures.event_gap_s and figures.request_tokens_per_s
    assert figures.ttft_s.mean == pytest.approx(1.0)
    assert one.tpot_s == pytest.approx(0.1) and two.tpot_s == pytest.approx(0.6 / 6)
    assert figures.itl_s.mean == pytest.approx(0.1) and figures.itl_s.p99 == pytest.approx(0.1)
    assert figures.event_gap_s.mean == pytest.approx((4 * 0.1 + 2 * 0.3) / 6)
    assert figures.request_tokens_per_s.mean == pytest.approx((5 / 1.4 + 9 / 1.6) / 2)
    assert figures.goodput_share == pytest.approx(2 / 3) and figures.goodput_requests_per_s == pytest.approx(2 / 2.1)


def test_what_has_no_second_token_has_no_time_between() -> None:
    figures = figures_of([exchange(0.0, [0.5], 1), exchange(0.0, [], 1, ended_s=0.7)], {})
    assert figures.tpot_s is None and figures.itl_s is None and figures.goodput_share is None
    assert figures.ttft_s and figures.ttft_s.mean == 0.5 and figures.num_ok == 2
    assert figures_of([], {}).ttft_s is None


def test_spreads_are_numpys_and_weights_repeat_values() -> None:
    values = np.random.default_rng(0).exponential(size=501)
    found = spread(values)
    assert found and (found.p50, found.p90, found.p99) == pytest.approx(tuple(np.percentile(values, (50, 90, 99))))
    weighted = spread([1.0, 2.0, 3.0], np.array([1.0, 8.0, 1.0]))
    assert weighted and (weighted.mean, weighted.p50, weighted.p90, weighted.p99) == (2.0, 2.0, 2.0, 3.0)


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_a_stream_is_read_however_it_is_cut(size: int) -> None:
    """Comments, an event named, both kinds of line ends, thoughts, and usage in each event."""
    text = (
        ': ping\r\n\r\ndata: {"choices":[{"delta":{"role":"assistant","content":null}}]}\r\n\r\n'
        'event: x\ndata:{"choices":[{"delta":{"reasoning_content":"hm"}}],"usage":{"completion_tokens":1}}\n\n'
        'data: {"choices":[{"delta":{"tool_calls":[{"index":0}]}}]}\n\n'
        'data: {"choices":[{"delta":{"content":"é"},"finish_reason":"stop"}]}\n\n'
        'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":4}}\n\ndata: [DONE]\n\n'
    ).encode()
    stream = Stream(keep_text=True)
    stream.begin(200, {b"content-type": b"text/event-stream"})
    for at in range(0, len(text), size):
        stream.feed(text[at : at + size], at)
    stream.check()
    assert len(stream.event_s) == 3 and stream.text == ["hm", "é"]
    assert (stream.prompt_tokens, stream.completion_tokens, stream.finish_reason) == (3, 4, "stop")


def test_what_is_no_event_is_told() -> None:
    stream = Stream(keep_text=False)
    stream.begin(200, {})
    with pytest.raises(AnswerBroken, match="an event is not of the API"):
        stream.feed(b"data: {nonsense\n\n", 0.0)


@pytest.mark.parametrize(
    ("text", "shown", "path"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000", "/v1/models"),
        ("localhost:11434/v1/", "http://localhost:11434", "/v1/models"),
        ("https://api.example.com/openai/v1/chat/completions", "https://api.example.com/openai", "/openai/v1/models"),
        ("http://[::1]:8000", "http://[::1]:8000", "/v1/models"),
        ("unix:/run/ingle.sock", "unix:/run/ingle.sock", "/v1/models"),
        ("http+unix://%2Frun%2Fs", "unix:/run/s", "/v1/models"),
    ],
)
def test_addresses_as_people_write_them(text: str, shown: str, path: str) -> None:
    address = parse_address(text)
    assert (str(address), address.path("models")) == (shown, path)


@pytest.mark.parametrize("text", ["ftp://x", "http://", "http://x:99999", "http://user:secret@x", "unix:"])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ConfigError, match="--base-url") as raised:
        parse_address(text)
    assert "secret" not in str(raised.value)


def test_ticks_are_round() -> None:
    assert linear_ticks(0, 176) == [0, 50, 100, 150, 200]
    assert log_ticks(18, 1500) == [20, 50, 100, 200, 500, 1000]
    assert [label(number) for number in (1500, 0.25, 20)] == ["1,500", "0.25", "20"]
