"""What a model writes: drawn as it is meant, the same in pieces as in one, and harmless whatever it holds."""

from __future__ import annotations

import json

from .browser import Browser
from .scripted import HOSTILE, RICH, SCRIPTS, ScriptedServer
from .test_chat import answered, ask, ready

DRAW = """(async () => {
    const at = document.querySelector('script[type=module]').src.replace('main.js', '');
    const [{ Growing }, _] = [await import(at + 'markdown.js'), await import(at + 'maths.js')];
    const drawn = (pieces) => {
        const element = document.createElement('div');
        const growing = new Growing(element);
        pieces.forEach((text) => growing.show(text));
        growing.show(pieces.at(-1) ?? '', { whole: true });
        return element;
    };
    const result = %s;
    return result;
})()"""


def test_a_hostile_answer_does_nothing(browser: Browser, site: ScriptedServer) -> None:
    with browser.page() as page:
        page.goto(site.url)
        ready(page)
        ask(page, "[hostile]")
        answered(page, 1)
        page.wait("document.querySelector('.katex')")
        page.wait("document.querySelectorAll('.hljs-tag, .hljs-name').length")
        element = "document.querySelector('.message.assistant .body')"
        assert page.eval("window.isBroken") is None
        forbidden = "script, img, iframe, form, input, style, object, embed, link, base, meta, video, audio"
        assert page.eval(f"{element}.querySelectorAll('{forbidden}').length") == 0
        links = page.eval(f"[...{element}.querySelectorAll('a')].map((a) => [a.getAttribute('href'), a.target, a.rel])")
        safe = [href for href, target, rel in links if href]
        assert set(safe) == {"https://example.com/page", "https://example.com/track.png"}, links
        assert all((target, rel) == ("_blank", "noopener noreferrer nofollow") for _, target, rel in links)
        handlers = f"[...{element}.querySelectorAll('*')].flatMap((e) => e.getAttributeNames()).filter((n) => n.startsWith('on') || n === 'id')"
        assert page.eval(handlers) == []
        shown = page.text(".message.assistant .body")
        assert "<script>window.isBroken = 1</script>" in shown and "<iframe" in shown, "markup is shown, not lost"
        assert 'const text = "</code></pre>' in shown
        for piece in ("<a href='https://x.example' onclick='window.isBroken=1'>", "<math><mi//xlink:href='data:x,<script>window.isBroken=1</script>'>"):
            drawn = page.eval(DRAW % f"drawn([{json.dumps(piece * 3)}]).querySelectorAll('math, [onclick]').length")
            assert drawn == 0
        # The last walls, had the others fallen.
        refused = "(() => { try { document.createElement('div').innerHTML = '<b>'; return 'taken'; } catch (error) { return error.name; } })()"
        assert page.eval(refused) == "TypeError" and page.eval("window.isBroken") is None
        page.problems = [each for each in page.problems if "TrustedHTML" not in each]
        assert all(url.startswith((site.url, "data:")) for url in page.addresses), page.addresses


def test_it_is_drawn_as_it_is_meant(browser: Browser, site: ScriptedServer) -> None:
    cases = {
        "这是**“术语”**。": "<p>这是<strong>“术语”</strong>。</p>",
        "**该星号不会被识别。**这是": "<p><strong>该星号不会被识别。</strong>这是</p>",
        "含**「重点」**内容": "<p>含<strong>「重点」</strong>内容</p>",
        "a **b** c, 2**3**4 and `**x**`": "<p>a <strong>b</strong> c, 2<strong>3</strong>4 and <code>**x**</code></p>",
        "5~10 and 3~4, ~~gone~~": "<p>5~10 and 3~4, <del>gone</del></p>",
        "$5 and $6": "<p>$5 and $6</p>",
        "- [x] done": "<ul>\n<li>☑ done</li>\n</ul>",
        "a<br>b H<sub>2</sub>O <b>": "<p>a<br>b H<sub>2</sub>O &lt;b&gt;</p>",
    }
    with browser.page() as page:
        page.goto(site.url)
        ready(page)
        drawn = page.eval(DRAW % f"{json.dumps([*cases])}.map((text) => drawn([text]).firstElementChild.innerHTML.trim())")
        assert dict(zip(cases, drawn, strict=True)) == cases
        href = page.eval(DRAW % "drawn(['见 https://example.com/a_(b)。然后 https://x.example/?q=1, (https://y.example).']).querySelectorAll('a').values().map((a) => a.href).toArray()")
        assert href == ["https://example.com/a_(b)", "https://x.example/?q=1", "https://y.example/"]
        maths = ["\\(x\\)", "$x^2$", "$$x$$", "a $$y$$ b", "\\[\nx\n\\]", "$$\nx\n$$", "```math\nx\n```"]
        seen = page.eval(
            DRAW % f"await Promise.all({json.dumps(maths)}.map(async (text) => {{ const element = drawn([text]); "
            "await new Promise((done) => { const look = () => element.querySelector('.katex') ? done() : setTimeout(look, 20); look(); }); "
            "return element.querySelectorAll('.katex-display').length; }))"
        )
        assert seen == [0, 0, 1, 1, 1, 1, 1]
        code = "drawn(['```\\nfoo = \"\\\\(bar\\\\)\"\\n```']).querySelector('code').textContent"
        assert page.eval(DRAW % code) == 'foo = "\\(bar\\)"\n'


def test_pieces_come_to_the_same_as_the_whole(browser: Browser, site: ScriptedServer) -> None:
    odd = "- a\n- b\n\n  c\n\n1. x\n\n   ```js\n   let a = 1;\n   ```\n2. y\n\nTitle\n===\n\n> q\nlazy\n\n[r]: https://example.com\n\nsee [r]\n"
    with browser.page() as page:
        page.goto(site.url)
        ready(page)
        for text in (RICH, odd, SCRIPTS["zh"], HOSTILE):
            script = (
                f"(() => {{ const text = {json.dumps(text)}; const plain = (of) => {{ of.querySelectorAll('.maths, .tex').forEach((e) => e.remove()); return of.innerHTML; }}; "
                "const pieces = Array.from({ length: Math.ceil(text.length / 7) }, (_, at) => text.slice(0, 7 * (at + 1))); "
                "return [plain(drawn(pieces)), plain(drawn([text]))]; })()"
            )
            one, other = page.eval(DRAW % script)
            assert one == other
        # Of a long answer only the end is drawn again.
        kept = page.eval(
            DRAW % "(() => { const element = document.createElement('div'); const growing = new Growing(element); "
            "let text = ''; const seen = new Set(); for (let at = 0; at < 50; at++) { text += `Paragraph ${at}.\\n\\n`; growing.show(text + 'x'); "
            "[...element.children].forEach((each) => seen.add(each)); } return [seen.size, element.children.length]; })()"
        )
        assert kept[1] == 51 and kept[0] <= 101, kept
