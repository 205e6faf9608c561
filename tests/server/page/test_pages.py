"""The rest of the page: comparison, status, keys, languages, a phone's width, and the viewer of the API."""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from .browser import Browser
from .scripted import ADMIN, KEY, ScriptedServer
from .test_chat import DONE, FIELD, answered, ask, begin, ready


def test_two_models_side_by_side(browser: Browser, site: ScriptedServer) -> None:
    with browser.page() as page:
        page.goto(f"{site.url}#/compare")
        page.wait("document.querySelectorAll('.lane select')[1]?.options.length === 2")
        page.help("choose", ".lane:nth-child(2) select", "smol/other-model")
        page.click(".lane:nth-child(2) .picker button")
        page.eval("document.querySelector('#field-temperature').focus()")
        page.type("0.9")
        page.press("Escape")
        before = [len(engine.requests) for engine in site.engines]
        ask(page, "[rich] both")
        answered(page, 2, ".lanes")
        asked = [engine.requests[at:] for engine, at in zip(site.engines, before, strict=True)]
        assert [[each.sampling.temperature for each in requests] for requests in asked] == [[0.6], [0.9]]
        for lane in (1, 2):
            figures = page.texts(f".lane:nth-child({lane}) .figures dd")
            assert len(figures) == 3 and "–" not in figures and figures[1].endswith((" ms", " s")), figures
        page.click(".view-head .check")
        ask(page, "[held] in turn")
        page.wait("document.querySelectorAll('.lane:nth-child(1) .message.assistant').length === 2")
        page.until(lambda: site.engines[0].waiting, "answer that waits")
        assert page.count(".lane:nth-child(2) .message.assistant") == 1, "the second waits for the first"
        site.let_go()
        page.wait("document.querySelectorAll('.lane:nth-child(2) .message.assistant').length === 2")
        page.until(lambda: site.engines[1].waiting, "answer that waits")
        page.press("Escape")
        page.wait(DONE)
        page.reload()
        page.wait("document.querySelectorAll('.lane:nth-child(2) .message').length === 4")
        assert page.count(".entries li") == 1
        page.wait("document.querySelectorAll('.lane select')[1].value === 'smol/other-model'")


def test_the_status_is_drawn_live(browser: Browser, site: ScriptedServer) -> None:
    with browser.page() as page:
        page.goto(f"{site.url}#/status")
        page.wait("document.querySelectorAll('.chart canvas').length === 4 && document.querySelector('.tiles dd')")
        page.help("ask", "[held]")
        page.wait("document.querySelector('[data-figure=running] dd').innerText === '1'")
        page.wait_text("running", "section:last-child tbody")
        site.let_go()
        page.wait("document.querySelector('[data-figure=running] dd').innerText === '0'")
        page.wait_text("stop", "section:last-child tbody")
        assert "qwen3:8b" in page.text("section:nth-last-child(2) tbody") and "8,191" in page.text(
            "section:nth-last-child(2) tbody"
        )
        assert "running: 0" in page.eval(
            "document.querySelector('[data-chart=requests] .canvas').getAttribute('aria-label')"
        )
        assert page.eval("document.querySelector('[data-figure=hitsInAll] dd').innerText").endswith("%")
        assert "[held]" not in page.text("section:last-child")


def test_a_key_is_asked_for_and_kept(browser: Browser, site: ScriptedServer) -> None:
    with browser.page() as page:
        page.goto(site.locked)
        page.wait("document.querySelector('dialog input[type=password]')")
        page.type("wrong")
        page.press("Enter")
        page.wait_text("refuses this key", "dialog")
        page.type(KEY)
        page.press("Enter")
        ready(page)
        ask(page, "[hello]")
        answered(page, 1)
        page.reload()
        ready(page)
        assert page.count("dialog") == 0 and page.count(".message") == 2
        page.eval("location.hash = '#/status'")
        page.wait_text("administrator’s key", ".status")
        page.eval(f"localStorage.setItem('ingle.key', JSON.stringify({json.dumps(ADMIN)}))")
        page.wait("document.querySelector('.tiles dd')")
        page.click(".ways.end button")
        page.click("dialog section:last-child .button")
        page.wait("localStorage.getItem('ingle.key') === null")
        page.forgive("401", "403")


@pytest.mark.parametrize(("language", "dark"), [("en-GB", True), ("zh-CN", False)])
def test_at_the_width_of_a_phone(browser: Browser, site: ScriptedServer, language: str, dark: bool) -> None:
    with browser.page(width=390, height=780, language=language, dark=dark, touch=True) as page:
        begin(page, site.url)
        chinese = language.startswith("zh")
        assert page.eval(f"document.querySelector({FIELD!r}).placeholder") == (
            "输入消息" if chinese else "Write a message"
        )
        assert page.eval("document.documentElement.lang") == ("zh-CN" if chinese else "en")
        assert page.eval("document.documentElement.dataset.theme") == ("dark" if dark else "light")
        page.eval(f"document.querySelector({FIELD!r}).focus()")
        page.type("[rich]")
        page.press("Enter")  # breaks the line: a phone has no Shift
        assert page.count(".message") == 0
        page.click(".send")
        answered(page, 1)
        page.wait("document.querySelector('.katex-display')")
        assert not page.help("isTooWide")
        page.click(".lead")
        page.wait("document.querySelector('.with-sidebar')")
        assert not page.help("isTooWide")
        page.click(".ways.end button")
        page.wait("document.querySelector('dialog')")
        assert not page.help("isTooWide")
        page.eval(f"document.querySelector('dialog [name=language][value={'en' if chinese else 'zh'}]').click()")
        page.wait_text("Preferences" if chinese else "偏好设置", "dialog h2")
        page.eval("document.querySelector('dialog [name=theme][value=light]').click()")
        assert page.eval("document.documentElement.dataset.theme") == "light"
        page.press("Escape")
        for way in ("compare", "status"):
            page.eval(f"location.hash = '#/{way}'")
            page.wait(f"document.querySelector('main.{way}')")
            assert not page.help("isTooWide")
        page.reload()
        assert page.eval("document.documentElement.lang") == ("en" if chinese else "zh-CN")


def test_errors_and_a_prefix(browser: Browser, site: ScriptedServer) -> None:
    with browser.page() as page:
        page.goto(site.prefixed.removesuffix("/"))
        ready(page)
        ask(page, "[hello]")
        answered(page, 1)
        assert all(url.startswith((site.prefixed.removesuffix("/"), "data:")) for url in page.addresses), page.addresses
        site.engines[0].status.ok, site.engines[0].status.detail = False, "the engine is gone"
        try:
            ask(page, "[hello]")
            page.wait_text("the engine is gone", ".state.bad")
        finally:
            site.engines[0].status.ok = True
        page.click(".state.bad button")
        answered(page, 2)
        page.forgive("503")


@pytest.mark.slow
def test_the_viewer_of_the_api(browser: Browser, site: ScriptedServer) -> None:
    with browser.page() as page:
        page.goto(f"{site.prefixed}docs")
        page.wait_text("/v1/chat/completions")
        page.click("[id$=get_v1_models] button")
        page.click(".try-out__btn")
        page.click(".execute")
        page.wait_text('"qwen3:8b"')
        assert all(url.startswith((site.prefixed, "data:", "blob:")) for url in page.addresses), page.addresses


@pytest.mark.slow
def test_nobody_is_kept_out(browser: Browser, site: ScriptedServer, tmp_path: Path) -> None:
    """By the rules of WCAG that a program can check: axe-core, from npm."""
    npm = shutil.which("npm")
    fetched = npm and subprocess.run([npm, "pack", "--silent", "axe-core@4.14.1"], cwd=tmp_path, capture_output=True)
    if not fetched or fetched.returncode:
        pytest.skip("npm gives no axe-core here")
    with tarfile.open(next(tmp_path.glob("axe-core-*.tgz"))) as packed:
        script = packed.extractfile("package/axe.min.js").read().decode()  # type: ignore[union-attr]
    rules = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
    found = f"axe.run(document, {{runOnly: {json.dumps(rules)}}}).then(({{violations}}) => violations.map(AT))"
    found = found.replace("AT", "({id, nodes}) => [id, nodes.slice(0, 3).map(({html}) => html)]")
    for dark in (False, True):
        with browser.page(dark=dark) as page:
            begin(page, site.url)
            page.eval(f"{script}; 0")
            assert not page.eval(found)
            for count, text in enumerate(("[rich]", "[tool]"), start=1):
                ask(page, text)
                answered(page, count)
            assert not page.eval(found)
            page.press("Control+,")
            page.wait("document.querySelector('dialog')")
            page.eval("document.querySelector('dialog details').open = true")
            assert not page.eval(found)
            page.press("Escape")
            for way, there in (("compare", ".lane .empty"), ("status", ".chart canvas")):
                page.eval(f"location.hash = '#/{way}'")
                page.wait(f"document.querySelector({there!r})")
                assert not page.eval(found)
