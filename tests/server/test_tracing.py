"""Spans of requests, into memory, and to a collector on this machine."""

from __future__ import annotations

import asyncio
import importlib.util
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer

import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from ingle.config.monitoring import MonitoringConfig
from ingle.errors import ConfigError
from ingle.request import EngineOutput
from ingle.server import tracing
from ingle.server.launch import observers_of
from ingle.server.observers import Observers
from ingle.server.tracing import Tracer

from .fakes import MODEL, ScriptedEngine

pytestmark = pytest.mark.anyio
TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
MakeClient = Callable[..., httpx.AsyncClient]


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def client(make_client: MakeClient, exporter: InMemorySpanExporter) -> httpx.AsyncClient:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return make_client(observers=Observers(tracer=Tracer(provider)))


def only(exporter: InMemorySpanExporter) -> ReadableSpan:
    [span] = exporter.get_finished_spans()
    return span


async def test_a_chat_is_a_span_of_its_callers_trace(
    client: httpx.AsyncClient, exporter: InMemorySpanExporter, engine: ScriptedEngine
) -> None:
    engine.step_s = 0.002
    body = {"messages": [{"role": "user", "content": "secret"}], "max_tokens": 5, "temperature": 0.25, "n": 2}
    headers = {"traceparent": f"00-{TRACE}-{SPAN}-01", "X-Request-Id": "r1"}
    before_ns = time.time_ns()
    answer = (await client.post("/v1/chat/completions", json=body, headers=headers)).json()
    span = only(exporter)
    assert span.name == f"chat {MODEL}" and span.kind is SpanKind.SERVER
    assert span.parent is not None and span.context is not None
    assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == (TRACE, SPAN)
    attributes = dict(span.attributes or {})
    usage = answer["usage"]
    assert attributes["gen_ai.usage.input_tokens"] == attributes["gen_ai.usage.prompt_tokens"] == usage["prompt_tokens"]
    assert attributes["gen_ai.usage.output_tokens"] == usage["completion_tokens"] == 10
    assert attributes["gen_ai.response.finish_reasons"] == ("length",)
    assert attributes["gen_ai.request.temperature"] == 0.25 and attributes["gen_ai.request.max_tokens"] == 5
    assert attributes["gen_ai.request.id"] == "r1" and attributes["http.response.status_code"] == 200
    assert "secret" not in str(attributes)
    assert span.start_time is not None and span.end_time is not None
    assert before_ns <= span.start_time < span.end_time <= time.time_ns()
    [first] = span.events
    assert span.start_time < first.timestamp < span.end_time
    assert attributes["gen_ai.latency.time_to_first_token"] < attributes["gen_ai.latency.e2e"]  # type: ignore[operator]


async def test_without_a_caller_it_is_a_trace_of_its_own(
    client: httpx.AsyncClient, exporter: InMemorySpanExporter
) -> None:
    await client.post("/v1/completions", json={"prompt": "x", "max_tokens": 2, "stream": True})
    span = only(exporter)
    assert span.parent is None and span.name == f"text_completion {MODEL}"
    await client.get("/v1/models")
    await client.post("/v1/completions", json={"prompt": "x", "max_tokens": -2})
    assert len(exporter.get_finished_spans()) == 1, "no model was asked"


async def test_a_caller_that_samples_nothing_gets_nothing(
    client: httpx.AsyncClient, exporter: InMemorySpanExporter
) -> None:
    headers = {"traceparent": f"00-{TRACE}-{SPAN}-00"}
    await client.post("/v1/completions", json={"prompt": "x", "max_tokens": 2}, headers=headers)
    assert not exporter.get_finished_spans()


async def test_a_failure_is_told(
    client: httpx.AsyncClient, exporter: InMemorySpanExporter, engine: ScriptedEngine
) -> None:
    engine.fail_after = 2
    await client.post("/v1/completions", json={"prompt": "x", "stream": True})
    assert only(exporter).status.status_code is StatusCode.ERROR


async def test_how_long_it_waited_in_the_engine(
    client: httpx.AsyncClient, exporter: InMemorySpanExporter, engine: ScriptedEngine
) -> None:
    engine._outputs = lambda request: iter([EngineOutput(request.id, [5], "length", queued_s=1.5)])  # type: ignore
    await client.post("/v1/completions", json={"prompt": "x"})
    assert dict(only(exporter).attributes or {})["gen_ai.latency.time_in_queue"] == 1.5


def test_a_package_that_is_missing_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "_is_there", lambda package: False)
    with pytest.raises(ConfigError, match=r"--otlp-traces-endpoint needs .*pip install 'ingle\[otel\]'$"):
        observers_of(MonitoringConfig(otlp_traces_endpoint="http://127.0.0.1:4317"))
    assert observers_of(MonitoringConfig()).tracer is None


@pytest.mark.parametrize(
    "address", ["", "localhost", "localhost:4317", "file:///etc/passwd", "http://a:99999", "http://"]
)
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="--otlp-traces-endpoint"):
        Tracer.to(address)


def test_a_protocol_that_nobody_speaks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "carrier-pigeon")
    with pytest.raises(ConfigError, match="carrier-pigeon"):
        Tracer.to("http://127.0.0.1:4317")


class Collector:
    """Takes what is sent to it over HTTP."""

    def __init__(self) -> None:
        self.got: list[tuple[str, bytes]] = []
        got = self.got

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                got.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *args: object) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


async def test_spans_reach_a_collector(make_client: MakeClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
    collector = Collector()
    try:
        observers = observers_of(
            MonitoringConfig(otlp_traces_endpoint=f"http://127.0.0.1:{collector.server.server_port}")
        )
        assert observers.tracer is not None
        await make_client(observers=observers).post("/v1/completions", json={"prompt": "x", "max_tokens": 2})
        await asyncio.to_thread(observers.tracer.close)
        [(path, body)] = collector.got
        assert path == "/v1/traces" and MODEL.encode() in body and b"service.name" in body
    finally:
        collector.server.shutdown()
        collector.server.server_close()


async def test_a_collector_that_is_away_holds_up_nobody(
    make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracing, "_CLOSE_S", 0.2)
    observers = observers_of(MonitoringConfig(otlp_traces_endpoint="http://127.0.0.1:9/v1/traces"))
    assert observers.tracer is not None
    response = await make_client(observers=observers).post("/v1/completions", json={"prompt": "x", "max_tokens": 2})
    assert response.status_code == 200
    started = time.monotonic()
    await asyncio.to_thread(observers.tracer.close)
    assert time.monotonic() - started < 5.0


@pytest.mark.skipif(
    importlib.util.find_spec("opentelemetry.exporter.otlp.proto.grpc") is not None, reason="the package is here"
)
def test_by_default_it_is_grpc() -> None:
    with pytest.raises(ConfigError, match=r"opentelemetry\.exporter\.otlp\.proto\.grpc"):
        Tracer.to("http://127.0.0.1:4317")
