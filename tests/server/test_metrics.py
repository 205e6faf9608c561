"""What Prometheus reads: true of what happened, by names that dashboards ask for, and at no cost to the start."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.applications import Starlette

from ingle.channel import STEP_TOKENS, EngineStats, TierStats
from ingle.config.access import ApiKey
from ingle.request import EngineOutput, EngineRequest
from ingle.server.models import ModelPool, ServedModel
from ingle.server.statistics import Histogram, ServerStatistics

from .fakes import MODEL, ScriptedEngine, app_for, client_of, served, until

pytestmark = pytest.mark.anyio
BOARD = Path(__file__).parents[2] / "docs" / "grafana" / "ingle.json"

VLLM_ASKS = """
vllm:num_requests_running{model_name} vllm:num_requests_waiting{model_name}
vllm:num_requests_waiting_by_reason{model_name,reason=capacity}
vllm:num_requests_waiting_by_reason{model_name,reason=deferred}
vllm:kv_cache_usage_perc{model_name} vllm:gpu_cache_usage_perc{model_name}
vllm:num_preemptions_total{model_name} vllm:prompt_tokens_total{model_name} vllm:generation_tokens_total{model_name}
vllm:prefix_cache_queries_total{model_name} vllm:prefix_cache_hits_total{model_name}
vllm:gpu_prefix_cache_queries_total{model_name} vllm:gpu_prefix_cache_hits_total{model_name}
vllm:external_prefix_cache_queries_total{model_name} vllm:external_prefix_cache_hits_total{model_name}
vllm:mm_cache_queries_total{model_name} vllm:mm_cache_hits_total{model_name}
vllm:prompt_tokens_by_source_total{model_name,source=local_compute}
vllm:prompt_tokens_by_source_total{model_name,source=local_cache_hit}
vllm:prompt_tokens_by_source_total{model_name,source=external_kv_transfer}
vllm:request_success_total{model_name,finished_reason=stop} vllm:request_success_total{model_name,finished_reason=error}
vllm:time_to_first_token_seconds_bucket{model_name,le=0.1} vllm:time_to_first_token_seconds_bucket{model_name,le=1.0}
vllm:time_to_first_token_seconds_sum{model_name} vllm:time_to_first_token_seconds_count{model_name}
vllm:inter_token_latency_seconds_bucket{model_name,le=0.1} vllm:inter_token_latency_seconds_sum{model_name}
vllm:time_per_output_token_seconds_bucket{model_name} vllm:time_per_output_token_seconds_count{model_name}
vllm:request_time_per_output_token_seconds_bucket{model_name,le=0.05}
vllm:request_time_per_output_token_seconds_bucket{model_name,le=0.2}
vllm:e2e_request_latency_seconds_bucket{model_name} vllm:e2e_request_latency_seconds_sum{model_name}
vllm:request_queue_time_seconds_sum{model_name} vllm:request_queue_time_seconds_bucket{model_name}
vllm:request_prefill_time_seconds_sum{model_name} vllm:request_decode_time_seconds_sum{model_name}
vllm:request_inference_time_seconds_bucket{model_name}
vllm:request_prompt_tokens_bucket{model_name} vllm:request_prompt_tokens_sum{model_name}
vllm:request_generation_tokens_bucket{model_name} vllm:request_generation_tokens_count{model_name}
vllm:request_max_num_generation_tokens_sum{model_name} vllm:request_params_n_bucket{model_name}
vllm:request_params_max_tokens_bucket{model_name} vllm:request_prefill_kv_computed_tokens_sum{model_name}
vllm:iteration_tokens_total_bucket{model_name} vllm:iteration_tokens_total_sum{model_name}
vllm:cache_config_info{block_size,num_gpu_blocks,cache_dtype}
http_requests_total{handler,status=2xx} http_request_duration_seconds_sum{handler}
http_request_duration_seconds_count{handler}
"""
"""What vLLM's own dashboards for Grafana query, and its documented names: labels, and values where they ask for one."""

Samples = Mapping[str, list[tuple[Mapping[str, str], float]]]


def parsed(text: str) -> Samples:
    found: dict[str, list[tuple[Mapping[str, str], float]]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


async def scraped(client: httpx.AsyncClient) -> Samples:
    response = await client.get("/metrics")
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/plain")
    return parsed(response.text)


def value(samples: Samples, name: str, **labels: str) -> float:
    """Of the one sample that has these labels."""
    [found] = [number for own, number in samples[name] if labels.items() <= own.items()]
    return found


async def complete(client: httpx.AsyncClient, **body: Any) -> httpx.Response:
    return await client.post("/v1/completions", json={"model": MODEL, "prompt": "Once", "temperature": 0, **body})


async def test_all_that_dashboards_of_vllm_ask_for_is_there(client: httpx.AsyncClient) -> None:
    await complete(client, max_tokens=3)
    samples = await scraped(client)
    for asked in VLLM_ASKS.split():
        name, _, rest = asked.removesuffix("}").partition("{")
        wanted = [label.partition("=") for label in rest.split(",")]
        matching = [
            labels for labels, _ in samples.get(name, ())
            if all(label in labels and (not text or labels[label] == text) for label, _, text in wanted)
        ]  # fmt: skip
        assert matching, asked
        assert all(labels.get("model_name", MODEL) == MODEL for labels in matching)


def queries(board: Mapping[str, Any]) -> Iterator[str]:
    for panel in board["panels"]:
        yield from (target["expr"] for target in panel["targets"])
    yield from (each["definition"] for each in board["templating"]["list"] if "definition" in each)


def test_our_dashboard_is_one() -> None:
    board = json.loads(BOARD.read_text())
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids)) > 10
    for panel in board["panels"]:
        assert panel["title"] and panel["targets"]
        assert panel["datasource"]["uid"] == "${datasource}", "whoever imports it chooses theirs"
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
    cells = [(p["gridPos"]["x"] + x, p["gridPos"]["y"] + y) for p in board["panels"]
             for x in range(p["gridPos"]["w"]) for y in range(p["gridPos"]["h"])]  # fmt: skip
    assert len(cells) == len(set(cells)), "panels lie over one another"


async def test_all_that_our_dashboard_asks_for_is_there(model: ServedModel, engine: ScriptedEngine) -> None:
    engine.stats = EngineStats(tiers=(TierStats("host", 1, 1, 1, 0),))
    app = app_for(model, api_keys=(ApiKey("k", "alice"),))
    client = client_of(app, headers={"Authorization": "Bearer k"})
    await complete(client, max_tokens=3)
    samples = await scraped(client)
    functions = {"sum", "rate", "max", "by", "histogram_quantile", "increase", "changes", "label_values", "le"}
    asked: set[str] = set()
    for query in queries(json.loads(BOARD.read_text())):
        bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]|by \([^)]*\)", "", query)
        names = set(re.findall(r"[a-z][a-z0-9_:]{3,}", bare)) - functions - {"model_name"}
        assert names, query
        asked |= names
        labels = set(re.findall(r"(\w+)[=!]~?\"", query)) | set(re.findall(r"by \((\w+)\)", query))
        for name in names:
            assert name in samples, query
            assert all(labels <= own.keys() for own, _ in samples[name]), query
    assert len(asked) > 25


async def test_requests_are_counted_by_how_they_end(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.num_cached_tokens = lambda request: 2
    (usage := (await complete(client, max_tokens=3)).json()["usage"])
    await complete(client, n=3, max_tokens=5)
    await complete(client, stop=["wör"], max_tokens=50)
    engine.fail_after = 2
    assert (await complete(client)).status_code == 500
    samples = await scraped(client)
    own = {"model_name": MODEL, "engine": "0"}
    ended = {reason: value(samples, "vllm:request_success_total", finished_reason=reason, **own)
             for reason in ("stop", "length", "abort", "error")}  # fmt: skip
    assert ended == {"stop": 1, "length": 4, "abort": 0, "error": 1}
    prompt = usage["prompt_tokens"]
    assert value(samples, "vllm:prompt_tokens_total") == 6 * prompt
    assert value(samples, "vllm:prompt_tokens_cached_total") == 12
    generated = 3 + 3 * 5 + len("Hello, wör".encode()) + 2
    assert value(samples, "vllm:generation_tokens_total") == generated
    assert value(samples, "vllm:request_generation_tokens_sum") == generated
    assert value(samples, "vllm:request_max_num_generation_tokens_sum") == generated - 10, "of three choices, one"
    assert value(samples, "vllm:request_params_n_bucket", le="1.0") == 3
    assert value(samples, "vllm:request_params_n_count") == 4
    assert value(samples, "vllm:request_params_max_tokens_count") == 6
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "request_decode_time_seconds"):
        assert value(samples, f"vllm:{name}_count") == 6
    assert value(samples, "vllm:inter_token_latency_seconds_count") == generated - 6
    http = {(labels["route"], labels["status"]): count for labels, count in samples["ingle_http_requests_total"]}
    assert http == {("/v1/completions", "200"): 3, ("/v1/completions", "500"): 1}
    assert value(samples, "http_requests_total", handler="/v1/completions", status="2xx") == 3
    assert "/metrics" not in {labels["handler"] for labels, _ in samples["http_requests_total"]}


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_is_an_abort(
    app: Starlette, engine: ScriptedEngine, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="ingle.access")
    engine.step_s = 0.01
    async with served(app) as port, client_of(app) as client:
        body = json.dumps({"prompt": "x", "ignore_eos": True, "max_tokens": 200, "stream": stream}).encode()
        lines = (
            "POST /v1/completions HTTP/1.1",
            "Host: a",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
        )
        head = "".join(f"{line}\r\n" for line in (*lines, "")).encode()
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head + body)
        await until(lambda: engine.num_steps > 3, within_s=5.0)
        assert value(await scraped(client), "ingle_http_requests_in_flight") == 2
        writer.close()
        await until(lambda: bool(engine.aborted), within_s=5.0)
        statistics = app.state.models.models[0].statistics
        await until(lambda: statistics.finished["abort"] == 1, within_s=5.0)
        await until(lambda: app.state.observers.statistics.in_flight == 0, within_s=5.0)
        samples = await scraped(client)
    [access] = [record.record for record in caplog.records if record.name == "ingle.access"]  # type: ignore[attr-defined]
    assert (access.status, access.aborted, access.finish_reasons) == (499, True, ["abort"])
    assert value(samples, "ingle_http_requests_total", route="/v1/completions", status="499") == 1
    assert value(samples, "vllm:request_success_total", finished_reason="abort") == 1


async def test_vectors_are_requests_too(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    def outputs(request: EngineRequest) -> Iterator[EngineOutput]:
        yield EngineOutput(request.id, [], "stop", pooled=b"\0" * 32, queued_s=0.7)

    engine._outputs = outputs  # type: ignore[method-assign]
    response = await client.post("/v1/embeddings", json={"model": MODEL, "input": ["one", "two"]})
    assert response.status_code == 200
    samples = await scraped(client)
    assert value(samples, "vllm:request_success_total", finished_reason="stop") == 2
    assert value(samples, "vllm:time_to_first_token_seconds_count") == 0, "none was drawn"
    assert value(samples, "vllm:request_queue_time_seconds_sum") == pytest.approx(1.4)


async def test_what_the_engine_says_of_itself(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    steps = [0] * (len(STEP_TOKENS) + 1)
    steps[0], steps[3], steps[-1] = 4, 2, 1
    engine.stats = EngineStats(
        num_running=3, num_waiting=5, num_compiling=1, num_pages=100, num_used_pages=25, num_cached_pages=30,
        num_steps=7, num_failed_steps=1, num_prompt_tokens=700, num_step_tokens=20_000, step_tokens=tuple(steps),
        num_queried_tokens=80, num_hit_tokens=32, num_preemptions=2, num_lower_queried_tokens=48,
        num_lower_hit_tokens=16, num_dropped_pages=4, tiers=(TierStats("host", 4096, 2, 3, 1),),
    )  # fmt: skip
    engine.status.ok = False
    samples = await scraped(client)
    assert value(samples, "vllm:num_requests_running") == 3
    assert value(samples, "vllm:num_requests_waiting_by_reason", reason="capacity") == 4
    assert value(samples, "vllm:num_requests_waiting_by_reason", reason="deferred") == 1
    assert value(samples, "vllm:kv_cache_usage_perc") == 0.25
    pages = {labels["state"]: count for labels, count in samples["ingle_kv_pages"]}
    assert pages == {"used": 25, "cached": 30, "free": 45}
    assert value(samples, "vllm:prefix_cache_hits_total") == 32
    assert value(samples, "vllm:external_prefix_cache_queries_total") == 48
    assert value(samples, "vllm:external_prefix_cache_hits_total") == 16
    sources = {labels["source"]: count for labels, count in samples["vllm:prompt_tokens_by_source_total"]}
    assert sources == {"local_compute": 80 - 32 - 16, "local_cache_hit": 32, "external_kv_transfer": 16}
    tier = {"tier": "host", "model_name": MODEL}
    assert value(samples, "ingle_prompt_cache_bytes", **tier) == 4096
    assert value(samples, "ingle_prompt_cache_read_pages_total", **tier) == 2
    assert value(samples, "ingle_prompt_cache_written_pages_total", **tier) == 3
    assert value(samples, "ingle_prompt_cache_damaged_pages_total", **tier) == 1
    assert value(samples, "ingle_prompt_cache_dropped_pages_total") == 4
    buckets = {labels["le"]: count for labels, count in samples["vllm:iteration_tokens_total_bucket"]}
    assert (buckets["1.0"], buckets["8.0"], buckets["32.0"], buckets["16384.0"], buckets["+Inf"]) == (4, 4, 6, 6, 7)
    assert value(samples, "ingle_engine_up") == 0
    assert value(samples, "vllm:cache_config_info", block_size="16", num_gpu_blocks="33") == 1


async def test_paths_that_clients_make_up_are_one_route(client: httpx.AsyncClient) -> None:
    for number in range(50):
        await client.get(f"/nowhere/{number}")
        await client.get(f"/v1/models/{number}/x")
    await client.request("BREW", "/v1/models")
    samples = await scraped(client)
    routes = [(labels["route"], labels["method"]) for labels, _ in samples["ingle_http_requests_total"]]
    assert sorted(routes) == [("-", "GET"), ("/v1/models", "other"), ("/v1/models/{model:path}", "GET")]
    assert value(samples, "ingle_http_requests_total", route="-", status="404") == 50


async def test_it_asks_for_a_key_like_all_else_and_tells_refusals(model: ServedModel) -> None:
    app = app_for(model, api_keys=("secret",))
    client = client_of(app)
    assert (await client.get("/metrics")).status_code == 401
    samples = await scraped(client_of(app, headers={"Authorization": "Bearer secret"}))
    assert value(samples, "ingle_http_requests_total", route="/metrics", status="401") == 1


async def test_who_has_used_how_much(model: ServedModel, engine: ScriptedEngine) -> None:
    app = app_for(model, api_keys=(ApiKey("k", "alice"), ApiKey("l", "bob")))
    engine.num_cached_tokens = lambda request: 2
    for key, count in (("k", 2), ("l", 1), ("wrong", 3)):
        for _ in range(count):
            await complete(client_of(app, headers={"Authorization": f"Bearer {key}"}), max_tokens=4)
    samples = await scraped(client_of(app, headers={"Authorization": "Bearer k"}))
    used = {labels["client"]: count for labels, count in samples["ingle_client_generation_tokens_total"]}
    assert used == {"alice": 8, "bob": 4}
    assert value(samples, "ingle_client_prompt_tokens_total", client="alice") == 10
    assert value(samples, "ingle_client_cached_tokens_total", client="bob") == 2
    assert value(samples, "ingle_client_requests_total", client="alice") == 2


async def test_openmetrics_for_who_asks_for_it(client: httpx.AsyncClient) -> None:
    from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics

    await complete(client, max_tokens=2)
    response = await client.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    assert response.headers["content-type"].startswith("application/openmetrics-text")
    names = {family.name for family in openmetrics(response.text)}
    assert {"vllm:generation_tokens", "ingle_http_requests", "process_resident_memory_bytes"} <= names


async def test_processes_and_what_runs(client: httpx.AsyncClient) -> None:
    samples = await scraped(client)
    if sys.platform == "linux":
        memory = {labels["process"]: count for labels, count in samples["ingle_resident_memory_bytes"]}
        assert memory.keys() == {"server", "engine"} and min(memory.values()) > 1 << 20
        assert value(samples, "process_resident_memory_bytes") > 1 << 20
    [(build, one)] = samples["ingle_build_info"]
    assert one == 1 and build["version"]
    assert value(samples, "ingle_model_bytes", kind="weights") == 4000


async def test_before_a_model_is_loaded_there_is_something_to_read() -> None:
    from ingle.server.access import Access
    from ingle.server.app import create_app
    from ingle.server.loading import Loading

    samples = await scraped(client_of(create_app(ModelPool(), Access(), loading=Loading())))
    assert value(samples, "ingle_event_loop_lag_seconds_count") == 0
    assert not samples.get("vllm:num_requests_running")


async def test_several_models_are_told_apart(model: ServedModel) -> None:
    from ingle.server.access import Access
    from ingle.server.app import create_app
    from ingle.server.statistics import ModelStatistics

    other = replace(model, names=('two "quoted"\n',), statistics=ModelStatistics())
    client = client_of(create_app(ModelPool([model, other]), Access()))
    await complete(client, max_tokens=2)
    samples = await scraped(client)
    assert value(samples, "vllm:generation_tokens_total", model_name=MODEL) == 2
    assert value(samples, "vllm:generation_tokens_total", model_name='two "quoted"\n') == 0


def test_all_of_it_is_json_for_a_page(model: ServedModel) -> None:
    statistics = ServerStatistics()
    for each in (statistics, model.statistics, EngineStats()):
        assert msgspec.json.decode(msgspec.json.encode(each), type=type(each)) == each


def test_a_histogram_counts_values_up_to_a_bound() -> None:
    histogram = Histogram.of((1.0, 2.0, 5.0))
    for number in (0.0, 1.0, 1.5, 2.0, 5.0, 5.1, 1e9):
        histogram.observe(number)
    assert histogram.counts == [2, 2, 1, 2] and histogram.total == pytest.approx(1e9 + 14.6)


@asynccontextmanager
async def watched() -> AsyncIterator[ServerStatistics]:
    statistics = ServerStatistics()
    watching = asyncio.create_task(statistics.watch_loop())
    try:
        yield statistics
    finally:
        watching.cancel()


async def test_a_loop_that_is_held_up_is_seen() -> None:
    import time

    async with watched() as statistics:
        lag = statistics.loop_lag_s
        await until(lambda: sum(lag.counts) > 0, within_s=5.0)
        before = lag.total
        time.sleep(0.35)  # noqa: ASYNC251 (what must not be done)
        await until(lambda: lag.total - before > 0.2, within_s=5.0)


def test_the_library_is_not_imported_before_it_is_asked_for() -> None:
    code = (
        "import sys, ingle.server.launch, ingle.server.app\n"
        "print(*(set(sys.modules) & {'prometheus_client', 'opentelemetry', 'opentelemetry.sdk', 'http.server'}))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []
