"""What a model writes: drawn as it is meant, the same in pieces as in one, and harmless whatever it holds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .browser import Browser, Page
from .scripted import HOSTILE, RICH, SCRIPTS, ScriptedServer
from .test_chat import answered, ask, begin

FORBIDDEN = "script, img, iframe, form, input, style, object, embed, link, base, meta, video, audio"
LINKS = "[...{}.querySelectorAll('a')].map((a) => [a.getAttribute('href'), a.target, a.rel])"
ATTRIBUTES = "[...{}.querySelectorAll('*')].flatMap((each) => each.getAttributeNames())"
TO_MARKUP = "(() => { try { document.body.innerHTML = '<b>'; } catch (error) { return error.name; } })()"


def test_a_hostile_answer_does_nothing(browser: Browser, site: ScriptedServer) -> None:
    with browser.page() as page:
        begin(page, site.url)
        ask(page, "[hostile]")
        answered(page, 1)
        page.wait("document.querySelector('.katex') && document.querySelector('.hljs-name')")
        body = "document.querySelector('.message.assistant .body')"
        assert page.eval(f"{body}.querySelectorAll('{FORBIDDEN}').length") == 0
        links = page.eval(LINKS.format(body))
        assert {href for href, _, _ in links if href} == {"https://example.com/page", "https://example.com/track.png"}
        assert all((target, rel) == ("_blank", "noopener noreferrer nofollow") for _, target, rel in links)
        assert not [name for name in page.eval(ATTRIBUTES.format(body)) if name.startswith("on") or name == "id"]
        shown = page.text(".message.assistant .body")
        assert "<script>window.isBroken = 1</script>" in shown and "<iframe" in shown, "markup is shown, not lost"
        assert 'const text = "</code></pre>' in shown
        for piece in (
            "<a href='https://x.example' onclick='window.isBroken=1'>",
            "<math><mi//xlink:href='data:x,<script>window.isBroken=1</script>'>",
        ):
            assert page.help("dangers", piece * 3) == 0
        assert page.eval(TO_MARKUP) == "TypeError", "had the other walls fallen, no text becomes markup"
        page.problems = [each for each in page.problems if "TrustedHTML" not in each]
        assert page.eval("window.isBroken") is None
        assert all(url.startswith((site.url, "data:")) for url in page.addresses), page.addresses


@pytest.fixture(scope="module")
def page(browser: Browser, site: ScriptedServer) -> Iterator[Page]:
    """Of which only the modules are used."""
    with browser.page() as page:
        begin(page, site.url)
        yield page


def test_it_is_drawn_as_it_is_meant(page: Page) -> None:
    cases = {
        "这是**“术语”**。": "<p>这是<strong>“术语”</strong>。</p>",
        "**该星号不会被识别。**这是": "<p><strong>该星号不会被识别。</strong>这是</p>",
        "含**「重点」**内容": "<p>含<strong>「重点」</strong>内容</p>",
        "a **b** c, 2**3**4 and `**x**`": "<p>a <strong>b</strong> c, 2<strong>3</strong>4 and <code>**x**</code></p>",
        "5~10 and 3~4, ~~gone~~": "<p>5~10 and 3~4, <del>gone</del></p>",
        "$5 and $6": "<p>$5 and $6</p>",
        "- [x] done": "<ul>\n<li>☑ done</li>\n</ul>",
        "a<br>b H<sub>2</sub>O <b>": "<p>a<br>b H<sub>2</sub>O &lt;b&gt;</p>",
        "one\ntwo": "<p>one<br>two</p>",
    }
    addresses = "见 https://example.com/a_(b)。然后 https://x.example/?q=1, (https://y.example)."
    maths = ["\\(x\\)", "$x^2$", "$$x$$", "a $$y$$ b", "\\[\nx\n\\]", "$$\nx\n$$", "```math\nx\n```"]
    assert dict(zip(cases, page.help("markup", [*cases]), strict=True)) == cases
    assert page.help("links", addresses) == [
        "https://example.com/a_(b)", "https://x.example/?q=1", "https://y.example/",
    ]  # fmt: skip
    assert page.help("displayed", maths) == [0, 0, 1, 1, 1, 1, 1]
    assert page.help("code", '```\nfoo = "\\(bar\\)"\n```') == 'foo = "\\(bar\\)"\n'


def test_pieces_come_to_the_same_as_the_whole(page: Page) -> None:
    odd = (
        "- a\n- b\n\n  c\n\n1. x\n\n   ```js\n   let a = 1;\n   ```\n2. y\n\nTitle\n===\n\n> q\nlazy\n\n"
        "[r]: https://example.com\n\nsee [r]\n"
    )
    for text in (RICH, odd, SCRIPTS["zh"], HOSTILE):
        grown, whole = page.help("twice", text)
        assert grown == whole
    assert page.help("made", 50) <= 101, "only the end of a long answer is drawn again"


def test_a_stream_is_read_whatever_its_pieces(page: Page) -> None:
    told = ': keep-alive\n\ndata: {"a": "你好 😀"}\n\ndata:x\r\ndata: y\r\n\r\nevent: z\ndata: [DONE]\n\ndata: cut off'
    for size in (1, 2, 3, 7, 1000):
        assert page.help("events", told, size) == ['{"a": "你好 😀"}', "x\ny", "[DONE]"]
