"""`ingle serve` as its users meet it: curl, the openai client, clients that leave, and bad input."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.e2e.conftest import Server, start_server, until
from tests.support import save_checkpoint

CONVERSATIONS = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [{"role": "system", "content": "Answer in Chinese."}, {"role": "user", "content": "你好！你是谁？🙂"}],
    [
        {"role": "user", "content": "Write a haiku about rain."},
        {"role": "assistant", "content": "Rain on the window"},
        {"role": "user", "content": "Now about snow."},
    ],
]


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def curl(server: Server, path: str, body: Any) -> dict[str, Any]:
    command = ["curl", "-sS", f"{server.url}{path}", "-H", "Content-Type: application/json", "-d", json.dumps(body)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def test_every_client_gets_the_same_greedy_text(server: Server, client: openai.OpenAI, smollm2_gguf: Path) -> None:
    from ingle import LLM, SamplingParams

    llm = LLM(str(smollm2_gguf), dtype="float32", kv_cache_memory="512MiB")
    for messages in CONVERSATIONS:
        options: dict[str, Any] = {"model": "smollm2:135m", "messages": messages, "temperature": 0, "max_tokens": 40}
        answer = client.chat.completions.create(**options)
        text = answer.choices[0].message.content
        assert text and answer.usage is not None and answer.usage.completion_tokens <= 40
        chunks = [c for c in client.chat.completions.create(**options, stream=True) if c.choices]
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == text
        assert chunks[-1].choices[0].finish_reason == answer.choices[0].finish_reason
        assert curl(server, "/v1/chat/completions", options)["choices"][0]["message"]["content"] == text
        greedy = SamplingParams(temperature=0, max_tokens=40)
        assert llm.chat(messages, sampling_params=greedy)[0].outputs[0].text == text
    prompt = "Once upon a time"
    completion = client.completions.create(model="smollm2:135m", prompt=prompt, temperature=0, max_tokens=20)
    offline = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=20), use_tqdm=False)
    assert completion.choices[0].text == offline[0].outputs[0].text


def test_a_repeated_prompt_is_read_from_the_cache(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "Tell me about the sea. " * 20}]
    create = client.chat.completions.create
    first, second = (create(model="smollm2:135m", messages=messages, temperature=0, max_tokens=8) for _ in range(2))
    assert first.choices[0].message.content == second.choices[0].message.content
    assert second.usage.prompt_tokens_details.cached_tokens > 100
    assert second.usage.prompt_tokens == first.usage.prompt_tokens


def test_what_the_catalog_recommends_is_what_a_request_gets_that_says_nothing(client: openai.OpenAI) -> None:
    def answers(**sampling: float) -> list[str]:
        completion = client.completions.create(
            model="smollm2:135m", prompt="Once", n=8, seed=3, max_tokens=6, **sampling
        )
        return [choice.text for choice in completion.choices]

    assert answers() == answers(temperature=0.2, top_p=0.9) == answers(temperature=0.2) != answers(temperature=1)
    (model,) = client.models.list().data
    defaults = model.model_dump()["default_sampling_params"]
    assert (defaults["temperature"], defaults["top_p"]) == (0.2, 0.9)


def test_models_and_usage_in_streams(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.model_dump()["max_model_len"]) == ("smollm2:135m", 8192)
    stream = client.chat.completions.create(
        model=model.id, messages=CONVERSATIONS[0], max_tokens=5, stream=True, stream_options={"include_usage": True}
    )
    *_, last = stream
    assert last.choices == [] and last.usage is not None and last.usage.completion_tokens <= 5


def test_seed_decides_whatever_else_runs(server: Server, client: openai.OpenAI) -> None:
    def sampled() -> list[str]:
        answer = client.completions.create(
            model="smollm2:135m", prompt="The", n=2, seed=7, temperature=1.0, top_p=0.95, max_tokens=16
        )
        return [choice.text for choice in answer.choices]

    alone = sampled()
    with httpx.stream("POST", f"{server.url}/v1/completions", json=endless_body(), timeout=30) as busy:
        lines = busy.iter_lines()  # to be kept: the stream ends with it
        next(lines)
        assert sampled() == alone
    assert alone[0] != alone[1]


def endless_body(**overrides: Any) -> dict[str, Any]:
    return {
        "model": "smollm2:135m",
        "prompt": "One",
        "max_tokens": 4000,
        "ignore_eos": True,
        "stream": True,
        **overrides,
    }


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_costs_nothing_more(server: Server, stream: bool) -> None:
    assert until(lambda: server.running() == 0)
    url, body = f"{server.url}/v1/completions", endless_body(stream=stream)
    with contextlib.suppress(httpx.ReadTimeout), httpx.stream("POST", url, json=body, timeout=2.0) as response:
        lines = response.iter_lines()  # to be kept: the stream ends with it
        next(lines)
        assert server.running() == 1
    assert until(lambda: server.running() == 0, seconds=2.0), "the request decodes on"


def test_prometheus_reads_what_the_engine_has_done(server: Server, client: openai.OpenAI) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    def scraped() -> dict[str, float]:
        text = httpx.get(f"{server.url}/metrics").raise_for_status().text
        samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
        return {f"{s.name} {s.labels.get('finished_reason', '')}".strip(): s.value for s in samples}

    before = scraped()
    prompt = "Metrics: " + " ".join(map(str, range(40)))
    for _ in range(2):
        answer = client.completions.create(model="smollm2:135m", prompt=prompt, max_tokens=7, temperature=0, seed=1)
    assert answer.usage is not None
    after = scraped()
    assert after["vllm:num_requests_running"] == 0
    gained = {name: value - before.get(name, 0.0) for name, value in after.items()}
    prompts, generated = 2 * answer.usage.prompt_tokens, 2 * answer.usage.completion_tokens
    assert (gained["vllm:prompt_tokens_total"], gained["vllm:generation_tokens_total"]) == (prompts, generated)
    assert gained["vllm:prefix_cache_hits_total"] == gained["vllm:prompt_tokens_cached_total"] > 16
    assert gained["ingle_engine_steps_total"] >= 8 and gained["vllm:iteration_tokens_total_sum"] >= generated
    assert sum(gained[f"vllm:request_success_total {reason}"] for reason in ("stop", "length")) == 2
    assert gained["vllm:request_queue_time_seconds_count"] == 2 and after["vllm:kv_cache_usage_perc"] == 0
    assert after["process_resident_memory_bytes"] > 1 << 24


def test_one_line_of_the_log_says_what_was_loaded(server: Server) -> None:
    (line,) = (line for line in server.log if "INFO smollm2:135m: " in line)
    assert "llama, 134.5 M parameters, stored as Q4_1 79%, Q8_0 21%, F32 0%; " in line
    assert "on cpu" in line and "context 8192 tokens" in line and "pages of 16 (1.00 GiB in float32)" in line
    assert line.endswith("the model's sampling defaults: temperature 0.2, top_p 0.9 (ingle's catalog)\n")


BAD_BODIES = {
    "malformed": (b"{", "JSON"),
    "not-an-object": (b"[1]", ""),
    "no-messages": (b'{"model": "smollm2:135m"}', "messages"),
    "wrong-type": (b'{"messages": 5}', "messages"),
    "empty": (b'{"messages": []}', "messages"),
    "negative": (b'{"messages": [{"role": "user", "content": "x"}], "temperature": -1}', "temperature"),
    "nan": (b'{"messages": [{"role": "user", "content": "x"}], "top_p": NaN}', ""),
    "unsupported": (b'{"messages": [{"role": "user", "content": "x"}], "use_beam_search": true}', "use_beam_search"),
    "too-long": (json.dumps({"messages": [{"role": "user", "content": "word " * 9000}]}).encode(), "8192"),
}


@pytest.mark.parametrize("name", BAD_BODIES)
def test_bad_requests_get_one_clear_error_and_the_server_goes_on(server: Server, name: str) -> None:
    body, named = BAD_BODIES[name]
    url, headers = f"{server.url}/v1/chat/completions", {"Content-Type": "application/json"}
    response = httpx.post(url, content=body, headers=headers, timeout=30)
    error = response.json()["error"]
    assert response.status_code == 400 and error["type"] == "invalid_request_error"
    assert named in f"{error['message']} {error['param']}" and "\n" not in error["message"]
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_an_unknown_model_is_a_404_that_names_the_known_one(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="smollm2:135m"):
        client.chat.completions.create(model="gpt-5", messages=CONVERSATIONS[0])


def refused(*arguments: str) -> tuple[int, str]:
    """Exit code and stderr of a server that cannot start."""
    command = [sys.executable, "-m", "ingle", "serve", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stderr


def test_a_taken_port_is_one_line(server: Server, smollm2_gguf: Path) -> None:
    code, text = refused(str(smollm2_gguf), "--port", server.url.rsplit(":", 1)[1])
    assert code != 0 and "is taken" in text and text.count("\n") == 1


@pytest.mark.parametrize("damage", ["missing", "truncated", "garbage", "no-weights", "bad-safetensors", "bad-config"])
def test_a_model_that_cannot_be_loaded_is_one_line(damage: str, tmp_path: Path, smollm2_gguf: Path) -> None:
    model = tmp_path / "model.gguf"
    if damage == "truncated":
        model.write_bytes(smollm2_gguf.read_bytes()[:3_000_000])
    elif damage == "garbage":
        model.write_bytes(b"GGUF" + bytes(range(256)) * 40)
    elif damage != "missing":
        model = save_checkpoint(tmp_path / "folder")
        tokenizer = {"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}
        (model / "tokenizer.json").write_text(json.dumps(tokenizer))
        weights = model / "model.safetensors"
        if damage == "no-weights":
            weights.unlink()
        elif damage == "bad-safetensors":
            weights.write_bytes(weights.read_bytes()[:-100])
        else:
            (model / "config.json").write_text('{"model_type": "llama", "hidden_size": -4}')
    code, text = refused(str(model), "--port", "0")
    lines = [line for line in text.splitlines() if " INFO " not in line]
    assert code != 0 and len(lines) == 1, text
    assert lines[0].startswith("ingle: ") and "Traceback" not in text


def test_all_that_does_not_run_is_refused_at_once(tmp_path: Path) -> None:
    """What the tokenizer lacks and what the engine does not do, by two processes, in one list."""
    folder = save_checkpoint(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"logit_scale": 3.0}))
    code, text = refused(str(folder), "--port", "0", "--rope-theta", "0.5")
    lines = [line for line in text.splitlines() if " INFO " not in line]
    assert code == 1 and lines[0] == "ingle: 3 things do not run here:" and len(lines) == 4, text
    for part in ("rope_theta is 0.5", "logit_scale is 3.0", "tokenizer.json is missing; download"):
        assert any(line.startswith("  - ") and part in line for line in lines)


@pytest.mark.parametrize("signals", [1, 2])
def test_a_stopped_server_tells_those_it_did_not_finish(signals: int, smollm2_gguf: Path) -> None:
    """After its grace, or at once when it is told twice."""
    server = start_server("smollm2:135m", "--kv-cache-memory", "1GiB")
    url = f"{server.url}/v1/completions"

    def ask(stream: bool) -> httpx.Response:
        return httpx.post(url, json=endless_body(max_tokens=8000, stream=stream), timeout=60)

    with ThreadPoolExecutor(2) as pool:
        whole, streamed = pool.submit(ask, False), pool.submit(ask, True)
        assert until(lambda: server.running() == 2)
        for _ in range(signals):
            server.process.send_signal(signal.SIGTERM if signals == 1 else signal.SIGINT)
            time.sleep(0.3)
    assert (whole.result().status_code, whole.result().json()["error"]["code"]) == (503, "engine_unavailable")
    last = streamed.result().text.strip().rpartition("data: ")[2]
    assert "the server is being stopped" in json.loads(last)["error"]["message"]
    assert server.process.wait(timeout=20) == (0 if signals == 1 else 130)
    assert "ASGI" not in server.text() and "Traceback" not in server.text()


def test_end_tokens_that_the_model_lacks_are_left_out_with_a_notice(tmp_path: Path) -> None:
    """Of another vocabulary: before, `min_tokens` made them an index error that ended the server."""
    folder = save_checkpoint(tmp_path, vocab_size=300)
    vocab = {f"<{i}>": i for i in range(300)}
    (folder / "tokenizer.json").write_text(
        json.dumps({"version": "1.0", "model": {"type": "BPE", "vocab": vocab, "merges": []}})
    )
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 32007, 300]}))
    server = start_server(str(folder), "--served-model-name", "tiny", "--kv-cache-memory", "64MiB")
    assert "notice: end token 32007, 300 is left out: the model has 300 tokens, from 0 to 299" in server.text()
    body = {"model": "tiny", "prompt": [5, 6], "max_tokens": 4, "min_tokens": 3}
    for _ in range(2):
        assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=20).status_code == 200
    assert server.stop() == 0


def test_the_server_ends_with_its_engine_where_there_is_no_watchdog(tiny_model: Path) -> None:
    server = start_server(str(tiny_model), "--served-model-name", "tiny", "--kv-cache-memory", "64MiB", "--no-watchdog")
    os.kill(server.engine_pid(), signal.SIGKILL)
    assert server.process.wait(timeout=20) == 1
    assert "ingle: the engine died: killed by SIGKILL" in server.text()


def test_the_engine_ends_with_its_server(tiny_server: Server) -> None:
    child = tiny_server.engine_pid()
    tiny_server.process.kill()
    tiny_server.process.wait()
    assert until(
        lambda: not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split()[2]
    )


def test_chat_without_a_template_says_so_and_completions_work(tiny_server: Server) -> None:
    try:
        chat = httpx.post(f"{tiny_server.url}/v1/chat/completions", json={"messages": CONVERSATIONS[0]})
        assert chat.status_code == 400 and "--chat-template" in chat.json()["error"]["message"]
        body = {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 3}
        completion = httpx.post(f"{tiny_server.url}/v1/completions", json=body, timeout=30)
        assert completion.json()["usage"]["completion_tokens"] >= 1
    finally:
        tiny_server.stop()
