"""Lists of tokens that an answer may hold, or may not: on both devices, beside requests that have none."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingle.engine.engine import Engine
from ingle.engine.masks import MaskTable, TokenLists, Words, pack_mask
from ingle.errors import RequestError
from ingle.request import EngineRequest, SamplingParams
from tests.support import collect, engine_for, random_prompt, run, save_checkpoint

VOCAB = 256
END = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(params=["native", "torch-overlap"])
def engine(request: pytest.FixtureRequest, folder: Path) -> Engine:
    dtype = "bfloat16" if request.param == "native" else "float32"
    return engine_for(folder, dtype=dtype, block_size=8, overlap=request.param == "torch-overlap")


def asked(number: int, **options: object) -> EngineRequest:
    params = {"temperature": number % 2, "seed": number, "max_tokens": 10, "ignore_eos": True, **options}
    return EngineRequest(str(number), random_prompt(number % 3, 20), SamplingParams(**params), (END,))


def test_only_allowed_tokens_are_drawn_and_logprobs_are_those_of_all(engine: Engine) -> None:
    allowed = (7, 9, 11, 200)
    free = [asked(number, logprobs=3) for number in range(4)]
    bound = [asked(number, logprobs=3, allowed_token_ids=allowed) for number in range(4, 8)]
    alone = collect(engine, free)
    found = collect(engine, free + bound)
    for request in bound:
        tokens = [token_id for output in found[request.id] for token_id in output.token_ids]
        assert len(tokens) == 10 and set(tokens) <= set(allowed)
        first = found[request.id][0].logprobs
        assert first is not None and not set(first[0].token_ids[1:]) <= set(allowed)
        same_prompt = next(r for r in free if r.prompt_token_ids == request.prompt_token_ids)
        theirs = alone[same_prompt.id][0].logprobs
        assert theirs is not None and theirs[0].token_ids[1:] == first[0].token_ids[1:]
    for request in free:
        ours = [t for o in found[request.id] for t in o.token_ids]
        assert ours == [t for o in alone[request.id] for t in o.token_ids]


def test_no_bad_sequence_is_completed(engine: Engine) -> None:
    request = asked(0)
    bad: list[tuple[int, ...]] = []
    for length in (1, 2, 3, 2):
        tokens = run(engine, [asked(0, bad_token_ids=tuple(bad))])[request.id]
        assert not any(tuple(tokens[i : i + len(word)]) == word for word in bad for i in range(10))
        bad.append(tuple(tokens[4 : 4 + length]))
    assert len(set(bad)) == 4


def test_before_min_tokens_no_end_is_drawn_though_all_else_is_bad(engine: Engine) -> None:
    for temperature in (0, 1):
        options = {"allowed_token_ids": (5, END), "bad_token_ids": ((5, 5),), "temperature": temperature}
        request = asked(1, **options, min_tokens=3, ignore_eos=False)
        tokens = run(engine, [request])["1"]
        assert tokens[:3] == [5, 5, 5] and set(tokens[3:]) <= {END}


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"allowed_token_ids": (VOCAB,)}, "allowed_token_ids"),
        ({"bad_token_ids": ((3, VOCAB),)}, "bad_token_ids"),
        ({"allowed_token_ids": (5, 6), "bad_token_ids": ((5,), (6,))}, "allowed_token_ids"),
        ({"allowed_token_ids": (END,), "min_tokens": 1}, "allowed_token_ids"),
        ({"allowed_token_ids": (9,), "stop_token_ids": (9,), "min_tokens": 1}, "allowed_token_ids"),
        ({"bad_token_ids": tuple((i,) for i in range(VOCAB))}, "bad_words"),
    ],
)
def test_what_leaves_no_token_is_refused(engine: Engine, options: dict[str, object], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        engine.add(asked(0, **options))
    assert caught.value.param == param and not engine.has_work


words = st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=3).map(tuple), max_size=6).map(tuple)


@given(words, st.data())
def test_lists_are_what_a_search_through_the_answer_says(bad: tuple[tuple[int, ...], ...], data: st.DataObject) -> None:
    request = EngineRequest("a", [1], SamplingParams(bad_token_ids=bad, allowed_token_ids=(0, 1, 2, 3, 6)))
    mask, answer = TokenLists(request, 8), list[int]()
    for _ in range(6):
        allowed = tokens_of(mask.allowed())
        singles = {word[0] for word in bad if len(word) == 1}
        completed = {w[-1] for w in bad if tuple([*answer, w[-1]][-len(w) :]) == w}
        assert allowed == {0, 1, 2, 3, 6} - singles - completed and 6 in allowed
        answer.append(data.draw(st.sampled_from(sorted(allowed))))
        mask.take(answer[-1:])


class Only:
    """A mask that allows always the same."""

    ended = False

    def __init__(self, *token_ids: int) -> None:
        self.words = pack_mask(np.isin(np.arange(8), token_ids))
        self.taken: list[int] = []

    def allowed(self) -> Words:
        return self.words

    def take(self, token_ids: Sequence[int]) -> None:
        self.taken += token_ids


def test_beside_a_mask_lists_count_where_both_share_a_token() -> None:
    table = MaskTable(8)
    lists = {
        name: TokenLists.of(EngineRequest(name, [1], SamplingParams(allowed_token_ids=(2, 3))), 8) for name in "abc"
    }
    table.add("a", Only(1, 2), lists["a"])
    table.add("b", Only(5, 6), lists["b"])
    table.add("c", None, lists["c"])
    assert table
    filled = table.fill([(4, "a"), (5, "b"), (6, "c"), (7, "nobody")]).result()
    assert list(filled.masks.slots) == [4, 5, 6] and not filled.failed
    rows = np.frombuffer(filled.masks.words, np.int32).reshape(3, -1)
    assert [tokens_of(row) for row in rows] == [{2}, {5, 6}, {2, 3}]
    assert table.take("a", [2]) is False and table.take("c", [3]) is False
    for name in "abc":
        table.drop(name)
    assert not table


def tokens_of(words: Words) -> set[int]:
    bits = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), bitorder="little")[:8]
    return set(np.flatnonzero(bits).tolist())
