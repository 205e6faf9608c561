"""Thousands of short requests of every kind at one server, and whether anything of them stays: `make soak`.

Streams, whole answers, clients that leave, shared prefixes, answers that follow a schema, wrong requests, each
protocol. Resident memory of both processes is sampled along the way. Past the warm-up, in which caches fill, a line is
fitted through the samples: its slope is what a thousand requests leave behind.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import httpx

from tests.chaos.conftest import CONTEXT, started_unheard
from tests.chaos.target import Size, Target

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
NUM_SAMPLES = 100
WARM_UP = 0.25
"""Of all requests: caches fill, of grammars, prefixes, answers to be asked for again, words of the tokenizer."""
MAX_SLOPE_KB = 100.0
"""Per thousand requests. A leak of one object for each request is more; the noise of a heap is less."""
FLAGS = ("--response-store", "2MB", "--log-level", "info")
PREFIXES = [f"{index}. Once upon a time there was a server that answered all who asked. " * 3 for index in range(12)]
WORDS = ["sun", "moon", "star"]
SCHEMAS = [
    {
        "type": "object",
        "properties": {"name": {"enum": WORDS}, "age": {"type": "integer", "minimum": 0, "maximum": most}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    for most in range(9, 29)
]
COMPLETIONS, CHAT, MESSAGES, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/messages", "/v1/responses"
LENGTHS = [1, 4, 12, 24]


class Unexpected(Exception):
    """An answer that is not as it should be."""


@dataclass
class Client:
    """Asks one request after another."""

    http: httpx.AsyncClient
    rng: random.Random
    known: str
    """What a greedy answer to `PREFIXES[0]` is."""

    def prompt(self) -> str:
        return self.rng.choice(PREFIXES) + self.rng.choice("abcdefgh") * self.rng.randint(0, 40)

    def sampling(self) -> dict[str, Any]:
        return {"temperature": self.rng.choice([0, 0.7, 1.0]), "top_p": self.rng.choice([1.0, 0.9])}

    def body(self, path: str, **fields: Any) -> dict[str, Any]:
        """A request of the protocol that `path` speaks."""
        length, prompt = self.rng.choice(LENGTHS), self.prompt()
        messages = [{"role": "user", "content": prompt}]
        own: dict[str, dict[str, Any]] = {
            COMPLETIONS: {"prompt": prompt, "max_tokens": length, "ignore_eos": True},
            CHAT: {"messages": messages, "max_tokens": length},
            MESSAGES: {"model": "tiny", "messages": messages, "max_tokens": length},
            RESPONSES: {"model": "tiny", "input": prompt, "max_output_tokens": length},
        }
        return {**own[path], **self.sampling(), **fields}

    async def post(self, path: str, body: dict[str, Any], status: int = 200) -> httpx.Response:
        response = await self.http.post(path, json=body)
        if response.status_code != status:
            raise Unexpected(f"{path} {json.dumps(body)[:300]}: {response.status_code} {response.text[:300]}")
        return response

    # The kinds of requests.

    async def whole(self) -> None:
        path = self.rng.choice([COMPLETIONS, CHAT, MESSAGES, RESPONSES])
        await self.post(path, self.body(path))

    async def streamed(self) -> None:
        path = self.rng.choice([COMPLETIONS, CHAT, MESSAGES, RESPONSES])
        response = await self.post(path, self.body(path, stream=True))
        if '"error":{' in response.text.rpartition("data: ")[2] or not response.text.endswith("\n\n"):
            raise Unexpected(f"a stream of {path} ends with {response.text[-300:]!r}")

    async def greedy(self) -> None:
        body = {"prompt": PREFIXES[0], "max_tokens": 8, "temperature": 0, "ignore_eos": True}
        text = (await self.post(COMPLETIONS, body)).json()["choices"][0]["text"]
        if text != self.known:
            raise Unexpected(f"the answer was {self.known!r}, and is {text!r} now")

    async def choices(self) -> None:
        answer = await self.post(COMPLETIONS, self.body(COMPLETIONS, n=3, logprobs=3, prompt=["a", self.prompt()]))
        if len(answer.json()["choices"]) != 6:
            raise Unexpected(answer.text[:300])

    async def following_a_schema(self) -> None:
        schema = self.rng.choice(SCHEMAS)
        wanted = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema}}
        answer = await self.post(CHAT, self.body(CHAT, response_format=wanted, max_tokens=80))
        choice = answer.json()["choices"][0]
        if choice["finish_reason"] == "stop":
            person = json.loads(choice["message"]["content"])
            if person["name"] not in WORDS or person["age"] > schema["properties"]["age"]["maximum"]:
                raise Unexpected(f"{person} does not follow {schema}")

    async def following_an_expression(self) -> None:
        body = self.body(COMPLETIONS, structured_outputs={"regex": "[ab]{3,5}!"}, max_tokens=20)
        del body["ignore_eos"]
        text = (await self.post(COMPLETIONS, body)).json()["choices"][0]["text"]
        if not re.fullmatch("[ab]{3,5}!", text):
            raise Unexpected(f"{text!r} does not follow its expression")

    async def left(self) -> None:
        """By a client that goes away, at a moment of chance."""
        path = self.rng.choice([COMPLETIONS, CHAT, MESSAGES, RESPONSES])
        body = self.body(path, stream=self.rng.random() < 0.5)
        body["max_output_tokens" if path == RESPONSES else "max_tokens"] = 400
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.http.post(path, json=body), self.rng.random() * 0.1)

    async def wrong(self) -> None:
        path, body, status = self.rng.choice([
            (COMPLETIONS, {"prompt": "a", "temperature": -1}, 400),
            (COMPLETIONS, {"prompt": "a" * (CONTEXT + 1)}, 400),
            (COMPLETIONS, {"prompt": "a", "model": f"no-{self.rng.random()}"}, 404),
            (COMPLETIONS, {"prompt": [10**9]}, 400),
            (CHAT, {"messages": [{"role": "user"}]}, 400),
            (CHAT, {"messages": []}, 400),
            (CHAT, {"messages": [{"role": "user", "content": "a"}], "structured_outputs": {"regex": "(["}}, 400),
            (MESSAGES, {"model": "tiny", "messages": []}, 400),
            (RESPONSES, {"model": "tiny", "input": "a", "previous_response_id": f"resp_{self.rng.random()}"}, 404),
            (f"/v1/{self.rng.random()}", {}, 404),
        ])  # fmt: skip
        await self.post(path, body, status)

    async def continued(self) -> None:
        first = (await self.post(RESPONSES, self.body(RESPONSES))).json()["id"]
        response = await self.http.post(RESPONSES, json=self.body(RESPONSES, previous_response_id=first))
        if response.status_code not in (200, 404):  # it may have had to make room
            raise Unexpected(response.text[:300])

    async def counted(self) -> None:
        await self.post("/tokenize", {"prompt": self.prompt()})

    async def embedded(self) -> None:
        await self.post("/v1/embeddings", {"model": "tiny", "input": [self.prompt(), "a"]})

    async def looked_at(self) -> None:
        for path in ("/health", "/v1/models", "/metrics"):
            (await self.http.get(path)).read()


KINDS: dict[Callable[[Client], Awaitable[None]], int] = {
    Client.whole: 24, Client.streamed: 24, Client.greedy: 5, Client.choices: 5, Client.following_a_schema: 8,
    Client.following_an_expression: 4, Client.left: 10, Client.wrong: 10, Client.continued: 3, Client.counted: 2,
    Client.embedded: 3, Client.looked_at: 2,
}  # fmt: skip
"""How often each comes."""


@dataclass
class Sample:
    num_requests: int
    seconds: float
    api: Size
    engine: Size


@dataclass
class Soak:
    """One run."""

    target: Target
    num_requests: int
    concurrency: int
    seed: int = 0
    samples: list[Sample] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    async def run(self) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=self.concurrency)
        numbers, started = iter(range(self.num_requests)), time.perf_counter()
        every = max(1, self.num_requests // NUM_SAMPLES)
        async with httpx.AsyncClient(base_url=self.target.server.url, limits=limits, timeout=120) as http:
            first = Client(http, random.Random(0), "")
            body = {"prompt": PREFIXES[0], "max_tokens": 8, "temperature": 0, "ignore_eos": True}
            known = (await first.post(COMPLETIONS, body)).json()["choices"][0]["text"]

            async def work() -> None:
                for number in numbers:
                    client = Client(http, random.Random(self.seed * 1_000_003 + number), known)
                    (kind,) = client.rng.choices(list(KINDS), weights=list(KINDS.values()))
                    try:
                        await kind(client)
                    except (Unexpected, httpx.HTTPError, KeyError, ValueError) as error:
                        self.errors.append(f"{kind.__name__}: {error!r}"[:1000])
                    self.counts[kind.__name__] += 1
                    if number % every == every - 1:
                        self._sample(number + 1, time.perf_counter() - started)

            await asyncio.gather(*(work() for _ in range(self.concurrency)))
        self.seconds = time.perf_counter() - started

    def _sample(self, num_requests: int, seconds: float) -> None:
        self.samples.append(Sample(num_requests, seconds, *self.target.sizes().values()))

    def warm(self) -> list[Sample]:
        """Samples past the warm-up."""
        return [sample for sample in self.samples if sample.num_requests >= WARM_UP * self.num_requests]

    def slope_kb(self, process: str) -> float:
        """What a thousand requests leave in memory."""
        warm = self.warm()
        return 1000 * slope([s.num_requests for s in warm], [getattr(s, process).rss_kb for s in warm])

    def report(self) -> dict[str, Any]:
        warm = self.warm()
        grown = {
            process: {
                "slope_kb_per_1000_requests": round(self.slope_kb(process), 1),
                "rss_kb_at_the_start": getattr(self.samples[0], process).rss_kb,
                "rss_kb_after_warm_up": getattr(warm[0], process).rss_kb,
                "rss_kb_at_the_end": getattr(warm[-1], process).rss_kb,
                "rss_kb_at_most": max(getattr(sample, process).rss_kb for sample in warm),
            }
            for process in ("api", "engine")
        }
        return {
            "date": date.today().isoformat(),
            "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}",
            "num_requests": self.num_requests,
            "concurrency": self.concurrency,
            "seconds": round(self.seconds, 1),
            "requests_per_s": round(self.num_requests / self.seconds, 1),
            "kinds": dict(sorted(self.counts.items())),
            "num_errors": len(self.errors),
            "errors": self.errors[:20],
            "memory": grown,
            "samples": [asdict(sample) for sample in self.samples],
        }


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Of the line through these points that is nearest to them."""
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - mean_x) ** 2 for x in xs)
    return sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / spread if spread else 0.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS / f"{date.today().isoformat()}-cpu-soak.json")
    parser.add_argument("flags", nargs="*", help="more flags for the server, behind --")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        from tests.e2e.conftest import save_byte_model

        model = save_byte_model(Path(folder) / "model", max_position_embeddings=CONTEXT)
        log = Path(folder) / "log"
        with log.open("wb") as file:
            server = started_unheard(model, Path(folder) / "files", *FLAGS, *given.flags, stderr=file)
        try:
            soak = Soak(Target(server), given.requests, given.concurrency, given.seed)
            asyncio.run(soak.run())
            soak.target.check()
        finally:
            server.process.terminate()
            try:
                code = server.process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                server.process.kill()
                code = -9
        report = soak.report()
        said = log.read_text(errors="replace")
    report["traceback_in_log"] = "Traceback" in said
    given.output.write_text(json.dumps(report, indent=1) + "\n")
    show(report)
    if report["traceback_in_log"]:
        print(said[said.index("Traceback") - 500 :][:3000], file=sys.stderr)
    flat = all(abs(soak.slope_kb(process)) <= MAX_SLOPE_KB for process in ("api", "engine"))
    return 0 if flat and not soak.errors and not report["traceback_in_log"] and code == 0 else 1


def show(report: dict[str, Any]) -> None:
    print(f"{report['num_requests']} requests in {report['seconds']} s ({report['requests_per_s']}/s), "
          f"{report['num_errors']} errors; pages whole")  # fmt: skip
    for error in report["errors"]:
        print(f"  {error}")
    for process, memory in report["memory"].items():
        print(
            f"{process:6} {memory['slope_kb_per_1000_requests']:+8.1f} kB per 1,000 requests past the warm-up: "
            f"{memory['rss_kb_at_the_start']} kB at the start, {memory['rss_kb_after_warm_up']} after the warm-up, "
            f"{memory['rss_kb_at_the_end']} at the end"
        )


if __name__ == "__main__":
    sys.exit(main())
