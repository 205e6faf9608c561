from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

from ingle.errors import ModelError, RequestError
from ingle.text import sandbox as module
from ingle.text.chat_template import MAX_TEMPLATE_CHARS, ChatTemplate
from tests.text import toys
from tests.text.templates import CONVERSATIONS, TEMPLATES, TOOLS

SPECIAL_TOKENS = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
HI = CONVERSATIONS["one"]


@lru_cache
def reference() -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=toys.byte_level(), **SPECIAL_TOKENS
    )


def outcome(render: Any) -> str | None:
    """The text, or None when the template refuses the conversation."""
    from jinja2 import TemplateError

    try:
        text: str = render()
    except (RequestError, TemplateError, TypeError):
        return None
    return text


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_renders_as_transformers(name: str, conversation: str) -> None:
    template, messages = ChatTemplate(TEMPLATES[name], SPECIAL_TOKENS), CONVERSATIONS[conversation]
    rendered = 0
    for prompt in (True, False):
        for tools in (None, TOOLS):
            for extra in ({}, {"enable_thinking": False, "date_string": "1 Jan 2026", "documents": [{"text": "d"}]}):
                expected = outcome(
                    lambda prompt=prompt, tools=tools, extra=extra: reference().apply_chat_template(
                        messages,
                        chat_template=TEMPLATES[name],
                        tokenize=False,
                        add_generation_prompt=prompt,
                        tools=tools,
                        **extra,
                    )
                )
                ours = outcome(
                    lambda prompt=prompt, tools=tools, extra=extra: template.render(
                        messages, tools=tools, add_generation_prompt=prompt, chat_template_kwargs=extra
                    )
                )
                assert ours == expected
                rendered += ours is not None
    assert rendered or (name, conversation) in {
        ("chatml", "calls"),
        ("llama3", "calls"),
        ("mistral", "calls"),
        ("mistral", "two users"),
        ("gemma", "calls"),
        ("gemma", "system"),
    }


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('only one turn, please') }}", "only one turn, please"),
        ("{{ messages[0].name.first }}", "'dict object' has no attribute 'name'"),
        ("{{ messages[0].content + 1 }}", "it fails on this conversation"),
        ("{% for %}", "line 1"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% set ns = namespace(_x=1) %}", "underscore"),
        ("{{ messages.append(1) }}", "unsafe"),
    ],
)
def test_a_failing_template_speaks_for_itself(source: str, message: str) -> None:
    with pytest.raises(RequestError, match="chat template: ") as caught:
        ChatTemplate(source, {}).render(HI)
    assert message in str(caught.value) and caught.value.status == 400


GROW = "{% set ns = namespace(x=['ab']) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}"
HOSTILE = {
    "range": "{% for i in range(10 ** 9) %}x{% endfor %}",
    "long string": "{{ 'a' * 10 ** 10 }}",
    "wide format": "{{ '{:9999999999}'.format(1) }}",
    "old format": "{{ '%9999999999d' % 1 }}",
    "filter": "{{ 'a' | center(10 ** 10) }}",
    "doubling": "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "long output": "{% for i in range(99999) %}{{ '" + "x" * 50 + "' }}{% endfor %}",
    "deep expression": "{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}",
}
SLOW = {
    "loops": "{% set r = range(99999) | list %}{% for a in r %}{% for b in r %}{% for c in r %}"
    "{% endfor %}{% endfor %}{% endfor %}",
    "text of nested lists": GROW + "{{ ns.x }}",
}


@pytest.mark.parametrize("name", [*HOSTILE, *SLOW])
def test_hostile_templates_are_bounded(name: str) -> None:
    """From the main thread and from a worker; the next conversation is served as if nothing had been."""
    started, errors = time.monotonic(), []

    def render() -> None:
        try:
            ChatTemplate({**HOSTILE, **SLOW}[name], {}).render(HI)
        except RequestError as error:
            errors.append(str(error))

    if name == "loops":
        worker = threading.Thread(target=render)
        worker.start()
        worker.join()
    else:
        render()
    assert errors and errors[0].startswith("chat template: ")
    if name != "doubling":  # which meets the limit of time or that of memory first, as the machine has it
        assert ("too long" in errors[0]) == (name in SLOW)
    assert time.monotonic() - started < 20
    assert ChatTemplate("{{ messages[0].content }}", {}).render(HI) == "Hi"


def test_threads_get_their_own_answers() -> None:
    template = ChatTemplate("{{ messages[0].content * 3 }}", {})
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda i: template.render([{"role": "user", "content": f"{i},"}]), range(200)))
    assert texts == [f"{i}," * 3 for i in range(200)]


def test_a_slow_rendering_holds_up_no_other() -> None:
    slow = ChatTemplate(SLOW["loops"], {})
    with ThreadPoolExecutor(1) as pool:
        rendering = pool.submit(slow.render, HI)
        time.sleep(0.2)
        assert ChatTemplate("{{ messages[0].content }}", {}).render(HI) == "Hi"
        assert not rendering.done()
        with pytest.raises(RequestError, match="too long"):
            rendering.result()


def test_an_interrupted_rendering_leaves_no_answer_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    template, exchange = ChatTemplate("{{ messages[0].content }}", {}), module._exchange

    def interrupted(process: Any, request: bytes) -> bytes:
        process.stdin.write(request + b"\n")
        process.stdin.flush()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "_exchange", interrupted)
        with pytest.raises(KeyboardInterrupt):
            template.render([{"role": "user", "content": "a secret"}])
    assert module._exchange is exchange
    assert template.render(HI) == "Hi"


def pids() -> list[int]:
    return [each._process.pid for each in module.sandboxes._all if each._process is not None]


def test_a_process_that_is_killed_from_outside_costs_no_request() -> None:
    template = ChatTemplate("{{ messages[0].content }}", {})
    for _ in range(5):
        template.render(HI)
        for pid in pids():
            os.kill(pid, signal.SIGKILL)
        assert template.render(HI) == "Hi"


def test_a_process_that_stalls_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own limit is one of computing; a stopped one, or one that is swapped out, computes nothing."""
    monkeypatch.setattr(module, "_MAX_S", 0.5)
    template = ChatTemplate("{{ messages[0].content }}", {})
    template.render(HI)
    for pid in pids():
        os.kill(pid, signal.SIGSTOP)
    for text in ("short", "x" * 1_000_000):  # which a pipe holds, or does not
        with pytest.raises(RequestError, match="takes too long"):
            template.render([{"role": "user", "content": text}])
        assert template.render(HI) == "Hi"
        for pid in pids():
            os.kill(pid, signal.SIGSTOP)
    for pid in pids():
        os.kill(pid, signal.SIGCONT)


def test_a_forked_child_has_a_process_of_its_own() -> None:
    template = ChatTemplate("{{ messages[0].content }}", {})
    template.render(HI)
    child = os.fork()
    if child == 0:
        os._exit(0 if template.render([{"role": "user", "content": "child"}]) == "child" else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert template.render(HI) == "Hi"


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="looks at processes through /proc")
def test_the_process_dies_with_its_parent() -> None:
    """Even when the parent has no time to say so."""
    code = (
        "import os, signal\n"
        "from ingle.text import sandbox, chat_template as c\n"
        "c.ChatTemplate('x', {}).render([{'role': 'user'}])\n"
        "print(sandbox.sandboxes._all[0]._process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    parent = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=False)
    assert parent.returncode == -signal.SIGKILL
    pid, deadline = int(parent.stdout), time.monotonic() + 10
    while _alive(pid):
        assert time.monotonic() < deadline, f"process {pid} is still there"
        time.sleep(0.02)


def _alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.is_file() and "State:\tZ" not in status.read_text()  # a zombie has ended, only nobody looked


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt", "bos_token", "image_token", "tokenize"])
def test_clients_cannot_set_reserved_names(name: str) -> None:
    template = ChatTemplate("x", {"image_token": "<image>"})
    with pytest.raises(RequestError, match=name) as caught:
        template.render(HI, chat_template_kwargs={name: "x"})
    assert caught.value.param == "chat_template_kwargs"


@pytest.mark.parametrize("messages", [[], ["hi"], [{"role": "user", "content": {1, 2}}]])
def test_messages_are_objects(messages: Any) -> None:
    with pytest.raises(RequestError) as caught:
        ChatTemplate("x", {}).render(messages)
    assert caught.value.param == "messages"


def test_half_a_surrogate_pair_passes_through() -> None:
    assert ChatTemplate("{{ messages[0].content }}", {}).render([{"content": "\ud83d!"}]) == "\ud83d!"


def test_template_size_is_bounded() -> None:
    with pytest.raises(ModelError, match="--chat-template"):
        ChatTemplate("x" * (MAX_TEMPLATE_CHARS + 1), {})
