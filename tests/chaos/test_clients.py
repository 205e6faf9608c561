"""Clients in numbers: those that leave, those that do not read, and more than the server takes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from contextlib import ExitStack
from typing import Any

import httpx
import pytest

from tests.chaos import raw
from tests.chaos.conftest import Start
from tests.chaos.target import Target, timed
from tests.e2e.conftest import until

COMPLETIONS, CHAT, MESSAGES, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/messages", "/v1/responses"
ENDLESS = {"prompt": "a", "max_tokens": 1900, "ignore_eos": True}


def any_request(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """One of each protocol, with one choice or some, streamed or not, of which some share how they begin."""
    prompt = "A story that many tell. " * rng.choice([1, 8]) + rng.choice("abcd")
    messages = [{"role": "user", "content": prompt}]
    length, streamed = rng.choice([1, 20, 200]), rng.random() < 0.5
    path, body = rng.choice([
        (COMPLETIONS, {"prompt": prompt, "max_tokens": length, "n": rng.choice([1, 3]), "ignore_eos": True}),
        (CHAT, {"messages": messages, "max_tokens": length, "ignore_eos": True}),
        (MESSAGES, {"model": "tiny", "messages": messages, "max_tokens": length}),
        (RESPONSES, {"model": "tiny", "input": prompt, "max_output_tokens": length, "store": False}),
    ])  # fmt: skip
    return path, {**body, "stream": streamed}


async def one_client(http: httpx.AsyncClient, rng: random.Random, leaves: bool) -> int:
    """The status of an answer that was read to its end, or 0 of one that was left at a moment of chance."""
    path, body = any_request(rng)
    await asyncio.sleep(rng.random() * 0.5)
    asked = http.post(path, json=body)
    if not leaves:
        response = await asked
        assert response.status_code in (200, 429), response.text
        if response.status_code == 200 and body["stream"]:
            assert response.text.endswith("\n\n")
        return response.status_code
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(asked, timeout=rng.random() * 0.8)
    return 0


async def crowd(target: Target, num_clients: int, seed: int) -> list[int]:
    rngs = [random.Random(seed * 10_000 + index) for index in range(num_clients)]
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=target.server.url, limits=limits, timeout=120) as http:
        clients = [one_client(http, rng, leaves=index % 2 == 0) for index, rng in enumerate(rngs)]
        return await asyncio.gather(*clients)


def check_crowd(target: Target, rounds: int, num_clients: int) -> None:
    seeds = iter(range(rounds))

    def attack() -> None:
        found = asyncio.run(crowd(target, num_clients, next(seeds)))
        assert found.count(200) == num_clients // 2, "those that stayed have their answers"

    target.withstands(attack, rounds)


def test_a_crowd_of_which_half_leaves(standing: Target) -> None:
    check_crowd(standing, rounds=2, num_clients=60)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_200_clients_of_which_half_leaves(standing: Target) -> None:
    check_crowd(standing, rounds=8, num_clients=200)


# ---- clients that do not read


def test_streams_that_nobody_reads_hold_up_nobody(standing: Target) -> None:
    """Their windows are full, and the server's buffers bounded. They go, and nothing of them is left."""

    def attack() -> None:
        with ExitStack() as stack:
            for _ in range(30):
                sock = stack.enter_context(raw.connect(standing.port, receive_bytes=2048))
                sock.sendall(raw.post(COMPLETIONS, {**ENDLESS, "max_tokens": 500, "stream": True, "logprobs": 5}))
            with timed(30.0):
                assert standing.ask() == standing.answers

    standing.withstands(attack)


def test_a_client_that_reads_slowly_gets_all(standing: Target) -> None:
    with raw.connect(standing.port, receive_bytes=2048) as sock:
        sock.sendall(raw.post(COMPLETIONS, {**ENDLESS, "max_tokens": 300, "stream": True, "logprobs": 5}))
        text = bytearray()
        while not text.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
            piece = sock.recv(4096)
            assert piece, text[-300:]
            text += piece
            time.sleep(0.002)
    assert text.count(b"data: ") > 10
    standing.check()


# ---- more than the server takes


def test_a_full_queue_says_when_to_come_again(start: Start) -> None:
    """429 with a header that says when, at once; who waits is served, and afterwards all is as before."""
    target = start("--max-num-queued-reqs", "8", "--max-num-seqs", "2")
    body = {**ENDLESS, "max_tokens": 400}

    async def flood() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=target.server.url, timeout=120) as http:
            return await asyncio.gather(*(http.post(COMPLETIONS, json=body) for _ in range(40)))

    def attack() -> None:
        answers = asyncio.run(flood())
        statuses = [answer.status_code for answer in answers]
        assert set(statuses) == {200, 429} and statuses.count(200) >= 8
        for answer in answers:
            if answer.status_code == 429:
                assert int(answer.headers["Retry-After"]) >= 1
                assert answer.elapsed.total_seconds() < 10
                assert answer.json()["error"]["code"] == "queue_full"

    target.withstands(attack)


def test_a_request_of_many_choices_is_bounded_too(start: Start) -> None:
    target = start("--max-num-queued-reqs", "8")
    assert target.http.post(COMPLETIONS, json={**ENDLESS, "max_tokens": 1, "n": 100}).status_code in (200, 400, 429)
    target.check()


def test_requests_of_more_tokens_than_may_wait(start: Start) -> None:
    target = start("--max-num-queued-tokens", "2000", "--max-num-seqs", "1")
    body = {"prompt": "a" * 1500, "max_tokens": 100, "ignore_eos": True}

    async def flood() -> list[int]:
        async with httpx.AsyncClient(base_url=target.server.url, timeout=120) as http:
            return [
                answer.status_code
                for answer in await asyncio.gather(*(http.post(COMPLETIONS, json=body) for _ in range(12)))
            ]

    found = asyncio.run(flood())
    assert set(found) == {200, 429}, found
    target.check()


def test_the_pages_of_a_crowd_come_back(standing: Target) -> None:
    """More sequences than there are pages for: some are put off and computed again, all end."""

    async def crowd() -> list[dict[str, Any]]:
        async with httpx.AsyncClient(base_url=standing.server.url, timeout=120) as http:
            bodies = [{**ENDLESS, "prompt": f"{index}", "max_tokens": 600, "temperature": 0} for index in range(24)]
            answers = await asyncio.gather(*(http.post(COMPLETIONS, json=body) for body in bodies))
            return [answer.json() for answer in answers]

    answers = asyncio.run(crowd())
    assert all(answer["usage"]["completion_tokens"] == 600 for answer in answers), json.dumps(answers)[:500]
    assert until(standing.is_idle)
    standing.check()
