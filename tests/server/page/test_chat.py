"""Conversations, in a browser: written, stopped, edited, branched, kept, by mouse and by keyboard."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from .browser import Browser, Page
from .scripted import ScriptedServer

DONE = "!document.querySelector('.running')"
FIELD = ".composer textarea"


def begin(page: Page, url: str) -> None:
    page.goto(url)
    ready(page)


def ready(page: Page) -> None:
    page.wait("document.querySelector('.picker select')?.options.length === 2")


def ask(page: Page, text: str) -> None:
    page.eval(f"document.querySelector({FIELD!r}).focus()")
    page.type(text)
    page.press("Enter")


def answered(page: Page, count: int, within: str = "") -> None:
    page.wait(f"{DONE} && document.querySelectorAll('{within} .message.assistant').length === {count}")


def held(site: ScriptedServer, page: Page) -> None:
    page.until(lambda: site.engines[0].waiting, "answer that waits")


def test_a_conversation_is_streamed_stopped_edited_branched_and_kept(browser: Browser, site: ScriptedServer) -> None:
    with browser.page() as page:
        begin(page, site.url)
        ask(page, "[held] please")
        page.wait_text("The first half", ".message.assistant")
        held(site, page)
        assert page.eval("document.querySelector('.send').getAttribute('aria-label')") == "Stop"
        page.type("a draft")
        page.press("Enter")  # an answer runs: nothing is sent, nothing is lost
        assert page.eval(f"document.querySelector({FIELD!r}).value") == "a draft"
        page.reload()  # what was written and what was answered so far are there again
        ready(page)
        page.wait_text("Cut off when the page closed.")
        assert "The first half" in page.text(".message.assistant") and page.eval("location.hash").startswith("#/c/")
        page.until(lambda: not site.engines[0].running, "end of the request")
        page.click(".state button")
        page.wait_text("and the second half.", ".message.assistant")
        answered(page, 1)
        assert page.text(".message.assistant .prose") == "The first half and the second half."

        ask(page, "[held] again")
        held(site, page)
        page.press("Escape")
        page.wait_text("Stopped.")
        page.until(lambda: not site.engines[0].running, "end of the request")

        page.click(".message.user:nth-last-child(2) [aria-label=Edit]")
        page.eval("document.querySelector('.editor').value = 'say [hello]'")
        page.press("Control+Enter")
        page.wait_text("Hello, wörld 你好 😀!")
        answered(page, 2)
        assert page.texts(".branches span") == ["2/2"] and "first token" in page.text(".message:last-child .stats")
        page.click(".message:last-child [aria-label='Answer again']")
        answered(page, 2)
        page.wait("document.querySelectorAll('.branches').length === 2")
        page.click(".message.user [aria-label='Branch before']")
        page.wait_text("Stopped.")
        assert page.focused() == "Branch after" and page.count(".branches") == 1
        page.wait("document.querySelectorAll('.entries li').length === 1")
        (record,) = page.help("kept", "bodies")
        assert len(record["nodes"]) == 7 and record["title"] == "[held] please"
        assert all(url.startswith((site.url, "data:")) for url in page.addresses)


def test_settings_tools_and_thoughts(browser: Browser, site: ScriptedServer) -> None:
    with browser.page() as page:
        begin(page, site.url)
        page.press("Control+,")
        page.wait("document.querySelector('dialog #field-temperature').placeholder === '0.6'")
        page.eval("document.querySelector('dialog details').open = true")
        tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
        for name, value in (
            ("system", "Be brief."),
            ("temperature", "0.3"),
            ("max_tokens", "3000"),
            ("stop", "END\nSTOP"),
            ("tools", json.dumps([tool])),
            ("extra", '{"seed": 5}'),
        ):
            page.eval(f"document.querySelector('#field-{name}').focus()")
            page.type(value)
        page.eval("document.querySelector('[name=thinking][value=off]').click()")
        page.press("Escape")
        ask(page, "[tool] in 北京")
        answered(page, 1)
        page.wait("document.querySelector('.results textarea')")
        sampling, prompt = site.engines[0].requests[-1].sampling, site.engines[0].prompts[-1]
        assert (sampling.temperature, sampling.top_k, sampling.max_tokens, sampling.seed) == (0.3, 20, 3000, 5)
        assert all(part in prompt for part in ('"weather"', "<system>Be brief.", "THINK False"))
        assert page.text(".call-name") == "weather" and '"city": "北京"' in page.text(".call code")
        page.eval("document.querySelector('.results textarea').focus()")
        page.type("7 degrees")
        page.click(".results button")
        page.wait_text("It is 7 degrees.")
        answered(page, 2)
        assert page.count(".results") == 0
        prompt = site.engines[0].prompts[-1]
        assert '{"name": "weather", "arguments": {"city": "北京"}}' in prompt and "<tool_response>\n7 degrees" in prompt
        ask(page, "[slow] prompt")
        page.wait_text("Reading the prompt: ", ".message:last-child")
        half, whole = (int(each) for each in re.findall(r"\d+", page.text(".message:last-child .state")))
        assert half == whole // 2 and page.eval("document.querySelector('progress').position") == pytest.approx(
            0.5, abs=0.01
        )
        site.let_go()
        answered(page, 3)
        ask(page, "[thinks] now")
        page.wait("document.querySelector('.thought.active')")
        assert page.text(".thought summary") == "Thinking…" and not page.eval("document.querySelector('.thought').open")
        site.let_go()
        answered(page, 4)
        assert page.text(".message:last-child .prose:not(.thought .prose)") == "It is 555."
        page.click(".thought summary")
        page.wait_text("Let me see.", ".thought")
        assert page.text(".thought summary").startswith("Thought for")


def test_a_reader_who_scrolls_up_stays_there(browser: Browser, site: ScriptedServer) -> None:
    with browser.page(width=800, height=600) as page:
        begin(page, site.url)
        ask(page, "[long]")
        page.wait_text("Paragraph 29")
        held(site, page)
        page.until(lambda: page.help("belowThread") < 2, "end in sight")
        page.eval("document.querySelector('.thread').scrollTop = 300")
        page.wait("!document.querySelector('.to-end').hidden")
        site.let_go()
        page.wait_text("Paragraph 59")
        answered(page, 1)
        assert page.eval("document.querySelector('.thread').scrollTop") == 300
        page.click(".to-end")
        page.wait("document.querySelector('.to-end').hidden")
        assert page.help("belowThread") < 2


def test_by_keyboard_alone(browser: Browser, site: ScriptedServer) -> None:
    with browser.page() as page:
        begin(page, site.url)
        assert page.focused() == "Write a message"
        page.type("ni hao")
        for told in ("isComposing: true", "keyCode: 229"):  # an Enter that chooses a word
            event = f"new KeyboardEvent('keydown', {{key: 'Enter', bubbles: true, {told}}})"
            page.eval(f"void document.activeElement.dispatchEvent({event})")
        page.press("Shift+Enter")
        assert page.count(".message") == 0 and page.eval("document.activeElement.value") == "ni hao\n"
        page.type("[hello]")
        page.press("Enter")
        answered(page, 1)
        assert page.focused() == "Write a message"
        page.press("ArrowUp")
        page.wait("document.activeElement.className === 'editor'")
        page.press("Escape")
        page.wait("!document.querySelector('.editor')")
        page.press("Shift+Escape")
        seen = []
        for _ in range(4):
            page.press("Shift+Tab")
            seen.append(page.focused())
        assert seen[:3] == ["Answer again", "Edit", "Copy"], seen
        assert page.eval("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        page.press("Control+/")
        page.wait_text("Send the message", "dialog")
        page.press("Escape")
        page.wait("!document.querySelector('dialog')")
        page.press("Control+Shift+S")
        page.wait("!document.querySelector('.with-sidebar')")
        page.press("Control+k")
        assert page.focused() == "Search conversations"
        page.type("hao")
        page.press("Tab")
        page.press("Tab")
        page.press("Enter")  # the actions of the conversation
        page.wait("document.activeElement.getAttribute('role') === 'menuitem'")
        page.press("Enter")
        page.wait("document.activeElement.className === 'rename'")
        page.type("Renamed")
        page.press("Enter")
        page.help("choose", ".search input", "")
        page.wait_text("Renamed", ".entries")
        page.press("Control+Shift+O")
        page.wait("!document.querySelector('.message') && document.activeElement.matches('.composer textarea')")
        page.press("Shift+Tab")
        page.press("Shift+Tab")
        assert page.focused().startswith(("Translate", "Solve"))
        page.press("Enter")
        assert page.eval("document.activeElement.value").startswith(("Translate", "Solve"))


def test_conversations_leave_and_come_back_as_a_file(browser: Browser, site: ScriptedServer, tmp_path: Path) -> None:
    with browser.page() as page:
        page.downloads(tmp_path)
        begin(page, site.url)
        ask(page, "first [hello]")
        answered(page, 1)
        page.press("Control+Shift+O")
        page.wait("!document.querySelector('.message')")
        ask(page, "second [hello]")
        answered(page, 1)
        page.click(".ways.end button")
        page.click("dialog .row .button:nth-child(1)")
        page.until(lambda: [*tmp_path.glob("ingle-*.json")], "file")
        (path,) = tmp_path.glob("ingle-*.json")
        page.until(lambda: path.read_text().endswith("}"), "whole file")
        told = json.loads(path.read_text())
        assert (told["format"], told["version"], len(told["conversations"])) == ("ingle-conversations", 1, 2)
        page.click("dialog .danger")
        page.wait("document.querySelectorAll('.entries li').length === 0")
        page.files("dialog input[type=file]", path)
        page.wait("document.querySelectorAll('.entries li').length === 2")
        assert page.texts(".entries a") == ["second [hello]", "first [hello]"]

        bad = tmp_path / "bad.json"
        circle = {"a": {"role": "user", "parent": "b"}, "b": {"role": "user", "parent": "a"}}
        hostile = {"id": "../x", "title": "<img src=x>", "nodes": circle}
        for text in ("{", "[]", json.dumps({**told, "conversations": [hostile]})):
            bad.write_text(text)
            page.files("dialog input[type=file]", bad)
            page.wait("document.querySelector('.note.bad')")
            page.eval("document.querySelector('.note.bad').remove()")
        assert page.count(".entries li") == 2
        page.press("Escape")
        page.eval("document.querySelector('.entries li .icon-button').click()")
        page.click(".menu:popover-open button:nth-child(3)")
        page.wait("document.querySelectorAll('.entries li').length === 1")
        page.eval("[...document.querySelectorAll('.note .text-button')].at(-1).click()")
        page.wait("document.querySelectorAll('.entries li').length === 2")

        page.press("Control+Shift+O")
        ask(page, "third [held]")
        held(site, page)
        page.wait("document.querySelectorAll('.entries li').length === 3")
        page.eval("document.querySelector('.entries li .icon-button').click()")
        page.click(".menu:popover-open button:nth-child(3)")
        page.until(lambda: not site.engines[0].running, "end of the request")
        page.wait("document.querySelectorAll('.entries li').length === 2 && !document.querySelector('.message')")
        assert len(page.help("kept", "bodies")) == 2, "what is deleted stays away, although its answer ends later"
        page.eval("IDBObjectStore.prototype.put = () => { throw new DOMException('full', 'QuotaExceededError'); }")
        ask(page, "[hello] without room")
        answered(page, 1)
        page.wait_text("no room left", ".note.bad")
