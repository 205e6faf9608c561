"""Random requests of all fields at the server of a random tiny model: each is answered, and the server serves the next.

A failing example is printed, with the seed of its model. The first models take seconds; `make test-all` has more of
them, and more requests.
"""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from ingle.server.openai.protocol import ChatCompletionRequest, CompletionRequest
from tests.e2e.conftest import Server, start_server
from tests.support import save_checkpoint
from tests.text import toys

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PARTS = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}\n{% endfor %}"
USERS_ONLY = "{% for m in messages if m.role in ['user', 'assistant'] %}[{{ m.content | trim }}]{% endfor %}"
SPECIALS = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<s>", "</s>", "<unk>"]


def few_tokens() -> Tokenizer:
    """A vocabulary smaller than the number of log probabilities that may be asked for."""
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate("abcĠĊ12")}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    return backend


def random_model(folder: Path, seed: int) -> Path:
    rng = random.Random(seed)
    kinds = [(toys.byte_level, "<|im_end|>"), (toys.sentence_piece, "</s>"), (few_tokens, "</s>")]
    make, eos = kinds[seed % len(kinds)]
    backend = make()
    save_checkpoint(
        folder,
        rng.choice(["llama", "qwen2", "qwen3", "gemma2", "mistral"]),
        seed=seed,
        vocab_size=backend.get_vocab_size() + rng.choice([0, 1, 13]),  # padded, as some are
        num_hidden_layers=rng.choice([1, 2]),
        tie_word_embeddings=rng.choice([True, False]),
        bos_token_id=None,
        eos_token_id=backend.token_to_id(eos),
    )
    config = {"eos_token": eos, "chat_template": rng.choice([CHATML, PARTS, USERS_ONLY])}
    return toys.write_folder(
        folder, backend, config__json=(folder / "config.json").read_text(), tokenizer_config__json=config
    )


# ---- requests

text = st.text(st.sampled_from([*"abc 12\n", "你", "é"]), max_size=4)
some_text = st.text(st.sampled_from([*"abc12", "😀"]), min_size=1, max_size=4)
words = st.lists(some_text | st.sampled_from(SPECIALS), min_size=1, max_size=2).map(" ".join)
token_id = st.integers(0, 8)  # which every model has
any_id = st.integers(0, 430) | st.sampled_from([-1, 2**31 - 1, 2**31, 10**30])
boolean = st.booleans() | st.none()


def of(*values: Any) -> st.SearchStrategy[Any]:
    return st.sampled_from(values)


def biases(ids: st.SearchStrategy[int]) -> st.SearchStrategy[dict[str, float]]:
    return st.dictionaries(ids.map(str), of(-100, 100, 1.5, 0), min_size=1, max_size=3)


FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "n": of(1, 2, 3),
    "temperature": of(0, 1, 0.7, 100, 1e-9),
    "top_p": of(1, 0.5, 1e-9),
    "top_k": of(-1, 0, 1, 3, 50),
    "min_p": of(0, 0.1, 1),
    "seed": of(-1, 3, 7, -2, 2**63 - 1),
    "presence_penalty": of(-2, 2),
    "frequency_penalty": of(-2, 1.5),
    "repetition_penalty": of(1.3, 100, 1e-3),
    "logit_bias": biases(token_id),
    "stop": words | st.lists(words, max_size=3) | st.none(),
    "stop_token_ids": st.lists(token_id, max_size=3),
    "include_stop_str_in_output": boolean,
    "ignore_eos": boolean,
    "min_tokens": of(0, 1, 4),
    "max_tokens": of(1, 3, 9, 9.0, -1),
    "prompt_logprobs": of(0, 1, 20),
    "skip_special_tokens": boolean,
    "add_special_tokens": boolean,
    "stream_options": of(None),
    "user": text,
    "metadata": st.dictionaries(text, words | st.integers(), max_size=2),
    "safety_identifier": text,
    "prompt_cache_key": text,
    "timeout": of(60, 60.5, None),
}
prompt = words | st.lists(words, min_size=1, max_size=3)
prompt_ids = st.lists(token_id, min_size=1, max_size=64)
OF_COMPLETIONS = {
    "prompt": prompt | prompt_ids | st.lists(prompt_ids, min_size=1, max_size=3),
    "echo": boolean,
    "best_of": of(None),
    "logprobs": of(0, 3, 20),
}
parts = st.lists(words.map(lambda content: {"type": "text", "text": content}), min_size=1, max_size=2)
message = st.fixed_dictionaries(
    {"role": of("user"), "content": words | parts},
    optional={"name": text, "reasoning_content": words},
)
any_message = st.fixed_dictionaries(
    {"role": of("user", "assistant", "system", "developer", "tool", "function"), "content": text | parts},
    optional={"name": text, "tool_call_id": text, "reasoning_content": words},
)
OF_CHATS = {
    "messages": st.lists(message, min_size=1, max_size=2),
    "max_completion_tokens": of(None),
    "logprobs": of(True),
    "top_logprobs": of(None),
    "add_generation_prompt": boolean,
    "chat_template_kwargs": st.dictionaries(of("enable_thinking", "x"), boolean, max_size=2),
}
EDGES = of(0, 1, -1, 2, 5.0, 0.5, 20, 21, 2**31, 2**63 - 1, -(2**63), 2**64, 10**400, 1e300)
NUMBERS = ["n", "temperature", "top_p", "top_k", "min_p", "seed", "presence_penalty", "frequency_penalty"]
NUMBERS += ["repetition_penalty", "min_tokens", "max_tokens", "prompt_logprobs"]
ODD: dict[str, st.SearchStrategy[Any]] = {
    **dict.fromkeys(NUMBERS, EDGES),
    "logit_bias": biases(any_id),
    "stop": st.lists(text, max_size=3),
    "stop_token_ids": st.lists(any_id, max_size=3),
    "stream_options": of({"include_usage": True}, {"include_usage": False}),
}
ODD_OF_COMPLETIONS = ODD | {
    "prompt": st.lists(any_id, max_size=70) | text | st.lists(st.lists(any_id, max_size=3) | text, max_size=3),
    "best_of": EDGES,
    "logprobs": EDGES,
}
ODD_OF_CHATS = ODD | {
    "messages": st.lists(any_message, min_size=1, max_size=4),
    "max_completion_tokens": EDGES,
    "logprobs": boolean,
    "top_logprobs": EDGES,
    "chat_template_kwargs": st.dictionaries(of("messages", "x"), boolean, max_size=2),
}
Strategies = dict[str, st.SearchStrategy[Any]]


@st.composite
def body(draw: st.DrawFn, own: str, usual: Strategies, odd: Strategies) -> dict[str, Any]:
    """The field that must be there, and some of the others; in every third one value may be beyond what is taken."""
    names = draw(st.lists(st.sampled_from(sorted(usual.keys() - {own})), max_size=6, unique=True))
    drawn = {"max_tokens": 9} | {name: draw(usual[name]) for name in (own, *names)}
    if draw(st.integers(0, 2)) == 0:
        name = draw(st.sampled_from(sorted(odd)))
        drawn[name] = draw(odd[name])
    return drawn


requests = st.tuples(of("/v1/completions"), body("prompt", FIELDS | OF_COMPLETIONS, ODD_OF_COMPLETIONS)) | st.tuples(
    of("/v1/chat/completions"), body("messages", FIELDS | OF_CHATS, ODD_OF_CHATS)
)


BOUND = {"response_format", "structured_outputs", "guided_choice", "guided_grammar", "guided_json", "guided_regex"}
LISTS = {"allowed_token_ids", "bad_words"}
ELSEWHERE = {
    *("cache_salt", "priority", "prompt_cache_retention", "request_id", "return_progress", "return_token_ids"),
    *("return_tokens_as_token_ids", "service_tier", "spaces_between_special_tokens", "store", "verbosity"),
    *("truncate_prompt_tokens", "suffix", "continue_final_message", "documents", "echo", "include_reasoning"),
    *("parallel_tool_calls", "reasoning_effort", "thinking_token_budget", "tool_choice", "tools"),
}
"""Fields that `test_schemathesis` draws: here each answer is held to what its fields say."""


def test_all_fields_are_drawn() -> None:
    shared = {"model", "stream", *BOUND, *LISTS, *ELSEWHERE}
    for kind, own in ((CompletionRequest, OF_COMPLETIONS), (ChatCompletionRequest, OF_CHATS)):
        drawn = FIELDS.keys() | own.keys()
        assert drawn <= kind.model_fields.keys() <= drawn | shared


# ---- what must hold


class Client:
    def __init__(self, server: Server, seed: int) -> None:
        self.server = server
        self.seed = seed
        self.http = httpx.Client(base_url=server.url, timeout=30)
        self.known = self.probe()

    def probe(self) -> Any:
        sent = {"prompt": [3, 4, 5], "temperature": 0, "max_tokens": 8, "ignore_eos": True, "logprobs": 2}
        response = self.http.post("/v1/completions", json=sent)
        assert response.status_code == 200, response.text
        [choice] = response.json()["choices"]
        return choice["text"], choice["logprobs"]["tokens"], choice["logprobs"]["token_logprobs"]

    def check_next(self) -> None:
        *same, logprobs = self.known
        # Sums round otherwise in other batches, in the last digits.
        wanted = (*same, pytest.approx(logprobs, abs=1e-4))
        assert self.probe() == wanted, f"model {self.seed} answers another way than before"

    def post(self, path: str, sent: dict[str, Any]) -> httpx.Response:
        try:
            return self.http.post(path, json=sent)
        except httpx.HTTPError as error:
            raise AssertionError(
                f"model {self.seed}: no answer to {path} {sent}: {error}\n{self.server.text()}"
            ) from None

    def check(self, path: str, sent: dict[str, Any]) -> None:
        whole = self.post(path, {k: v for k, v in sent.items() if k != "stream_options"})
        assert whole.status_code in (200, 400), f"model {self.seed}: {whole.status_code} {whole.text}"
        if whole.status_code == 400:
            error = whole.json()["error"]
            assert error["message"] and not re.search(r'Traceback|File "|\.py|Error\b|pydantic', error["message"])
        else:
            check_answer(path, sent, whole.json())
        streamed = self.post(path, sent | {"stream": True})
        best_known_at_last = (sent.get("best_of") or 1) > (sent.get("n") or 1)
        if whole.status_code == 400 or sent.get("prompt_logprobs") is not None or best_known_at_last:
            assert streamed.status_code == 400
        else:
            check_stream(sent, streamed, whole.json())

    def leave(self, path: str, sent: dict[str, Any]) -> None:
        with self.http.stream("POST", path, json=sent | {"stream": True}) as response:
            for _ in itertools.islice(response.iter_raw(), 1):
                pass


def check_answer(path: str, sent: dict[str, Any], answer: dict[str, Any]) -> None:
    num_prompts = 1
    if "prompt" in sent and isinstance(sent["prompt"], list) and not isinstance(sent["prompt"][0], int):
        num_prompts = len(sent["prompt"])
    assert len(answer["choices"]) == num_prompts * int(sent.get("n") or 1)
    usage, num_scored = answer["usage"], 0
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    for choice in answer["choices"]:
        assert choice["finish_reason"] in ("stop", "length")
        logprobs = choice["logprobs"]
        if path.startswith("/v1/chat"):
            num_scored += len(logprobs["content"]) if logprobs else 0
            for entry in (logprobs or {"content": []})["content"]:
                check_ranked(entry["logprob"], [top["logprob"] for top in entry["top_logprobs"]])
            continue
        if not logprobs:
            continue
        offsets = logprobs["text_offset"]
        num_scored += len(offsets)
        assert offsets == sorted(offsets) and len(offsets) == len(logprobs["tokens"])
        for logprob, top in zip(logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True):
            if logprob is not None:
                check_ranked(logprob, list(top.values())[1:])
        if choice["finish_reason"] == "length" and not sent.get("stop"):
            assert not offsets or offsets[-1] <= len(choice["text"])
    if sent.get("logprobs") not in (None, False):
        echoed = usage["prompt_tokens"] * int(sent.get("n") or 1) if sent.get("echo") else 0
        assert num_scored == usage["completion_tokens"] + echoed


def check_ranked(chosen: float, top: list[float]) -> None:
    assert chosen <= 0 and top == sorted(top, reverse=True)


def check_stream(sent: dict[str, Any], response: httpx.Response, whole: dict[str, Any]) -> None:
    assert response.status_code == 200, response.text
    *lines, end = response.text.split("\n\n")
    assert end == "" and lines.pop() == "data: [DONE]"
    texts = dict.fromkeys(range(len(whole["choices"])), "")
    reasons: dict[int, Any] = {}
    for line in lines:
        for choice in json.loads(line.removeprefix("data: "))["choices"]:
            assert choice["index"] not in reasons, "a finished choice speaks"
            texts[choice["index"]] += choice["delta"].get("content", "") if "delta" in choice else choice["text"]
            if choice["finish_reason"] is not None:
                reasons[choice["index"]] = choice["finish_reason"]
    assert reasons.keys() == texts.keys()
    if sent.get("seed") not in (None, -1) or sent.get("temperature") == 0:  # else each time is another
        for choice in whole["choices"]:
            text = choice["message"]["content"] if "message" in choice else choice["text"]
            assert (texts[choice["index"]], reasons[choice["index"]]) == (text, choice["finish_reason"])


@pytest.fixture(scope="module", params=[0, 1, 2, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(3, 8))])
def client(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    seed: int = request.param
    folder = random_model(tmp_path_factory.mktemp(f"model{seed}"), seed)
    limits = ["--kv-cache-memory", "2MiB", "--max-model-len", "96", "--max-num-seqs", "4", "--block-size", "8"]
    server = start_server(str(folder), "--dtype", "float32", "--device", "cpu", *limits, "--disable-access-log")
    try:
        yield Client(server, seed)
    finally:
        assert server.stop() == 0, server.text()
    assert "Traceback" not in server.text(), server.text()


def check_batch(client: Client, batch: list[tuple[str, dict[str, Any]]], leaves: bool) -> None:
    with ThreadPoolExecutor(len(batch)) as pool:
        for done in [pool.submit(client.check, *each) for each in batch]:
            done.result()
    if leaves:
        client.leave(*batch[0])
    client.check_next()


COMMON = {
    "deadline": None,
    "derandomize": True,
    "suppress_health_check": list(HealthCheck),
    "phases": [Phase.generate, Phase.shrink],
}
batches = st.lists(requests, min_size=1, max_size=3)


@settings(max_examples=100, **COMMON)
@given(batch=batches, leaves=st.booleans())
def test_every_request_is_answered_and_the_next_is_served(client: Client, batch: Any, leaves: bool) -> None:
    check_batch(client, batch, leaves)


@pytest.mark.slow
@settings(max_examples=1000, **COMMON)
@given(batch=batches, leaves=st.booleans())
def test_many_requests_are_answered_and_the_next_is_served(client: Client, batch: Any, leaves: bool) -> None:
    check_batch(client, batch, leaves)
