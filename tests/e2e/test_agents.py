"""What agents ask for in turn after turn, from the real server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest
from tokenizers import pre_tokenizers

from tests.e2e.conftest import Server, start_server
from tests.support import save_checkpoint

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)
RULES = "".join(f"Rule {number}: do no harm, and be brief about it.\n" for number in range(140))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A random model that knows every byte."""
    folder = save_checkpoint(tmp_path_factory.mktemp("bytes"), vocab_size=300, max_position_embeddings=16384)
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(f"<{i}>" for i in range(44))]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    tokenizer = {
        "version": "1.0",
        "model": {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "merges": []},
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    started = start_server(
        str(folder), "--served-model-name", "tiny", "--kv-cache-memory", "64MiB", "--max-model-len", "16384",
        "--chat-template", TEMPLATE,
    )  # fmt: skip
    yield started
    assert started.stop() == 0, started.text()


@pytest.fixture
def client(server: Server) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="any", max_retries=0) as client:
        yield client


def test_a_header_that_changes_costs_no_prefix(client: anthropic.Anthropic) -> None:
    """As Claude Code begins its system text, each time with another number."""

    def turn(number: str, messages: list[Any]) -> anthropic.types.Message:
        header = f"x-anthropic-billing-header: cc_version=2.1.177.{number}; cc_entrypoint=cli; cch={number}aa;"
        system: list[Any] = [{"type": "text", "text": header}, {"type": "text", "text": RULES}]
        return client.messages.create(model="tiny", max_tokens=8, system=system, messages=messages)

    def found(message: anthropic.types.Message) -> float:
        usage = message.usage
        assert usage.cache_read_input_tokens is not None
        return usage.cache_read_input_tokens / (usage.cache_read_input_tokens + usage.input_tokens)

    asked: list[Any] = [{"role": "user", "content": "hello"}]
    first = turn("01c", asked)
    assert found(first) < 0.01
    again = turn("9fe", asked)
    assert found(again) >= 0.99
    second = turn("36e", [*asked, {"role": "assistant", "content": "x"}, {"role": "user", "content": "and?"}])
    assert found(second) >= 0.99


def test_a_prompt_may_only_be_read(client: anthropic.Anthropic) -> None:
    """`max_tokens: 0` fills the cache."""
    ask: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": RULES[::-1]}]}
    empty = client.messages.create(max_tokens=0, **ask)
    assert empty.content == [] and empty.usage.output_tokens == 0 and empty.usage.cache_read_input_tokens == 0
    told = client.messages.create(max_tokens=1, **ask)
    assert (told.usage.cache_read_input_tokens or 0) > 0.99 * len(RULES)


def test_a_continued_response_finds_its_prefix(server: Server) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        first = client.responses.create(model="tiny", input="hi " + RULES[40:], max_output_tokens=8)
        second = client.responses.create(
            model="tiny", input="and?", previous_response_id=first.id, max_output_tokens=8, stream=True
        )
        *_, last = second
    assert last.type == "response.incomplete" and last.response.usage is not None
    usage = last.response.usage
    assert usage.input_tokens_details.cached_tokens >= 0.99 * usage.input_tokens
