"""`GET /metrics`: what Prometheus reads, by vLLM's names where it means the same, so that its dashboards work.

The library is imported when first asked: it takes 45 ms, and many servers are never asked.
"""

from __future__ import annotations

import asyncio
import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response

from ingle.channel import STEP_TOKENS
from ingle.server.ending import AnswersMemory
from ingle.server.endpoints import Endpoint
from ingle.server.models import ModelPool, ServedModel
from ingle.server.observers import Observers
from ingle.server.queue import BodyMemory
from ingle.server.request_log import PROBES
from ingle.server.statistics import ClientStatistics, Histogram, ModelStatistics, ServerStatistics
from ingle.version import __version__

if TYPE_CHECKING:
    from prometheus_client import Metric

    from ingle.server.engine_client import EngineClient

_NO_WORK = (*PROBES, "/version")
"""Is left out of `http_requests_total`, as in vLLM."""
_Figure = tuple[str, str, Callable[[ServedModel], float]]
_EngineFigure = tuple[str, str, "Callable[[EngineClient], float]"]
_Timing = tuple[tuple[str, ...], str, Callable[[ModelStatistics], Histogram]]

GAUGES: tuple[_Figure, ...] = (
    ("ingle_queued_requests", "Requests without a first token.", lambda model: model.queue.num_requests),
    ("ingle_queued_prompt_tokens", "Prompt tokens of these.", lambda model: model.queue.num_tokens),
)
COUNTERS: tuple[_Figure, ...] = (
    ("vllm:prompt_tokens", "Prompt tokens, cached ones included.", lambda model: model.statistics.num_prompt_tokens),
    ("vllm:prompt_tokens_cached", "Of these, from a cache.", lambda model: model.statistics.num_cached_tokens),
    ("vllm:generation_tokens", "Tokens generated.", lambda model: model.statistics.num_generated_tokens),
    ("vllm:mm_cache_queries", "Images looked for in a cache: there are none.", lambda model: 0),
    ("vllm:mm_cache_hits", "Of these, found.", lambda model: 0),
)
ENGINE_GAUGES: tuple[_EngineFigure, ...] = (
    ("vllm:num_requests_running", "Requests that have a slot.", lambda engine: engine.stats.num_running),
    ("vllm:num_requests_waiting", "Requests that wait for a slot.", lambda engine: engine.stats.num_waiting),
    (
        "vllm:kv_cache_usage_perc",
        "Share of the KV cache that requests hold, from 0 to 1.",
        lambda engine: _usage(engine),
    ),
    ("vllm:gpu_cache_usage_perc", "The same, by vLLM's old name.", lambda engine: _usage(engine)),
    ("ingle_engine_up", "1 while the engine takes requests.", lambda engine: engine.health().ok),
)
ENGINE_COUNTERS: tuple[_EngineFigure, ...] = (
    ("vllm:num_preemptions", "Requests that lost their slot.", lambda engine: engine.stats.num_preemptions),
    ("vllm:prefix_cache_queries", "Tokens looked for.", lambda engine: engine.stats.num_queried_tokens),
    ("vllm:prefix_cache_hits", "Of these, found.", lambda engine: engine.stats.num_hit_tokens),
    ("vllm:gpu_prefix_cache_queries", "By the old name.", lambda engine: engine.stats.num_queried_tokens),
    ("vllm:gpu_prefix_cache_hits", "By the old name.", lambda engine: engine.stats.num_hit_tokens),
    (
        "vllm:external_prefix_cache_queries",
        "Tokens looked for beyond the device's memory.",
        lambda engine: engine.stats.num_lower_queried_tokens,
    ),
    (
        "vllm:external_prefix_cache_hits",
        "Of these, found.",
        lambda engine: engine.stats.num_lower_hit_tokens,
    ),
    (
        "ingle_prompt_cache_dropped_pages",
        "Pages that were evicted before they were kept in host memory or on a disk.",
        lambda engine: engine.stats.num_dropped_pages,
    ),
    ("ingle_engine_steps", "Steps of the engine.", lambda engine: engine.stats.num_steps),
    ("ingle_engine_failed_steps", "Steps that failed.", lambda engine: engine.stats.num_failed_steps),
    ("ingle_engine_restarts", "Engines started in place of others.", lambda engine: engine.num_restarts),
    (
        "ingle_engine_prompt_tokens",
        "Prompt tokens computed, as they are computed, and again where a slot was lost.",
        lambda engine: engine.stats.num_prompt_tokens,
    ),
)
CLIENTS: tuple[tuple[str, str, Callable[[ClientStatistics], int]], ...] = (
    ("ingle_client_requests", "HTTP requests to models, by the name of their key.", lambda of: of.num_requests),
    ("ingle_client_prompt_tokens", "Their prompts, cached tokens included.", lambda of: of.num_prompt_tokens),
    ("ingle_client_cached_tokens", "Of these, from a cache.", lambda of: of.num_cached_tokens),
    ("ingle_client_generation_tokens", "Tokens generated for them.", lambda of: of.num_generated_tokens),
)
HISTOGRAMS: tuple[_Timing, ...] = (
    (("vllm:time_to_first_token_seconds",), "From a request's arrival.", lambda of: of.first_token_s),
    (
        ("vllm:inter_token_latency_seconds", "vllm:time_per_output_token_seconds"),
        "Between two outputs of a request.",
        lambda of: of.next_output_s,
    ),
    (
        ("vllm:request_time_per_output_token_seconds",),
        "Mean time of a finished request's tokens after the first.",
        lambda of: of.per_token_s,
    ),
    (("vllm:e2e_request_latency_seconds",), "From arrival to the end.", lambda of: of.whole_s),
    (("vllm:request_queue_time_seconds",), "In the engine, before the first step.", lambda of: of.queue_s),
    (("vllm:request_prefill_time_seconds",), "From the first step to the first token.", lambda of: of.prefill_s),
    (("vllm:request_decode_time_seconds",), "From the first token to the last.", lambda of: of.decode_s),
    (("vllm:request_inference_time_seconds",), "From the first step to the last token.", lambda of: of.running_s),
    (("vllm:request_prompt_tokens",), "Prompt tokens of a request.", lambda of: of.prompt_tokens),
    (("vllm:request_prefill_kv_computed_tokens",), "Of these, not cached.", lambda of: of.computed_tokens),
    (("vllm:request_generation_tokens",), "Tokens generated for a request.", lambda of: of.generated_tokens),
    (
        ("vllm:request_max_num_generation_tokens",),
        "Tokens of the longest of a prompt's choices.",
        lambda of: of.longest_choice_tokens,
    ),
    (("vllm:request_params_n",), "Choices asked of a prompt.", lambda of: of.num_choices),
    (("vllm:request_params_max_tokens",), "Tokens that a request may generate.", lambda of: of.max_tokens),
)


async def metrics(request: Request) -> Response:
    """What the server counts and measures, for Prometheus: by vLLM's names, and `ingle_` before others."""
    accept = request.headers.get("accept", "")
    body, media_type = await asyncio.to_thread(_exposition, request.app, accept)
    return Response(body, headers={"Content-Type": media_type, "Cache-Control": "no-store"})


ENDPOINTS = (Endpoint("GET", "/metrics", metrics, guards="tells", media_type="text/plain"),)


def _exposition(app: Starlette, accept: str) -> tuple[bytes, str]:
    """The figures in the format that is asked for, and which that is."""
    from prometheus_client import CollectorRegistry, ProcessCollector
    from prometheus_client.exposition import choose_encoder

    observers: Observers = app.state.observers
    registry = CollectorRegistry(auto_describe=False)
    ProcessCollector(registry=registry)
    registry.register(_Collected(Figures(app.state.models, observers.statistics, app.state.unread, app.state.answers)))
    encode, media_type = choose_encoder(accept)
    return encode(registry), media_type


class _Collected:
    """Of one scrape."""

    def __init__(self, figures: Figures) -> None:
        self._figures = figures

    def collect(self) -> Iterable[Metric]:
        return self._figures.metrics()


@dataclass(frozen=True)
class Figures:
    """Where they come from. They are read while the event loop goes on counting: each by itself is true."""

    pool: ModelPool
    server: ServerStatistics
    unread: BodyMemory
    answers: AnswersMemory

    def metrics(self) -> Iterator[Metric]:
        yield from self._of_models(self.pool.models)
        yield from self._of_http()
        yield from self._of_clients()
        yield from self._of_process()

    def _of_models(self, models: Sequence[ServedModel]) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        labels = ("model_name", "engine")
        for name, about, of_model in GAUGES:
            gauge = GaugeMetricFamily(name, about, labels=labels)
            for model in models:
                gauge.add_metric((model.name, _all(model)), of_model(model))
            yield gauge
        for name, about, of_model in COUNTERS:
            counter = CounterMetricFamily(name, about, labels=labels)
            for model in models:
                counter.add_metric((model.name, _all(model)), of_model(model))
            yield counter
        for name, about, of_engine in ENGINE_GAUGES:
            gauge = GaugeMetricFamily(name, about, labels=labels)
            for own, engine in _engines(models):
                gauge.add_metric(own, of_engine(engine))
            yield gauge
        for name, about, of_engine in ENGINE_COUNTERS:
            counter = CounterMetricFamily(name, about, labels=labels)
            for own, engine in _engines(models):
                counter.add_metric(own, of_engine(engine))
            yield counter
        for names, about, chosen in HISTOGRAMS:
            for name in names:
                timing = HistogramMetricFamily(name, about, labels=labels)
                for model in models:
                    of = chosen(model.statistics)
                    timing.add_metric((model.name, _all(model)), *_buckets(of.bounds, of.counts, of.total))
                yield timing
        steps = HistogramMetricFamily("vllm:iteration_tokens_total", "Tokens of a step.", labels=labels)
        for own, engine in _engines(models):
            stats = engine.stats
            steps.add_metric(own, *_buckets(STEP_TOKENS, stats.step_tokens, stats.num_step_tokens))
        yield steps
        yield from _labelled(models)
        yield from _tiers(models)

    def _of_http(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        answered = CounterMetricFamily(
            "ingle_http_requests", "HTTP requests answered.", labels=("route", "method", "status")
        )
        classes: Counter[tuple[str, str, str]] = Counter()
        for route, by_method in list(self.server.responses.items()):
            for method, by_status in list(by_method.items()):
                for status, count in list(by_status.items()):
                    answered.add_metric((route or "-", method, str(status)), count)
                    classes[route or "none", method, f"{status // 100}xx"] += 0 if route in _NO_WORK else count
        yield answered
        like_vllm = CounterMetricFamily(
            "http_requests", "The same without probes, as vLLM has it.", labels=("handler", "method", "status")
        )
        for key, count in classes.items():
            if count:
                like_vllm.add_metric(key, count)
        yield like_vllm
        seconds = HistogramMetricFamily(
            "http_request_duration_seconds", "From request to the end of its answer.", labels=("handler", "method")
        )
        for route, histograms in list(self.server.response_s.items()):
            for method, of in list(histograms.items()) if route not in _NO_WORK else ():
                seconds.add_metric((route or "none", method), *_buckets(of.bounds, of.counts, of.total))
        yield seconds
        yield GaugeMetricFamily(
            "ingle_http_requests_in_flight", "HTTP requests whose answers are not all out.", self.server.in_flight
        )
        yield GaugeMetricFamily("ingle_unread_body_bytes", "Bodies that are being read.", self.unread.num_bytes)
        yield GaugeMetricFamily("ingle_answer_bytes", "Requests that are being answered.", self.answers.num_bytes)

    def _of_clients(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily

        clients = list(self.server.clients.items())
        for name, about, value in CLIENTS:
            counter = CounterMetricFamily(name, about, labels=("client",))
            for client, statistics in clients:
                counter.add_metric((client,), value(statistics))
            yield counter

    def _of_process(self) -> Iterator[Metric]:
        from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily

        lag = self.server.loop_lag_s
        yield HistogramMetricFamily(
            "ingle_event_loop_lag_seconds",
            "How late the event loop is, ten times a second.",
            *_buckets(lag.bounds, lag.counts, lag.total),
        )
        memory = GaugeMetricFamily("ingle_resident_memory_bytes", "Of each process.", labels=("process",))
        for process, pid in (("server", "self"), *_processes(self.pool.models)):
            if (num_bytes := _resident_bytes(pid)) is not None:
                memory.add_metric((process,), num_bytes)
        yield memory
        yield GaugeMetricFamily("ingle_uptime_seconds", "Since the server's start.", time.time() - self.server.started)
        build = GaugeMetricFamily("ingle_build_info", "Always 1.", labels=("version", "python"))
        build.add_metric((__version__, platform.python_version()), 1)
        yield build


def _tiers(models: Sequence[ServedModel]) -> Iterator[Metric]:
    """Of the places below the device where pages are kept."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    labels = ("model_name", "engine", "tier")
    held = GaugeMetricFamily("ingle_prompt_cache_bytes", "Of pages kept below the device.", labels=labels)
    read = CounterMetricFamily("ingle_prompt_cache_read_pages", "Pages read back.", labels=labels)
    written = CounterMetricFamily("ingle_prompt_cache_written_pages", "Pages kept.", labels=labels)
    damaged = CounterMetricFamily("ingle_prompt_cache_damaged_pages", "Pages found, and not whole.", labels=labels)
    for own, engine in _engines(models):
        for tier in engine.stats.tiers:
            of_tier = (*own, tier.name)
            held.add_metric(of_tier, tier.num_bytes)
            read.add_metric(of_tier, tier.num_pages_read)
            written.add_metric(of_tier, tier.num_pages_written)
            damaged.add_metric(of_tier, tier.num_pages_damaged)
    yield from (held, read, written, damaged)


def _labelled(models: Sequence[ServedModel]) -> Iterator[Metric]:
    """What has labels of its own."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    ended = CounterMetricFamily(
        "vllm:request_success", "Requests that ended, and why.", labels=("model_name", "engine", "finished_reason")
    )
    sources = CounterMetricFamily(
        "vllm:prompt_tokens_by_source", "Where prompts came from.", labels=("model_name", "engine", "source")
    )
    waiting = GaugeMetricFamily(
        "vllm:num_requests_waiting_by_reason",
        "For a slot or pages (capacity), or for their grammar (deferred).",
        labels=("model_name", "engine", "reason"),
    )
    pages = GaugeMetricFamily(
        "ingle_kv_pages", "Pages of the KV cache, by what they hold.", labels=("model_name", "engine", "state")
    )
    info = GaugeMetricFamily(
        "vllm:cache_config_info",
        "Always 1.",
        labels=("model_name", "engine", "block_size", "num_gpu_blocks", "cache_dtype"),
    )
    room = GaugeMetricFamily("ingle_model_bytes", "What the model takes.", labels=("model_name", "engine", "kind"))
    for model in models:
        for reason, count in list(model.statistics.finished.items()):
            ended.add_metric((model.name, _all(model), reason), count)
    for own, engine in _engines(models):
        stats, facts = engine.stats, engine.info
        computed = stats.num_queried_tokens - stats.num_hit_tokens - stats.num_lower_hit_tokens
        for source, count in (
            ("local_compute", computed),
            ("local_cache_hit", stats.num_hit_tokens),
            ("external_kv_transfer", stats.num_lower_hit_tokens),
        ):
            sources.add_metric((*own, source), count)
        waiting.add_metric((*own, "capacity"), stats.num_waiting - stats.num_compiling)
        waiting.add_metric((*own, "deferred"), stats.num_compiling)
        free = stats.num_pages - stats.num_used_pages - stats.num_cached_pages
        for state, count in (("used", stats.num_used_pages), ("cached", stats.num_cached_pages), ("free", free)):
            pages.add_metric((*own, state), count)
        info.add_metric((*own, str(facts.page_size), str(facts.num_pages), facts.kv_dtype), 1)
        room.add_metric((*own, "weights"), facts.weight_bytes)
        room.add_metric((*own, "kv_cache"), facts.kv_cache_bytes)
    yield from (ended, sources, waiting, pages, info, room)


def _all(model: ServedModel) -> str:
    """The label `engine` of what is counted of all of a model's engines together."""
    return "0" if len(model.engine.engines) == 1 else "all"


def _engines(models: Sequence[ServedModel]) -> Iterator[tuple[tuple[str, str], EngineClient]]:
    """Each engine with its labels, as vLLM has them."""
    for model in models:
        for index, engine in enumerate(model.engine.engines):
            yield (model.name, str(index)), engine


def _processes(models: Sequence[ServedModel]) -> Iterator[tuple[str, str]]:
    for model in models:
        engines = model.engine.engines
        for index, engine in enumerate(engines):
            yield "engine" if len(engines) == 1 else f"engine {index}", str(engine.pid)


def _usage(engine: EngineClient) -> float:
    stats = engine.stats
    return stats.num_used_pages / stats.num_pages if stats.num_pages else 0.0


def _buckets(bounds: Iterable[float], counts: Iterable[int], total: float) -> tuple[list[tuple[str, float]], float]:
    """Counts up to each bound, all below it included, and the sum of what was counted."""
    found, count = [], 0
    for bound, more in zip((*map(_shown, bounds), "+Inf"), counts, strict=True):
        count += more
        found.append((bound, float(count)))
    return found, total


def _shown(bound: float) -> str:
    """As vLLM's dashboards ask for one, such as 1.0."""
    return str(float(bound))


def _resident_bytes(pid: str) -> int | None:
    """None where the system does not say."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None
