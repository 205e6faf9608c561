"""Chromium without a window, driven by the DevTools protocol over a pair of pipes, as somebody with a keyboard would.

No package is needed for that: messages are JSON, each ended by a zero byte.
"""

from __future__ import annotations

import base64
import fcntl
import itertools
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

EXECUTABLES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WITHIN_S = 30.0
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe",
    "--no-first-run", "--disable-extensions", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--disable-default-apps", "--mute-audio", "--hide-scrollbars", "--force-color-profile=srgb",
    "--disable-renderer-backgrounding", "--disable-backgrounding-occluded-windows",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)  # fmt: skip
KEYS: Mapping[str, tuple[str, int, str]] = {
    "Enter": ("Enter", 13, "\r"), "Escape": ("Escape", 27, ""), "Tab": ("Tab", 9, ""), "ArrowUp": ("ArrowUp", 38, ""),
    "ArrowDown": ("ArrowDown", 40, ""), " ": ("Space", 32, " "), "/": ("Slash", 191, ""), ",": ("Comma", 188, ""),
}  # fmt: skip
"""Name to the key's place on the keyboard, its number and what it writes."""
HELPERS = Path(__file__).with_name("helpers.js").read_text()
STILL = """(async () => {
    const centre = () => {
        const of = document.querySelector(%s);
        of.scrollIntoView({ block: 'nearest' });
        const box = of.getBoundingClientRect();
        return [box.x + box.width / 2, box.y + box.height / 2];
    };
    for (let before = null, now = centre(); ; before = now, now = centre()) {
        if (String(before) === String(now)) return now;
        await new Promise((done) => setTimeout(done, 20));
    }
})()"""
"""Where an element's middle is, once it moves no more."""
MODIFIERS = {"Alt": 1, "Control": 2, "Meta": 4, "Shift": 8}


def executable() -> str | None:
    return next(filter(None, map(shutil.which, EXECUTABLES)), None)


class Browser:
    """One for all tests. Each page has cookies and storage of its own."""

    def __init__(self, path: str, folder: Path) -> None:
        self._numbers = itertools.count(1)
        self._answers: dict[int, Future[dict[str, Any]]] = {}
        self._pages: dict[str, Page] = {}
        their_end, self._to = _pipe()
        self._from, their_other = _pipe()
        given = [(os.POSIX_SPAWN_DUP2, their_end, 3), (os.POSIX_SPAWN_DUP2, their_other, 4)]
        log = os.open(folder / "chromium.log", os.O_WRONLY | os.O_CREAT)
        given += [(os.POSIX_SPAWN_DUP2, log, 1), (os.POSIX_SPAWN_DUP2, log, 2)]
        arguments = [path, *FLAGS, f"--user-data-dir={folder / 'profile'}", "about:blank"]
        self._pid = os.posix_spawn(path, arguments, {**os.environ, "LANGUAGE": "en"}, file_actions=given, setpgroup=0)
        for end in (their_end, their_other, log):
            os.close(end)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def send(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        answer = self._answers[number] = Future()
        message = {"id": number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        return answer.result(WITHIN_S)

    @contextmanager
    def page(self, **options: Any) -> Iterator[Page]:
        """A page of its own, which has to have gone without a complaint of the browser's."""
        context = self.send("Target.createBrowserContext")["browserContextId"]
        try:
            page = self.tab(context, **options)
            yield page
            assert not page.problems, page.problems
        finally:
            self.send("Target.disposeBrowserContext", browserContextId=context)

    def tab(self, context: str, **options: Any) -> Page:
        target = self.send("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = self._pages[session] = Page(self, session, context)
        page.prepare(**options)
        return page

    def close(self) -> None:
        with suppress(Exception):
            self.send("Browser.close")
        deadline = time.monotonic() + 10
        while os.waitpid(self._pid, os.WNOHANG) == (0, 0):
            if time.monotonic() > deadline:
                os.killpg(self._pid, signal.SIGKILL)
            time.sleep(0.02)
        self._reader.join(10)
        for end in (self._to, self._from):
            os.close(end)

    def _read(self) -> None:
        left = b""
        while piece := os.read(self._from, 1 << 16):
            *messages, left = (left + piece).split(b"\0")
            for message in map(json.loads, messages):
                self._take(message)
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(RuntimeError("the browser has gone"))

    def _take(self, message: dict[str, Any]) -> None:
        if "id" in message:
            answer = self._answers.pop(message["id"])
            if "error" in message:
                answer.set_exception(RuntimeError(f"{message['error']}"))
            else:
                answer.set_result(message["result"])
        elif (page := self._pages.get(message.get("sessionId", ""))) is not None:
            page.told(message["method"], message["params"])


def _pipe() -> tuple[int, int]:
    """Its ends above the numbers that the browser is to find its own at."""
    ends = os.pipe()
    moved = fcntl.fcntl(ends[0], fcntl.F_DUPFD_CLOEXEC, 10), fcntl.fcntl(ends[1], fcntl.F_DUPFD_CLOEXEC, 10)
    for end in ends:
        os.close(end)
    return moved


class Page:
    def __init__(self, browser: Browser, session: str, context: str) -> None:
        self._browser = browser
        self._session = session
        self.context = context
        self.problems: list[str] = []
        """Exceptions, errors and what the Content-Security-Policy has forbidden."""
        self.addresses: list[str] = []
        """Of all that was asked for."""

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._browser.send(method, self._session, **parameters)

    def prepare(
        self, *, width: int = 1280, height: int = 800, language: str = "en", dark: bool = False, touch: bool = False
    ) -> None:
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        agent = self._browser.send("Browser.getVersion")["userAgent"]
        self.send("Emulation.setUserAgentOverride", userAgent=agent, acceptLanguage=language)
        self.resize(width, height, touch=touch)
        self.prefer(dark)

    def resize(self, width: int, height: int, *, touch: bool = False) -> None:
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=touch)
        self.send("Emulation.setTouchEmulationEnabled", enabled=touch)

    def prefer(self, dark: bool) -> None:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        still = {"name": "prefers-reduced-motion", "value": "reduce"}
        self.send("Emulation.setEmulatedMedia", features=[scheme, still])

    def told(self, method: str, event: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            details = event["exceptionDetails"]
            self.problems.append(details.get("exception", {}).get("description") or details["text"])
        elif method == "Runtime.consoleAPICalled" and event["type"] in ("error", "warning", "assert"):
            self.problems.append(f"{event['type']}: {[each.get('value') for each in event['args']]}")
        elif method == "Log.entryAdded" and event["entry"]["level"] == "error":
            self.problems.append(f"{event['entry']['text']} {event['entry'].get('url', '')}")
        elif method == "Network.requestWillBeSent":
            self.addresses.append(event["request"]["url"])

    def forgive(self, *words: str) -> None:
        """Problems that were meant, each of which has to be there."""
        for word in words:
            self.until(lambda word=word: any(word in problem for problem in self.problems), f"a problem with {word!r}")
        self.problems = [problem for problem in self.problems if not any(word in problem for word in words)]

    @staticmethod
    def until(condition: Any, what: str) -> None:
        deadline = time.monotonic() + WITHIN_S
        while not condition():
            assert time.monotonic() < deadline, f"there is no {what}"
            time.sleep(0.01)

    def goto(self, url: str) -> None:
        self.send("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && document.querySelector('main, #viewer')")

    def reload(self) -> None:
        self.eval("window.isOld = true")
        self.send("Page.reload")
        self.wait("!window.isOld && document.readyState === 'complete' && document.querySelector('main')")

    def eval(self, script: str) -> Any:
        """The value of an expression, or of what it promises."""
        answer = self.send(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True, userGesture=True
        )
        if "exceptionDetails" in answer:
            details = answer["exceptionDetails"]
            raise AssertionError(f"{script}: {details.get('exception', {}).get('description') or details['text']}")
        return answer["result"].get("value")

    def help(self, name: str, *values: object) -> Any:
        """What one of the functions in `helpers.js` says."""
        if not self.eval("Boolean(globalThis.helpers)"):
            self.eval(HELPERS)
            self.eval("prepared")
        return self.eval(f"helpers[{json.dumps(name)}](...{json.dumps(values)})")

    def wait(self, condition: str) -> None:
        """Until the expression is true."""
        deadline = time.monotonic() + WITHIN_S
        while True:
            with suppress(RuntimeError):  # the page may just go
                if self.eval(f"Boolean({condition})"):
                    return
            if time.monotonic() > deadline:
                raise AssertionError(
                    f"not so within {WITHIN_S:.0f} s: {condition}\n{self.problems}\n{self.text('body')[:2000]}"
                )
            time.sleep(0.02)

    def wait_text(self, text: str, within: str = "body") -> None:
        self.wait(f"document.querySelector({within!r})?.innerText.includes({json.dumps(text)})")

    def text(self, selector: str) -> str:
        return str(self.eval(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''"))

    def texts(self, selector: str) -> list[str]:
        return list(self.eval(f"[...document.querySelectorAll({json.dumps(selector)})].map((each) => each.innerText)"))

    def count(self, selector: str) -> int:
        return int(self.eval(f"document.querySelectorAll({json.dumps(selector)}).length"))

    def click(self, selector: str) -> None:
        found = json.dumps(selector)
        self.wait(f"document.querySelector({found}) && !document.querySelector({found}).disabled")
        place = self.eval(STILL % found)
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            pressed = "none" if kind == "mouseMoved" else "left"
            self.send("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button=pressed, clickCount=1)

    def type(self, text: str) -> None:
        self.send("Input.insertText", text=text)

    def press(self, keys: str) -> None:
        """`Enter`, `Shift+Tab`, `Control+Shift+O`."""
        *held, key = keys.split("+")
        code, number, text = KEYS.get(key, (f"Key{key.upper()}", ord(key.upper()[0]), ""))
        modifiers = sum(MODIFIERS[each] for each in held)
        told = {"key": key, "code": code, "windowsVirtualKeyCode": number, "modifiers": modifiers}
        down = {**told, "text": text} if text and not modifiers & ~MODIFIERS["Shift"] else told
        self.send("Input.dispatchKeyEvent", type="keyDown" if "text" in down else "rawKeyDown", **down)
        self.send("Input.dispatchKeyEvent", type="keyUp", **told)

    def focused(self) -> str:
        """What has the focus, as a screen reader would call it."""
        said = "of.getAttribute('aria-label') ?? of.innerText ?? ''"
        return str(self.eval(f"(() => {{ const of = document.activeElement; return {said}; }})()")).strip()

    def files(self, selector: str, *paths: Path) -> None:
        """Chooses them in a field for files."""
        document = self.send("DOM.getDocument")["root"]["nodeId"]
        node = self.send("DOM.querySelector", nodeId=document, selector=selector)["nodeId"]
        self.send("DOM.setFileInputFiles", nodeId=node, files=[str(path) for path in paths])

    def downloads(self, folder: Path) -> None:
        """What the page hands out from now on lies there."""
        self._browser.send(
            "Browser.setDownloadBehavior", behavior="allow", browserContextId=self.context, downloadPath=str(folder)
        )

    def screenshot(self, path: Path) -> None:
        picture = self.send("Page.captureScreenshot", format="png")["data"]
        path.write_bytes(base64.b64decode(picture))
