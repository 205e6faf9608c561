"""Formats are told from chat templates: here from the lines of published ones that write calls and thoughts."""

from __future__ import annotations

from pathlib import Path

import pytest

from ingle.config import TextConfig
from ingle.errors import ConfigError
from ingle.text.chat_template import ChatTemplate
from ingle.text.formats.declared import REASONING_FORMATS, TOOL_FORMATS, reasoning_format
from ingle.text.formats.detect import in_words, reasoning_of, tools_of
from ingle.text.load import load_text_side
from tests.text import toys
from tests.text.test_family_templates import TOKENS, source_of

WRITTEN: dict[str, tuple[str, str, str | None]] = {
    # what a template writes; format of calls, of thoughts
    "Hermes 2 Pro, Qwen 2.5": ('<tool_call>\n{"name": "', "hermes", None),
    "Qwen 3": ("content.split('</think>')[-1] <tool_call>\n{\"name\": ", "hermes", "think"),
    "Qwen3-Coder": ("'\n<tool_call>\n<function=' + name + '>\n' '<parameter=' + args_name", "qwen3_coder", None),
    "Qwen 3.5": ("</think> <tool_call>\n<function=' + name '<parameter='", "qwen3_coder", "think"),
    "Llama 3.2": ("<|start_header_id|> {% if tools %} '{\"name\": ' '\"parameters\": '", "llama3_json", None),
    "Mistral Nemo": ("[TOOL_CALLS][", "mistral", None),
    "Mistral Small 3.2": ("'[TOOL_CALLS]' + name + '[CALL_ID]' + id + '[ARGS]'", "mistral", None),
    "Magistral": ("[THINK] [/THINK] [TOOL_CALLS] [ARGS]", "mistral", "mistral"),
    "DeepSeek R1": ("</think> function<｜tool▁sep｜>' + name + '\n```json", "deepseek_v3", "think"),
    "DeepSeek V3.1": ("</think> <｜tool▁call▁begin｜>'+ name + '<｜tool▁sep｜>'", "deepseek_v31", "think"),
    "GLM 4.5": ("</think> <tool_call>' + name <arg_key>", "glm45", "think"),
    "Kimi K2": ("<|tool_call_begin|>{{ id }}<|tool_call_argument_begin|>", "kimi_k2", None),
    "Gemma 4": ("<|channel>thought\n<channel|> <|tool_call>call:", "gemma4", "gemma4"),
    "Function Gemma": ("<start_function_call>call:", "functiongemma", None),
    "gpt-oss": ("<|start|>assistant<|channel|>analysis<|message|> commentary", "openai", "openai_gptoss"),
    "Granite 3.3": ("<|tool_call|>[", "granite", None),
    "Seed OSS": ("<seed:tool_call>\n<function= <parameter= </seed:think>", "seed_oss", "seed_oss"),
    "MiniMax M2": ('</think> <minimax:tool_call> <invoke name="', "minimax_m2", "think"),
}  # fmt: skip


@pytest.mark.parametrize("model", WRITTEN)
def test_formats_of_a_template(model: str) -> None:
    source, tools, reasoning = WRITTEN[model]
    found, thought = tools_of(source), reasoning_of(source)
    assert found is not None and found.name == tools
    assert (thought and thought.name) == reasoning


@pytest.mark.parametrize("family", TOKENS)
def test_families(family: str) -> None:
    found, thought = tools_of(source_of(family)), reasoning_of(source_of(family))
    expected = {"llama3": "llama3_json", "mistral": "mistral"}.get(family, "hermes")
    assert found is not None and found.name == expected
    assert (thought and thought.name) == ("think" if family in ("qwen3", "deepseek_v3") else None)


def test_names() -> None:
    for each in TOOL_FORMATS:
        assert all(tools_of("", name) == each for name in (each.name, *each.others))
    for other in REASONING_FORMATS:
        assert all(reasoning_of("", name) == other for name in (other.name, *other.others))
    assert tools_of("", "none") is None and reasoning_of("</think>", "none") is None
    with pytest.raises(ValueError, match=r"'x' is no format of calls: give .*hermes.*, or none"):
        tools_of("", "x")


def test_flags(tmp_path: Path) -> None:
    folder = toys.write_folder(tmp_path, toys.byte_level())
    template = "{% for m in messages %}{{ m.content }}</think>{% endfor %}"
    formats = load_text_side(folder, TextConfig(template)).formats
    assert in_words(formats, template_knows_tools=True) == "calls of tools: hermes, thoughts: think"
    formats = load_text_side(folder, TextConfig(template, False, "mistral", "none")).formats
    assert in_words(formats, template_knows_tools=True) == "calls of tools: mistral, thoughts: none"
    assert "describes them" in in_words(formats, template_knows_tools=False)
    with pytest.raises(ConfigError, match=r"^--reasoning-parser: 'x' is no format of thoughts: give .*qwen3"):
        load_text_side(folder, TextConfig(template, reasoning_parser="x"))
    assert load_text_side(folder).formats.tools is None, "there is no template"


@pytest.mark.parametrize(
    ("format", "prompt", "last", "begun"),
    [
        ("think", "<|im_start|>assistant\n<think>\n", None, True),
        ("think", "<|im_start|>assistant\n<think>\n\n</think>\n\n", None, False),
        ("think", "<|im_start|>user\nis <think> a tag?<|im_end|>\n<|im_start|>assistant\n", None, False),
        ("think", "<assistant><think>\nso I", "so I", True),
        ("think", "<assistant><think>so I", "<think>so I", True),
        ("think", "<assistant><think>so</think>I", "<think>so</think>I", False),
        ("think", "<user><think><assistant>I", "I", False),
        ("openai", "<|end|><|start|>assistant", None, True),
        ("openai", "<|start|>assistant<|channel|>final<|message|>I", "I", False),
    ],
)
def test_whether_an_answer_begins_within_thoughts(format: str, prompt: str, last: str | None, begun: bool) -> None:
    message = None if last is None else {"role": "assistant", "content": last}
    assert reasoning_format(format).begun_by(prompt, message) == begun


def test_what_qwen3s_template_begins() -> None:
    template, think = ChatTemplate(source_of("qwen3"), {}), reasoning_format("qwen3")
    for enabled in (True, False):
        prompt = template.prompt([{"role": "user", "content": "a"}], chat_template_kwargs={"enable_thinking": enabled})
        assert not think.begun_by(prompt)
        assert prompt.endswith("</think>\n\n") != enabled
