"""The chat template of each family renders as transformers renders it, and as the family's makers wrote it down.

The files in `families/` have the formats that the models were published with.
"""

from __future__ import annotations

import itertools
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError

from ingle.config import TextConfig
from ingle.errors import RequestError
from ingle.text.chat_template import ChatTemplate
from ingle.text.load import load_text_side
from ingle.text.shipped import shipped_templates
from tests.text import toys

FOLDER = Path(__file__).parent / "families"
TIGERBOT = shipped_templates()["tigerbot"]
TOKENS: dict[str, tuple[str, str]] = {
    "llama2": ("<s>", "</s>"),
    "llama3": ("<|begin_of_text|>", "<|eot_id|>"),
    "mistral": ("<s>", "</s>"),
    "qwen2": ("<|endoftext|>", "<|im_end|>"),
    "qwen3": ("<|endoftext|>", "<|im_end|>"),
    "gemma2": ("<bos>", "<eos>"),
    "gemma3": ("<bos>", "<eos>"),
    "phi3": ("<s>", "<|endoftext|>"),
    "deepseek_v2": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "deepseek_v3": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "smollm2": ("<|im_start|>", "<|im_end|>"),
    "tigerbot": ("<s>", "</s>"),
}
"""Family to its BOS and EOS."""


def source_of(family: str) -> str:
    return (TIGERBOT if family == "tigerbot" else FOLDER / f"{family}.jinja").read_text(encoding="utf-8")


def special_tokens(family: str) -> dict[str, str]:
    return dict(zip(("bos_token", "eos_token"), TOKENS[family], strict=True))


@lru_cache
def reference(family: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=toys.byte_level(), chat_template=source_of(family), **special_tokens(family)
    )


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def system(content: Any) -> dict[str, Any]:
    return {"role": "system", "content": content}


CALL = {
    "id": "call12345",
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "北京", "days": 2}},
}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one": [user("What is the capital of France?")],
    "turns": [user("Hi"), assistant("Hello! Yes?"), user("Tell me a joke"), assistant("No."), user("Please?")],
    "chinese": [user("你好，请介绍一下你自己。"), assistant("我是一个语言模型 🐯。"), user("“真的”吗？")],
    "empty": [user(""), assistant(""), user("")],
    "spaces": [user("  \n leading and trailing \t\n"), assistant("\n\n so is this  "), user(" x ")],
    "template inside": [user("{{ bos_token }}{% raw %} <s>[INST] <|im_end|>"), assistant("</s>"), user("x")],
    "answered": [user("1+1?"), assistant("2")],
    "thinking": [user("1+1?"), assistant("<think>\nhm\n</think>\n\n2"), user("?"), assistant("<think>so</think>\n3")],
    "reasoning": [user("1+1?"), assistant("2", reasoning_content="hm")],
    "call": [user("Weather?"), assistant("", tool_calls=[CALL]),
             {"role": "tool", "content": "晴 21°", "tool_call_id": "call12345", "name": "weather"}],
    "two users": [user("a"), user("b")],
    "parts": [user([{"type": "text", "text": "in parts"}])],
}  # fmt: skip
SYSTEMS = {"no system": [], "system": [system("You are terse. 只用中文。")], "empty system": [system("")]}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "Weather in a city <é>", "parameters": {
        "type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}, "required": []}}},
    {"type": "function", "function": {"name": "now", "description": "", "parameters": {"type": "object"}}},
]  # fmt: skip
VARIABLES: list[dict[str, Any]] = [{"date_string": "25 Nov 2026"}, {"date_string": "x", "enable_thinking": False}]


def outcome(render: Any) -> str | None:
    """The text, or None when the template refuses the conversation."""
    try:
        return str(render())
    except (RequestError, TemplateError, TypeError):
        return None


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("family", TOKENS)
def test_every_conversation_renders_as_in_transformers(family: str, conversation: str) -> None:
    template, rendered = ChatTemplate(source_of(family), special_tokens(family)), 0
    for start, prompt, tools, variables in itertools.product(SYSTEMS, (True, False), (None, TOOLS), VARIABLES):
        messages = SYSTEMS[start] + CONVERSATIONS[conversation]

        common = {"tools": tools, "add_generation_prompt": prompt}
        ours = partial(template.render, messages, **common, chat_template_kwargs=variables)
        theirs = partial(reference(family).apply_chat_template, messages, **common, tokenize=False, **variables)
        expected = outcome(theirs)
        assert outcome(ours) == expected
        rendered += expected is not None
    assert rendered or conversation in ("two users", "parts", "call"), "no combination renders"


TURNS = [system("Be brief."), user("Hi "), assistant("Hello"), user("你好")]
PUBLISHED = {
    "llama2": "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Hello </s><s>[INST] 你好 [/INST]",
    "llama3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
              "Today Date: 25 Nov 2026\n\nBe brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
              "<|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|><|start_header_id|>user<|end_header_id|>"
              "\n\n你好<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s>[INST]Hi [/INST]Hello</s>[INST]Be brief.\n\n你好[/INST]",
    "qwen2": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi <|im_end|>\n<|im_start|>assistant\nHello"
             "<|im_end|>\n<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n",
    "gemma2": None,
    "gemma3": "<bos><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\nHello<end_of_turn>\n"
              "<start_of_turn>user\n你好<end_of_turn>\n<start_of_turn>model\n",
    "phi3": "<|system|>\nBe brief.<|end|>\n<|user|>\nHi <|end|>\n<|assistant|>\nHello<|end|>\n<|user|>\n你好<|end|>\n"
            "<|assistant|>\n",
    "deepseek_v2": "<｜begin▁of▁sentence｜>Be brief.\n\nUser: Hi \n\nAssistant: Hello<｜end▁of▁sentence｜>User: "
                   "你好\n\nAssistant:",
    "deepseek_v3": "<｜begin▁of▁sentence｜>Be brief.<｜User｜>Hi <｜Assistant｜>Hello<｜end▁of▁sentence｜>"
                   "<｜User｜>你好<｜Assistant｜>",
    "tigerbot": "<s>\n\n### Instruction:\nBe brief.\nHi\n\n### Response:\nHello\n\n### Instruction:\n"
                "你好\n\n### Response:\n",
}  # fmt: skip
PUBLISHED |= {"qwen3": PUBLISHED["qwen2"], "smollm2": PUBLISHED["qwen2"]}


@pytest.mark.parametrize("family", TOKENS)
def test_the_formats_are_those_that_were_published(family: str) -> None:
    template = ChatTemplate(source_of(family), special_tokens(family))
    render = outcome(lambda: template.render(TURNS, chat_template_kwargs={"date_string": "25 Nov 2026"}))
    assert render == PUBLISHED[family]


@pytest.fixture
def tigerbot(tmp_path: Path) -> Path:
    """A folder like TigerBot's: Llama 2's vocabulary, and no template of its own."""
    config = {"bos_token": "<s>", "eos_token": "</s>"}
    return toys.write_folder(tmp_path, toys.sentence_piece(), tokenizer_config__json=config)


def test_tigerbot_by_the_template_that_is_shipped(tigerbot: Path) -> None:
    """Its prompts are what the model's own code feeds it: the instruction, encoded as plain text after BOS."""
    assert load_text_side(tigerbot).chat_template is None, "never guessed"
    side = load_text_side(tigerbot, TextConfig("tigerbot"))
    assert side.chat_template is not None
    prompt = side.chat_template.render([user("你好")])
    ids = side.tokenizer.encode(prompt, add_special_tokens=False)
    assert ids == side.tokenizer.encode("\n\n### Instruction:\n你好\n\n### Response:\n")


def test_tigerbot_stops_at_its_end_token_and_before_the_next_instruction(tigerbot: Path) -> None:
    side = load_text_side(tigerbot, TextConfig(str(TIGERBOT)))
    assert side.tokenizer.eos_token_ids == (2,)
    assert side.tokenizer.chat_stops == ("\n\n### Instruction:",)


def test_tigerbot_knows_three_roles(tigerbot: Path) -> None:
    side = load_text_side(tigerbot, TextConfig(str(TIGERBOT)))
    assert side.chat_template is not None
    with pytest.raises(RequestError, match="system, user and assistant only, not tool"):
        side.chat_template.render([user("a"), {"role": "tool", "content": "b"}])


@pytest.mark.parametrize("family", [name for name in TOKENS if name != "tigerbot"])
def test_a_format_with_an_end_token_needs_no_stop_string(family: str, tmp_path: Path) -> None:
    backend = toys.byte_level()
    backend.add_special_tokens(["<end_of_turn>", "<|end|>", *TOKENS[family]])
    folder = toys.write_folder(tmp_path, backend, tokenizer_config__json=special_tokens(family))
    assert load_text_side(folder, TextConfig(source_of(family))).tokenizer.chat_stops == ()


@pytest.mark.parametrize(
    ("template", "stops"),
    [
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", ("\nuser:",)),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", ()),
        ("{% for m in messages %}{{ m.content }}\nQ:{% endfor %}", ()),
        ("{{ messages[0].content }}", ()),
        ("{% if messages | length > 2 %}{{ raise_exception('one turn') }}{% endif %}{{ messages[-1].content }}", ()),
    ],
)
def test_what_leads_to_the_next_question_ends_an_answer(template: str, stops: tuple[str, ...], tmp_path: Path) -> None:
    folder = toys.write_folder(tmp_path, toys.byte_level())
    assert load_text_side(folder, TextConfig(template)).tokenizer.chat_stops == stops
