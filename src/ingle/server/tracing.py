"""Spans of requests for OpenTelemetry, where its packages are there: `pip install ingle[otel]`.

A span is made once a request has ended, of what its record says by then. It says nothing of what was asked.
"""

from __future__ import annotations

import importlib.util
import os
import threading
import time
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from ingle.errors import ConfigError
from ingle.server.request_log import RequestRecord
from ingle.version import __version__

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter

_CLOSE_S = 2.0
_HTTP_PORT = 4318
_OPERATIONS = {
    "/v1/chat/completions": "chat", "/v1/messages": "chat", "/v1/responses": "chat",
    "/v1/completions": "text_completion", "/v1/embeddings": "embeddings",
}  # fmt: skip
"""By OpenTelemetry's names for them."""
_NS = 1_000_000_000


class Tracer:
    """Tells spans to a provider of OpenTelemetry's SDK, which sends them in a thread of its own."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("ingle", __version__)

    @classmethod
    def to(cls, endpoint: str) -> Tracer:
        """Sends them to a collector. Raises `ConfigError` for an address that is none, and where a package lacks."""
        exporter = _exporter(endpoint)
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        service = {"service.name": os.environ.get("OTEL_SERVICE_NAME", "ingle"), "service.version": __version__}
        provider = TracerProvider(resource=Resource.create(service), shutdown_on_exit=False)
        provider.add_span_processor(BatchSpanProcessor(exporter))
        return cls(provider)

    def tell(self, record: RequestRecord) -> None:
        """Of a request that has asked a model for something."""
        if not record.model:
            return
        from opentelemetry.trace import SpanKind, Status, StatusCode

        ended_ns = time.time_ns()
        began_ns = ended_ns - int(record.duration_s * _NS)
        operation = _OPERATIONS.get(record.route, "generate_content")
        span = self._tracer.start_span(
            f"{operation} {record.model}",
            context=_context_of(record),
            kind=SpanKind.SERVER,
            attributes={name: value for name, value in _attributes(record, operation).items() if value is not None},
            start_time=began_ns,
        )
        if record.ttft_s is not None:
            span.add_event("gen_ai.first_token", timestamp=began_ns + int(record.ttft_s * _NS))
        if record.status >= 500 or "error" in record.finish_reasons:
            span.set_status(Status(StatusCode.ERROR))
        span.end(ended_ns)

    def close(self) -> None:
        """Sends what is left, for two seconds at most: a collector that is away holds up no end."""
        thread = threading.Thread(target=self._provider.shutdown, name="spans", daemon=True)
        thread.start()
        thread.join(_CLOSE_S)


def _attributes(record: RequestRecord, operation: str) -> dict[str, str | int | float | bool | list[str] | None]:
    """OpenTelemetry's of generative AI, and vLLM's where it has others."""
    return {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "ingle",
        "gen_ai.request.model": record.model,
        "gen_ai.response.model": record.model,
        "gen_ai.response.id": record.answer_id,
        "gen_ai.response.finish_reasons": record.finish_reasons,
        "gen_ai.request.choice.count": record.num_choices,
        "gen_ai.request.max_tokens": record.max_tokens,
        "gen_ai.request.temperature": record.temperature,
        "gen_ai.request.top_p": record.top_p,
        "gen_ai.usage.input_tokens": record.prompt_tokens,
        "gen_ai.usage.output_tokens": record.output_tokens,
        "gen_ai.usage.cache_read.input_tokens": record.cached_tokens,
        "gen_ai.request.id": record.id,
        "gen_ai.request.n": record.num_choices,
        "gen_ai.usage.prompt_tokens": record.prompt_tokens,
        "gen_ai.usage.completion_tokens": record.output_tokens,
        "gen_ai.latency.time_in_queue": record.queue_s,
        "gen_ai.latency.time_to_first_token": record.ttft_s,
        "gen_ai.latency.e2e": record.duration_s,
        "http.request.method": record.method,
        "http.route": record.route,
        "http.response.status_code": record.status,
        "enduser.id": record.client or None,
        "ingle.aborted": record.aborted or None,
    }


def _context_of(record: RequestRecord) -> Context | None:
    """In which the caller's span is the parent; None begins a trace."""
    from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, set_span_in_context

    trace = record.trace
    if trace is None:
        return None
    flags = TraceFlags(TraceFlags.SAMPLED if trace.sampled else TraceFlags.DEFAULT)
    parent = SpanContext(int(trace.trace_id, 16), int(trace.parent_id, 16), is_remote=True, trace_flags=flags)
    return set_span_in_context(NonRecordingSpan(parent))


def _exporter(endpoint: str) -> SpanExporter:
    """By gRPC or over HTTP, as OpenTelemetry's environment says, or else the address."""
    flag, url = "--otlp-traces-endpoint", urlsplit(endpoint)
    protocol = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL")
    try:
        port = url.port
    except ValueError:
        port = -1
    if url.scheme not in ("http", "https", "grpc") or not url.hostname or port == -1:
        raise ConfigError(f"{flag} {endpoint!r} is not an address such as http://localhost:4317")
    over_http = protocol == "http/protobuf" or (protocol is None and (port == _HTTP_PORT or len(url.path) > 1))
    if not over_http and protocol not in (None, "grpc"):
        raise ConfigError(f"OTEL_EXPORTER_OTLP_PROTOCOL={protocol}: spans are sent by grpc or http/protobuf")
    kind = "http" if over_http else "grpc"
    for package in ("opentelemetry.sdk", f"opentelemetry.exporter.otlp.proto.{kind}"):
        if not _is_there(package):
            raise ConfigError(f"{flag} needs {package}, which is not installed: pip install 'ingle[otel]'")
    if over_http:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as OverHttp

        whole = endpoint if len(url.path) > 1 else f"{endpoint.rstrip('/')}/v1/traces"
        return OverHttp(endpoint=whole)
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as ByGrpc

    exporter: SpanExporter = ByGrpc(endpoint=endpoint, insecure=url.scheme != "https")
    return exporter


def _is_there(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ImportError:  # of the package that it is in
        return False
