"""A system message where the template takes none."""

from __future__ import annotations

from typing import Any

import pytest

from ingle.errors import RequestError
from ingle.text.chat_template import ChatTemplate
from ingle.text.system_message import merged
from tests.text.test_family_templates import TOKENS, assistant, source_of, special_tokens, system, user

# As Mistral-7B-Instruct-v0.1 and -v0.2 were published.
EARLY_MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
SILENT = "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}{% endfor %}"
REFUSING = {"gemma2": "System role not supported", "early mistral": "roles must alternate", "silent": "would be lost"}
TALK = [system("Be brief."), user("Hi"), assistant("Hello."), user("Bye")]


def template_of(name: str, *, merge_system: bool = False) -> ChatTemplate:
    source = {"early mistral": EARLY_MISTRAL, "silent": SILENT}.get(name) or source_of(name)
    tokens = special_tokens(name if name in TOKENS else "mistral")
    return ChatTemplate(source, tokens, merge_system=merge_system)


@pytest.mark.parametrize("name", REFUSING)
def test_a_template_that_takes_no_system_message_is_told_with_what_to_do(name: str) -> None:
    with pytest.raises(RequestError, match=REFUSING[name]) as refused:
        template_of(name).prompt(TALK)
    assert "--merge-system" in str(refused.value) and refused.value.code
    template = template_of(name, merge_system=True)
    prompt = template.prompt(TALK)
    assert prompt == template.prompt([user("Be brief.\n\nHi"), *TALK[2:]])
    assert prompt.count("Be brief.") == 1


def test_what_merging_does_not_heal_gets_no_such_advice() -> None:
    with pytest.raises(RequestError, match="System role not supported") as refused:
        template_of("gemma2").prompt([system("Be brief."), user("one"), user("two")])
    assert "--merge-system" not in str(refused.value)


@pytest.mark.parametrize("name", TOKENS)
def test_every_family_takes_a_merged_conversation(name: str) -> None:
    template = template_of(name, merge_system=True)
    assert template.prompt(TALK) == template_of(name).prompt([user("Be brief.\n\nHi"), *TALK[2:]])


def test_a_loss_is_named_as_it_was_sent() -> None:
    source = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    with pytest.raises(RequestError) as refused:
        ChatTemplate(source, {}, merge_system=True).prompt([system("s"), user("a"), assistant("b")])
    assert refused.value.param == "messages[2]"


PARTS = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
MERGED: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {
    "several": ([system("a"), {"role": "developer", "content": "b"}, user("c")], [user("a\n\nb\n\nc")]),
    "parts": ([system(PARTS), user(PARTS)], [user([{"type": "text", "text": "a\nb"}, *PARTS])]),
    "alone": ([system("a")], [user("a")]),
    "the assistant first": ([system("a"), assistant("b")], [user("a"), assistant("b")]),
    "empty": ([system(""), user("c")], [user("c")]),
    "later ones stay": ([user("c"), system("a")], [user("c"), system("a")]),
}


@pytest.mark.parametrize("name", MERGED)
def test_where_a_system_message_goes(name: str) -> None:
    messages, wanted = MERGED[name]
    assert merged(messages) == wanted


def test_tools_are_described_where_a_template_knows_none() -> None:
    """In the system message; where the template takes none, in the first user message."""
    tool = {"type": "function", "function": {"name": "now"}}
    template = template_of("smollm2")
    assert template.prompt([system("s"), user("a")], tools=[tool]).startswith("<|im_start|>system\ns\n\n# Tools\n")
    assert template.prompt([user("a")], tools=[tool]).startswith("<|im_start|>system\n# Tools\n")
    merged = template_of("gemma2").prompt([user("a")], tools=[tool])
    assert merged.startswith("<bos><start_of_turn>user\n# Tools\n") and "</tool_call>\n\na<end_of_turn>" in merged
    with pytest.raises(RequestError, match="--merge-system"):
        template_of("gemma2").prompt([system("s"), user("a")], tools=[tool])
