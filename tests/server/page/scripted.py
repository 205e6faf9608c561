"""A server whose models say what their prompts ask for: the whole of ingle's HTTP side, with pretended engines.

`[name]` in the last message of a user names the answer. One that is `held` stops in the middle until it is let go, so
that what happens meanwhile needs no clock.
"""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette

from ingle.channel import EngineStats
from ingle.config.access import ApiKey
from ingle.request import EngineOutput, EngineRequest
from ingle.server.access import Access
from ingle.server.app import create_app
from ingle.server.models import ModelPool, ServedModel
from ingle.text.chat_template import ChatTemplate
from ingle.text.formats.declared import reasoning_format, tool_format
from ingle.text.formats.of_model import Formats
from ingle.text.load import TextSide
from ingle.text.tokenizer import Tokenizer
from tests.server.fakes import Info, ScriptedEngine, served

TEMPLATE = (
    "{% if tools %}TOOLS {{ tools | tojson }}\n{% endif %}{% for m in messages %}{% if not loop.first %}\n{% endif %}"
    "<{{ m.role }}>{{ m.content or '' }}{% endfor %}"
    "{% if enable_thinking is defined %}\nTHINK {{ enable_thinking }}{% endif %}"
    "{% if add_generation_prompt %}\n<assistant>{% endif %}"
)
FORMATS = Formats(tool_format("hermes"), reasoning_format("think"))
HOLD = "\x00"
"""Where a held answer waits."""
HOSTILE = """Hello <script>window.isBroken = 1</script> <img src=x onerror="window.isBroken = 2">

[click](javascript:window.isBroken=3) [data](data:text/html,<script>window.isBroken=4</script>)
[site](https://example.com/page) ![picture](https://example.com/track.png)

<svg onload="window.isBroken=5"><a xlink:href="javascript:window.isBroken=6">x</a></svg>
<iframe src="https://example.com/frame"></iframe><style>body { display: none }</style>
<form action="https://example.com/form"><input name="getElementById"></form>

<details open ontoggle="window.isBroken=7"><summary>s</summary></details>
<a id="app" name="app" href="#x" onclick="window.isBroken=8">clobber</a>

$\\href{javascript:window.isBroken=9}{x}$ $\\htmlData{a=b}{x}$ $\\includegraphics{https://example.com/tex.png}$

```html
<script>window.isBroken = 10</script><img src=x onerror="window.isBroken = 11">
```

```javascript
const text = "</code></pre><script>window.isBroken = 12</script>";
```

| a | <img src=x onerror="window.isBroken = 13"> |
| - | - |
| `<b>` | [x](vbscript:window.isBroken=14) |
"""
RICH = """# A title

Some **bold**, *slanted* and `code`, with a list:

1. one
2. two
   - inside

| name | value |
| :-- | --: |
| a | 1 |

Inline \\(e^{i\\pi} + 1 = 0\\) and $a_1$, but $5 and $6 are money.

$$
\\int_0^1 x^2\\,dx = \\frac{1}{3}
$$

```python
def merge(left, right):
    # of two sorted lists
    return sorted(left + right)
```

**“注意：”**这是**重点。**然后访问https://example.com/路径。范围 5~10 与 3~4。

> A quotation.
"""
SCRIPTS = {
    "hello": "Hello, wörld 你好 😀!",
    "rich": RICH,
    "hostile": HOSTILE,
    "thinks": f"<think>\nLet me see. 15 * 37 is 555.\n{HOLD}</think>\n\nIt is **555**.",
    "tool": 'I look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "北京"}}\n</tool_call>',
    "slow": f"{HOLD}There it is.",
    "held": f"The first half{HOLD} and the second half.",
    "long": "\n\n".join(f"Paragraph {number} of a long answer.{HOLD if number == 30 else ''}" for number in range(60)),
    "zh": "你好！这是一个**“测试”**。\n\n- 第一项\n- 第二项",
}
_SCRIPT = re.compile(r"\[(\w+)\]")


@dataclass
class PageEngine(ScriptedEngine):
    held: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    waiting: int = 0
    """Answers that wait to be let go."""
    prompts: list[str] = field(default_factory=list)

    async def generate(self, request: EngineRequest) -> AsyncGenerator[EngineOutput, None]:
        prompt = self.tokenizer.decode(list(request.prompt_token_ids), skip_special_tokens=True)
        self.prompts.append(prompt)
        self.requests.append(request)
        self.running += 1
        self.count(num_prompt_tokens=len(request.prompt_token_ids), num_queried_tokens=len(request.prompt_token_ids))
        try:
            async for output in self._said(request, self.answer(prompt)):
                yield output
        finally:
            self.running -= 1
            self.count()

    def answer(self, prompt: str) -> str:
        *_, last = prompt.split("<user>")
        names = _SCRIPT.findall(last.partition("\n<")[0])
        said = SCRIPTS.get(names[-1], f"No script {names[-1]}") if names else "Fine."
        if "<tool_response>" in last:
            return "It is 7 degrees."
        begun = prompt.rpartition("<assistant>")[2]  # what is to be gone on with
        return said.replace(HOLD, "").removeprefix(begun) if begun else said

    async def _said(self, request: EngineRequest, text: str) -> AsyncGenerator[EngineOutput, None]:
        size = len(request.prompt_token_ids)
        if request.return_progress:
            yield EngineOutput(request.id, [], num_prompt_read=size // 2)
        first, most = True, request.sampling.max_tokens
        parts = text.split(HOLD)
        for at, part in enumerate(parts):
            tokens = self.tokenizer.encode(part, add_special_tokens=False)
            if at == len(parts) - 1:
                tokens = [*tokens, *self.tokenizer.eos_token_ids[:1]]
            for start in range(0, len(tokens), 4):
                step = tokens[start : start + 4]
                ended = at == len(parts) - 1 and start + 4 >= len(tokens)
                cut = most is not None and start + 4 >= most
                await asyncio.sleep(0.002)
                self.count(num_step_tokens=len(step))
                yield EngineOutput(
                    request.id, step, "stop" if ended else "length" if cut else None, None, size // 3 if first else 0
                )
                if cut:
                    return
                first = False
            if at < len(parts) - 1:
                await self._hold()

    async def _hold(self) -> None:
        self.waiting += 1
        try:
            while not self.held.acquire(blocking=False):  # noqa: ASYNC110 (let go in another thread)
                await asyncio.sleep(0.005)
        finally:
            self.waiting -= 1

    def count(self, **more: int) -> None:
        kept = self.stats
        counted = {name: getattr(kept, name) + value for name, value in more.items()}
        rooms = {"num_pages": 32, "num_used_pages": min(32, 4 * self.running), "num_cached_pages": 6}
        self.stats = EngineStats(
            **{
                "num_prompt_tokens": kept.num_prompt_tokens, "num_queried_tokens": kept.num_queried_tokens,
                "num_step_tokens": kept.num_step_tokens, "num_hit_tokens": kept.num_queried_tokens // 3, **counted,
            }, **rooms, num_running=self.running,
        )  # fmt: skip


@dataclass
class ScriptedServer:
    """In a thread of its own, with two models. `locked` asks for a key, `prefixed` lies below /llm."""

    engines: list[PageEngine]
    url: str = ""
    locked: str = ""
    prefixed: str = ""

    def let_go(self, count: int = 1) -> None:
        """Answers that are held, of the first model."""
        self.engines[0].held.release(count)


KEY = "the-right-key"
ADMIN = "the-key-of-an-administrator"


@contextmanager
def scripted_server(tokenizer: Tokenizer) -> Iterator[ScriptedServer]:
    engines = [
        PageEngine(tokenizer, Info(100_000, tokenizer.vocab_size, num_parameters=number), lambda request: ())
        for number in (8_190_735_360, 494_032_768)
    ]
    names = ("qwen3:8b", "smol/other-model")
    text = TextSide(
        tokenizer, ChatTemplate(TEMPLATE, tokenizer.special_tokens), {"temperature": 0.6, "top_k": 20}, formats=FORMATS
    )
    pool = ModelPool(
        [ServedModel(engine, text, (name,), f"/models/{name}") for engine, name in zip(engines, names, strict=True)]
    )  # type: ignore[arg-type]
    keys = (ApiKey(KEY), ApiKey(ADMIN, "ops", is_admin=True))
    apps = [
        create_app(pool, access, access_log=False)
        for access in (Access(), Access(api_keys=keys), Access(root_path="/llm"))
    ]
    started: Any = threading.Event()
    server, loop = ScriptedServer(engines), asyncio.new_event_loop()
    ended = asyncio.Event()
    thread = threading.Thread(target=lambda: loop.run_until_complete(_serve(server, apps, started, ended)), daemon=True)
    thread.start()
    assert started.wait(30)
    try:
        yield server
    finally:
        server.let_go(100)
        loop.call_soon_threadsafe(ended.set)
        thread.join(30)


async def _serve(server: ScriptedServer, apps: list[Starlette], started: threading.Event, ended: asyncio.Event) -> None:
    async with served(apps[0]) as first, served(apps[1]) as second, served(apps[2]) as third:
        server.url, server.locked = f"http://127.0.0.1:{first}/", f"http://127.0.0.1:{second}/"
        server.prefixed = f"http://127.0.0.1:{third}/llm/"
        started.set()
        await ended.wait()
