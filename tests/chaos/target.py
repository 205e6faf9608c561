"""A server under attack: its processes, its memory, its pages, and whether it is as it was before."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.e2e.conftest import Server, command_line, descendants, until

SETTLE_S = 30.0
"""For what an attack left to end: loaded machines need seconds where idle ones need none."""
FLAT_KB = 12 << 10
"""By which a process may be larger after further rounds of an attack: the heap's arenas are never quite the same."""
MAX_TEMPLATE_PROCESSES = 8
PROMPT = {"prompt": "Once upon a time", "temperature": 0, "max_tokens": 12, "ignore_eos": True, "logprobs": 0}
CHAT = {"messages": [{"role": "user", "content": "Hello"}], "temperature": 0, "max_tokens": 12, "ignore_eos": True}


@dataclass(frozen=True)
class Size:
    """What one process takes."""

    rss_kb: int
    num_files: int
    num_threads: int

    @classmethod
    def of(cls, pid: int) -> Size:
        status = Path(f"/proc/{pid}/status").read_text()
        rss, threads = (re.search(rf"^{name}:\s+(\d+)", status, re.M) for name in ("VmRSS", "Threads"))
        assert rss is not None and threads is not None, "it has ended"
        return cls(int(rss[1]), len(os.listdir(f"/proc/{pid}/fd")), int(threads[1]))  # noqa: PTH208 (is emptied meanwhile)


@dataclass
class Target:
    """`ingle serve`, and what it was like before anything was done to it."""

    server: Server
    headers: dict[str, str] = field(default_factory=dict)
    answers: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        self.http = httpx.Client(base_url=self.server.url, headers=self.headers, timeout=60)
        self.answers = self.ask()

    @property
    def port(self) -> int:
        return int(self.server.url.rpartition(":")[2])

    @property
    def api(self) -> int:
        return self.server.process.pid

    @property
    def engine(self) -> int:
        return self.server.engine_pid()

    def ask(self) -> tuple[Any, ...]:
        """What it answers to two questions that have one answer each."""
        texts = []
        for path, body in (("/v1/completions", PROMPT), ("/v1/chat/completions", CHAT)):
            response = self.http.post(path, json=body)
            assert response.status_code == 200, f"{response.status_code} {response.text}\n{self.server.text()[-4000:]}"
            (choice,) = response.json()["choices"]
            texts.append(choice.get("text") or choice["message"]["content"])
        return tuple(texts)

    # What it is made of.

    def processes(self) -> dict[int, str]:
        """Its children by what they do, without those that have ended and that it has not looked after yet."""
        kinds = {b"ingle.engine.process": "engine", b"template_worker": "template"}
        found = {}
        for pid in descendants(self.api):
            if not (line := command_line(pid)):
                continue
            found[pid] = next((kind for mark, kind in kinds.items() if mark in line), line.decode(errors="replace"))
        return found

    def sizes(self) -> dict[str, Size]:
        return {"api": Size.of(self.api), "engine": Size.of(self.engine)}

    def metrics(self) -> dict[str, float]:
        """All samples of /metrics, summed over their labels."""
        text = self.http.get("/metrics").raise_for_status().text
        samples: dict[str, float] = {}
        for line in text.splitlines():
            if line and not line.startswith("#"):
                name, value = line.split("{")[0].split()[0], line.rsplit(" ", 1)[1]
                samples[name] = samples.get(name, 0.0) + float(value)
        return samples

    def load(self) -> tuple[float, float, float]:
        """Requests that run, requests that wait, and the share of pages that somebody holds."""
        if self.http.get("/metrics").status_code == 404:
            detail = self.http.get("/health").json()["detail"]
            return (*map(float, re.findall(r"(\d+)", detail)[:2]), 0.0)
        samples = self.metrics()
        return (
            samples["vllm:num_requests_running"],
            samples["vllm:num_requests_waiting"],
            samples["vllm:kv_cache_usage_perc"],
        )

    def is_idle(self) -> bool:
        return self.load() == (0, 0, 0)

    # Whether all is as it was.

    def check(self) -> None:
        """Nothing runs, no page is held, no process is left over, and the next answers are those of before."""
        assert self.server.process.poll() is None, f"the server has ended\n{self.server.text()[-4000:]}"
        assert until(self.is_idle, SETTLE_S), f"running, waiting, pages held: {self.load()}"
        assert self.ask() == self.answers, "it answers another way than before"
        assert until(self._has_no_orphan, SETTLE_S), f"processes: {self.processes()}"
        log = self.server.text()
        assert "Traceback" not in log, log[-6000:]

    def _has_no_orphan(self) -> bool:
        kinds = list(self.processes().values())
        num_templates = kinds.count("template")
        return (
            kinds.count("engine") == 1 and num_templates <= MAX_TEMPLATE_PROCESSES and len(kinds) == num_templates + 1
        )

    def withstands(self, attack: Callable[[], None], rounds: int = 2) -> None:
        """Attacks several times. What the first half brings may stay, as caches do; what each brings anew may not."""
        before: dict[str, Size] = {}
        for number in range(rounds):
            if number == rounds // 2:
                before = self.sizes()
            attack()
            self.check()
        assert until(lambda: not self._grown(before), SETTLE_S / 3), f"{before} became {self.sizes()}"

    def _grown(self, before: dict[str, Size]) -> list[str]:
        now = self.sizes()
        return [
            name
            for name, size in now.items()
            if size.rss_kb > before[name].rss_kb + FLAT_KB
            or size.num_files > before[name].num_files + 2 * MAX_TEMPLATE_PROCESSES
            or size.num_threads > before[name].num_threads + 8
        ]


@contextlib.contextmanager
def timed(seconds: float) -> Iterator[None]:
    """What is done within takes no longer."""
    started = time.perf_counter()
    yield
    taken = time.perf_counter() - started
    assert taken < seconds, f"it took {taken:.1f} s"
