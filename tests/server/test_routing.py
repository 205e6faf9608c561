"""Which replica gets a request."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingle.request import EngineOutput, EngineRequest, Pooling, SamplingParams, token_ids
from ingle.server.routing import BLOCK, Routed, Router

ROOM = 100_000


def request(prompt: Sequence[int], **asked: Any) -> EngineRequest:
    of_request = {name: asked.pop(name) for name in ("cache_salt", "pooling", "client") if name in asked}
    return EngineRequest("r", token_ids(prompt), SamplingParams(**{"max_tokens": 10} | asked), **of_request)


def words(seed: int, count: int) -> list[int]:
    return random.Random(seed).choices(range(50_000), k=count)


def finish(router: Router, routed: Routed, answer: Sequence[int] = (7,)) -> None:
    router.took(routed, EngineOutput("r", list(answer), "stop"))
    router.end(routed)


def test_requests_without_a_common_beginning_go_round_to_who_has_least_to_do() -> None:
    router = Router([ROOM] * 3)
    first = [router.route(request(words(seed, 100)), range(3)) for seed in range(3)]
    assert [routed.replica for routed in first] == [0, 1, 2]
    finish(router, first[1])
    assert router.route(request(words(3, 100)), range(3)).replica == 1
    assert router.route(request(words(4, 10)), [0, 2]).replica == 0, "1 is not well"


def test_a_conversation_comes_back_to_the_replica_that_holds_it() -> None:
    router = Router([ROOM] * 2)
    said = {seed: words(seed, 200) for seed in range(6)}
    where: dict[int, int] = {}
    for turn in range(4):
        order = list(said)
        random.Random(turn).shuffle(order)
        for seed in order:
            routed = router.route(request(said[seed]), range(2))
            assert where.setdefault(seed, routed.replica) == routed.replica
            answer = words(100 * turn + seed, 150)
            finish(router, routed, answer)
            said[seed] += [*answer, *words(7 * turn + seed, 30)]
    assert len(set(where.values())) == 2


def test_the_answer_is_part_of_what_a_replica_holds() -> None:
    router = Router([ROOM] * 2)
    short, answer = words(1, 5), words(2, 600)
    mine = router.route(request(short), range(2))
    finish(router, mine, answer)
    for seed in range(3):  # so that the other would be next
        finish(router, router.route(request(words(seed + 10, 5)), range(2)))
    again = router.route(request([*short, *answer, 1, 2, 3]), range(2))
    assert again.replica == mine.replica and again.to_read == 608 - 9 * BLOCK


def test_one_hot_prefix_spreads_once_its_replica_has_much_to_do() -> None:
    router, system = Router([ROOM] * 4), words(0, 2_000)
    finish(router, router.route(request(system), range(4)))
    busy = [router.route(request([*system, *words(seed, 20)], max_tokens=500), range(4)) for seed in range(60)]
    counts = [sum(routed.replica == index for routed in busy) for index in range(4)]
    assert [routed.replica for routed in busy[:3]] == [0, 0, 0], "at first it is not worth computing it again"
    assert min(counts) >= 10, counts
    assert sum(routed.to_read > 1_000 for routed in busy) == 3, "each of the others computes it once"


def test_choices_of_one_prompt_stay_together_if_it_is_long() -> None:
    for length, replicas in ((3_000, {0}), (30, {0, 1})):
        router = Router([ROOM] * 2)
        asked = request(words(length, length), max_tokens=100)
        assert {router.route(asked, range(2)).replica for _ in range(4)} == replicas


def test_salts_keep_prefixes_apart() -> None:
    router, prompt = Router([ROOM] * 2), words(1, 640)
    mine = router.route(request(prompt, cache_salt="ann"), range(2))
    finish(router, mine)
    assert router.route(request(prompt, cache_salt="ann"), range(2)).to_read == 1
    for salt in ("", "bob"):
        assert router.route(request(prompt, cache_salt=salt), [mine.replica]).to_read == 640


def test_who_needs_all_of_a_prompt_finds_nothing() -> None:
    router, prompt = Router([ROOM]), words(1, 640)
    finish(router, router.route(request(prompt), [0]))
    assert router.route(request(prompt, prompt_logprobs=1), [0]).to_read == 640
    assert router.route(request(prompt, pooling=Pooling(kind="mean")), [0]).to_read == 640
    assert router.route(request(prompt, pooling=Pooling(kind="last")), [0]).to_read == 1
    router.forget(0)
    assert router.route(request(prompt), [0]).to_read == 640, "another engine came"
    answer = words(5, 640)
    finish(router, router.route(request([1], prompt_logprobs=1), [0]), answer)
    assert router.route(request(answer), [0]).to_read == 640, "no answer is a prompt"


def test_without_prefix_caching_nothing_is_looked_for() -> None:
    router, prompt = Router([0, 0]), words(1, 640)
    assert [router.route(request(prompt), range(2)).replica for _ in range(4)] == [0, 1, 0, 1]


def test_a_replica_forgets_what_was_not_used_for_longest_the_end_of_a_prefix_first() -> None:
    router = Router([8 * BLOCK])
    old, new = words(1, 6 * BLOCK), words(2, 4 * BLOCK)
    for prompt in (old, new):
        finish(router, router.route(request(prompt), [0]))
    assert router.route(request(old), [0]).to_read == 2 * BLOCK
    assert router.route(request(words(3, 100 * BLOCK)), [0]).to_read == 100 * BLOCK
    assert router.route(request(new), [0]).to_read == 4 * BLOCK


def test_work_in_the_background_is_in_nobodys_way() -> None:
    router = Router([ROOM] * 2)
    for seed in range(4):
        router.route(request(words(seed, 5_000)), [0], background=True)
    router.route(request(words(9, 300)), [1])
    assert router.route(request(words(10, 100)), range(2)).replica == 0
    assert router.route(request(words(11, 100)), range(2), background=True).replica == 1


def test_lengths_of_answers_are_learned() -> None:
    router = Router([ROOM] * 2)
    for _ in range(200):
        finish(router, router.route(request([1], max_tokens=None), range(2)), [5] * 20)
    router.route(request([1], max_tokens=None), [0])
    assert router.to_do(0) == pytest.approx(21, abs=1)
    router.route(request([1], max_tokens=700, ignore_eos=True), [1])
    assert router.to_do(1) == 701
    router.route(request([1] * 9, max_tokens=3), [0])
    assert router.to_do(0) == pytest.approx(33, abs=1)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_whatever_comes_and_goes_is_counted(data: st.DataObject) -> None:
    """Loads are the sum of what runs, none below nothing; the books of prefixes stay within their bounds."""
    num = data.draw(st.integers(1, 3))
    router = Router([data.draw(st.sampled_from((0, 2 * BLOCK, 40 * BLOCK))) for _ in range(num)])
    running: list[Routed] = []
    for _ in range(data.draw(st.integers(1, 40))):
        match data.draw(st.sampled_from(("route", "route", "took", "end", "lost", "forget"))):
            case "route":
                prompt = [*words(data.draw(st.integers(0, 3)), data.draw(st.integers(1, 5 * BLOCK))), *words(9, 3)]
                asked = request(
                    prompt,
                    max_tokens=data.draw(st.sampled_from((None, 1, 500))),
                    ignore_eos=data.draw(st.booleans()),
                    cache_salt=data.draw(st.sampled_from(("", "s"))),
                )
                among = data.draw(st.sets(st.integers(0, num - 1), min_size=1))
                running.append(router.route(asked, sorted(among), background=data.draw(st.booleans())))
                assert running[-1].replica in among and 1 <= running[-1].to_read <= len(prompt)
            case "took" if running:
                router.took(data.draw(st.sampled_from(running)), EngineOutput("r", [1] * data.draw(st.integers(0, 90))))
            case "end" | "lost" as how if running:
                router.end(running.pop(data.draw(st.integers(0, len(running) - 1))), lost=how == "lost")
            case "forget":
                router.forget(data.draw(st.integers(0, num - 1)))
        for index, replica in enumerate(router._replicas):
            own = [routed for routed in running if routed.replica == index]
            assert replica.to_do == pytest.approx(sum(routed.to_do for routed in own), abs=1e-6)
            assert replica.in_background == pytest.approx(sum(r.to_do for r in own if r.background), abs=1e-6)
            assert len(replica.blocks) <= replica.capacity and all(count >= 0 for count in replica.blocks.values())
    for routed in running:
        router.end(routed)
    assert all(replica.to_do == pytest.approx(0, abs=1e-6) for replica in router._replicas)
