"""Nothing that was sent is rendered to nothing."""

from __future__ import annotations

from typing import Any

import pytest

from ingle.errors import RequestError
from ingle.text.chat_template import ChatTemplate
from tests.text.test_family_templates import assistant, source_of, special_tokens, system, user


def part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
KNOWN_ROLES = (
    "{% for m in messages %}{% if m.role == 'user' %}U {{ m.content | trim }}\n"
    "{% elif m.role == 'assistant' %}A {{ m.content.split('</think>')[-1] }}\n{% endif %}{% endfor %}"
)
FIRST_SYSTEM = (
    "{% if messages[0].role == 'system' %}S {{ messages[0].content }}\n{% endif %}"
    "{% for m in messages if m.role != 'system' %}{{ m.role }} {{ m.content | tojson }}\n{% endfor %}"
)
# As SmolVLM's, Idefics' and others' for images: text alone is a string of characters without a type.
PARTS_ONLY = (
    "{% for m in messages %}{{ m.role | capitalize }}:{% for part in m.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}|{% endfor %}"
)
# As Llama 3.2 Vision's: system messages are text, the others may be either.
MIXED = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ 'S:' + m.content }}{% elif m.content is string %}"
    "{{ m.role }}:{{ m.content }}{% else %}{{ m.role }}:{% for p in m.content %}[{{ p.text }}]{% endfor %}{% endif %}"
    "|{% endfor %}"
)
DEVELOPER = "{% for m in messages if m.role in ['developer', 'user'] %}<{{ m.role }}>{{ m.content }}{% endfor %}"
NAMES_DEVELOPER = "{# by its developer #}" + KNOWN_ROLES.replace("'user'", "'system'")
SHOUTS = "{% for m in messages %}{{ m.content | upper }}{% endfor %}"
TOUCHY = "{% for m in messages %}{{ m.content if 'please' in m.content else raise_exception('no') }}{% endfor %}"

# As Qwen's: arguments are an object, which the template writes as JSON; so too if a client sends them as text.
OBJECTS = (
    "{% for m in messages %}{{ m.role }}:{% if m.content %}{{ m.content }}{% endif %}{% for c in m.tool_calls or [] %}"
    "{{ c.function.name }}({{ c.function.arguments | tojson }}){% endfor %}|{% endfor %}"
)
TEXTS = OBJECTS.replace(" | tojson", "")
# As Qwen3-Coder's: without a form of its own for text.
ITEMS = OBJECTS.replace(
    "{{ c.function.arguments | tojson }}",
    "{% for k, v in c.function.arguments | items %}<{{ k }}>{{ v if v is string else v | tojson }}{% endfor %}",
)
# As DeepSeek's R1: a call is one only beside no content at all.
NONE_BESIDE = (
    "{% for m in messages %}{% if m.role == 'assistant' and m.content is none %}{% for c in m.tool_calls %}"
    "{{ c.function.name }}({{ c.function.arguments }}){% endfor %}{% else %}{{ m.role }}:{{ m.content }}{% endif %}|"
    "{% endfor %}"
)
# As Llama 3.1's: words beside a call are left out, and calls come one by one.
ONE_CALL = (
    "{% for m in messages %}{% if 'tool_calls' in m %}{% if m.tool_calls | length != 1 %}{{ raise_exception('one') }}"
    "{% endif %}{{ m.tool_calls[0].function.name }}({{ m.tool_calls[0].function.arguments | tojson }})"
    "{% else %}{{ m.role }}:{{ m.content | trim }}{% endif %}|{% endfor %}"
)
ADDED = OBJECTS.replace("{% if m.content %}{{ m.content }}{% endif %}", "{{ '' + m.content }}")


def call(name: str, arguments: Any, id: str = "call_0") -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def result(text: str, id: str = "call_0") -> dict[str, Any]:
    return {"role": "tool", "content": text, "tool_call_id": id}


def calling(*calls: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": list(calls), **more}


ASKED = [user("u"), calling(call("f", '{"a": "\\"x\\""}')), result("r")]
TWICE = [user("u"), calling(call("f", '{"a": 1}', "i"), call("g", "{}", "j"), content="ok"),
         result("y", "j"), result("x", "i"), user("v")]  # fmt: skip

RENDERED: dict[str, tuple[str, list[dict[str, Any]], str]] = {
    "plain": (PLAIN, [user("a"), assistant("b"), user("c")], "<user>a<assistant>b<user>c"),
    "parts become text": (PLAIN, [user([part("a"), part("b")])], "<user>a\nb"),
    "an empty list of parts": (PLAIN, [user("")], "<user>"),
    "white space in parts": (PLAIN, [user([part(" ")])], "<user> "),
    "developer": (PLAIN, [message("developer", "d"), user("a")], "<system>d<user>a"),
    "developer that is known": (DEVELOPER, [message("developer", "d"), user("a")], "<developer>d<user>a"),
    "developer that is only mentioned": (NAMES_DEVELOPER, [message("developer", "d")], "U d\n"),
    "trimmed": (KNOWN_ROLES, [user("  a ")], "U a\n"),
    "thoughts may go": (KNOWN_ROLES, [user("a"), assistant("<think>x</think>b")], "U a\nA b\n"),
    "an empty message of a role that is left out": (KNOWN_ROLES, [system(" "), user("a")], "U a\n"),
    "text becomes parts": (PARTS_ONLY, [system("s"), user("a")], "System:s|User:a|"),
    "parts stay parts": (PARTS_ONLY, [user([part("a"), part("b")])], "User:ab|"),
    "some of each": (PARTS_ONLY, [system("s"), user([part("a"), part("b")])], "System:s|User:ab|"),
    "both": (MIXED, [system("s"), user("a"), user([part("b"), part("c")])], "S:s|user:a|user:[b][c]|"),
    "parts where text is wanted": (MIXED, [system([part("s"), part("t")]), user("a")], "S:s\nt|user:a|"),
    "escaped": (FIRST_SYSTEM, [user('"a"\n'), message("tool", '{"b": 1}')], 'user "\\"a\\"\\n"\ntool "{\\"b\\": 1}"\n'),
    "text that looks like parts": (PLAIN, [user("{'text': 'zq0zq'}")], "<user>{'text': 'zq0zq'}"),
    "upper case": (SHOUTS, [user("a")], "A"),
    "arguments as an object": (OBJECTS, ASKED, 'user:u|assistant:f({"a": "\\"x\\""})|tool:r|'),
    "arguments as text": (TEXTS, ASKED, 'user:u|assistant:f({"a": "\\"x\\""})|tool:r|'),
    "text from an object": (TEXTS, [calling(call("f", {"a": ["é"]}))], 'assistant:f({"a": ["é"]})|'),
    "items of arguments": (ITEMS, ASKED, 'user:u|assistant:f(<a>"x")|tool:r|'),
    "arguments that are no JSON": (TEXTS, [user("u"), calling(call("f", '{"a'))], 'user:u|assistant:f({"a)|'),
    "no arguments": (OBJECTS, [calling(call("f", ""))], "assistant:f({})|"),
    "no content beside a call": (NONE_BESIDE, ASKED, 'user:u|f({"a": "\\"x\\""})|tool:r|'),
    "words beside a call": (OBJECTS, TWICE, 'user:u|assistant:okf({"a": 1})g({})|tool:y|tool:x|user:v|'),
    "words that a call hides": (NONE_BESIDE, TWICE, 'user:u|f({"a": 1})g({})|tool:y|tool:x|user:v|'),
    "calls one by one": (ONE_CALL, TWICE, 'user:u|f({"a": 1})|tool:x|g({})|tool:y|user:v|'),
    "empty content": (ADDED, ASKED, 'user:u|assistant:f({"a": "\\"x\\""})|tool:r|'),
    "calls in words": (
        PLAIN,
        ASKED,
        '<user>u<assistant><tool_call>\n{"name": "f", "arguments": {"a": "\\"x\\""}}\n</tool_call>'
        "<user><tool_response>\nr\n</tool_response>",
    ),
    "calls and results in words": (
        KNOWN_ROLES,
        TWICE,
        'U u\nA ok\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n'
        '</tool_call>\n<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>\n'
        "U <tool_response>\ny\n</tool_response>\n<tool_response>\nx\n</tool_response>\nU v\n",
    ),
    "a template that fails on marks": (TOUCHY, [user("please")], "please"),
}


@pytest.mark.parametrize("name", RENDERED)
def test_all_of_a_conversation_is_in_its_prompt(name: str) -> None:
    source, messages, prompt = RENDERED[name]
    template = ChatTemplate(source, {})
    for _ in range(2):  # and once more, when the shape is known
        assert template.prompt(messages) == prompt


LOST: dict[str, tuple[str, list[dict[str, Any]], int]] = {
    "system": (KNOWN_ROLES, [system("s"), user("a")], 0),
    "developer": (KNOWN_ROLES, [message("developer", "s"), user("a")], 0),
    "system in parts": (KNOWN_ROLES, [system([part("s")]), user("a")], 0),
    "a later system message": (FIRST_SYSTEM, [system("s"), user("a"), system("t")], 2),
    "function": (source_of("qwen2"), [user("a"), message("function", "b")], 1),
    "llama2's later system": (source_of("llama2"), [user("a"), system("b"), user("c")], 1),
    "one part": ("{% for m in messages %}{{ m.content[0].text }}{% endfor %}", [user([part("a"), part("b")])], 0),
    "all but the last": ("{{ messages[-1].content }}", [user("a"), assistant("a"), user("a")], 0),
}


@pytest.mark.parametrize("name", LOST)
def test_what_would_be_lost_is_named(name: str) -> None:
    source, messages, index = LOST[name]
    template = ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"})
    for _ in range(2):
        with pytest.raises(RequestError, match=rf"^messages\[{index}\].* would be lost") as caught:
            template.prompt(messages)
        assert caught.value.param == f"messages[{index}]" and messages[index]["role"] in str(caught.value)


def test_the_words_of_a_template_are_passed_on() -> None:
    with pytest.raises(RequestError, match=r"^chat template: no$"):
        ChatTemplate(TOUCHY, {}).prompt([user("now")])
    with pytest.raises(RequestError, match="System role not supported"):
        ChatTemplate(source_of("gemma2"), special_tokens("gemma2")).prompt([system("s"), user("a")])


def test_a_template_that_breaks_a_limit_is_not_tried_in_other_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    template, tried = ChatTemplate(PLAIN, {}), []

    def slow(*arguments: Any, **named: Any) -> str:
        tried.append(arguments)
        raise RequestError("chat template: it takes too long", param="messages")

    monkeypatch.setattr(template, "_render", slow)
    with pytest.raises(RequestError, match="takes too long"):
        template.prompt([message("developer", [part("a")])])
    assert len(tried) == 1


def test_names_of_python_are_for_the_log(caplog: pytest.LogCaptureFixture) -> None:
    template = ChatTemplate("{{ messages[0].content + 1 }}", {})
    with pytest.raises(RequestError, match="it fails on this conversation; the log has the reason") as caught:
        template.prompt([user("a")])
    assert "TypeError" not in str(caught.value) and "TypeError" in caplog.text
    assert len(caplog.records) == 1, "the render with marks is nobody's business"


def test_a_shape_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    template, rendered = ChatTemplate(PLAIN, {}), []
    render = template._render
    monkeypatch.setattr(
        template,
        "_render",
        lambda messages, *more, **named: rendered.append(messages) or render(messages, *more, **named),
    )
    for text in ("a", "b", "c"):
        template.prompt([system(text), user(text)])
    assert len(rendered) == 1 + 3
    template.prompt([user("a")])
    template.prompt([user("a")], chat_template_kwargs={"enable_thinking": False})
    assert len(rendered) == 4 + 2 + 2
