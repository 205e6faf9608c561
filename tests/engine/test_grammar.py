"""Answers of a small random model that follow grammars: alone and in a batch, preempted, aborted, and refused."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from jsonschema import Draft202012Validator

from ingle.config import EngineConfig
from ingle.engine import grammar as module
from ingle.engine.build import build_engine
from ingle.engine.engine import Engine
from ingle.engine.grammar import Copy, Grammars, Numbers
from ingle.errors import RequestError
from ingle.request import EngineOutput, EngineRequest, SamplingParams
from ingle.structured import Grammar, StructuredOutputs
from ingle.text.grammar import Vocabulary, grammar_text
from tests.support import random_prompt, restrict, save_checkpoint

END = 2
WORDS = ('{"', '":', '": "', '", "', '"}', "name", "na", "true", "tru", "ing", "\n  ", "你好", "你", "北", "12", "00")
TOKENS = [b"<pad>", b"<s>", b"</s>", *(bytes([b]) for b in (9, 10, *range(32, 127), *range(128, 256)))]
TOKENS += [word.encode() for word in WORDS]
TOKENS += [b""] * (256 - len(TOKENS))
SPECIAL = (0, 1, END)


def encode(text: str) -> list[int]:
    """The longest token each time."""
    data, ids = text.encode(), []
    while data:
        best = max(
            (i for i, t in enumerate(TOKENS) if t and i not in SPECIAL and data.startswith(t)),
            key=lambda i: len(TOKENS[i]),
        )
        ids.append(best)
        data = data[len(TOKENS[best]) :]
    return ids


@dataclass
class Reader:
    """In the place of a tokenizer."""

    num_read: int = 0

    def for_grammars(self, vocab_size: int) -> Vocabulary:
        assert vocab_size == len(TOKENS)
        self.num_read += 1
        return Vocabulary(TOKENS, SPECIAL, (END,), encode)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(params=["native", "torch", "torch-overlap"])
def engine(request: pytest.FixtureRequest, folder: Path) -> Engine:
    config = EngineConfig.of(
        str(folder),
        device="cpu",
        kv_cache_memory="8MiB",
        block_size=8,
        dtype="bfloat16" if request.param == "native" else "float32",
        overlap=request.param == "torch-overlap",
    )
    return build_engine(config, folder, tokenizer=Reader)[0]  # type: ignore[arg-type]


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "city": {"enum": ["北京", "上海", "Paris"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
    },
    "required": ["name", "city", "age"],
    "additionalProperties": False,
}
GRAMMARS: list[dict[str, Any]] = [
    {"json": PERSON},
    {"regex": "(你好|[a-f]{2,6}) [0-9]{2}"},
    {"choice": ["yes", "no", "yes please", "不"]},
    {"json": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 4}},
    {"grammar": 'start: "(" start ")" | /[0-9]{1,3}/'},
]


def grammar(wanted: dict[str, Any], after: str = "") -> Grammar:
    return Grammar(grammar_text(StructuredOutputs(**wanted)), after)


def request(name: str, bound: Grammar | None, **options: Any) -> EngineRequest:
    """Each name has a prompt and a seed of its own."""
    number = int(name)
    params = SamplingParams(**{"seed": number, "temperature": 1.0, "max_tokens": 80, **options})
    return EngineRequest(name, random_prompt(number % 4, 12 + number), params, (END,), bound)  # type: ignore[arg-type]


def answers(engine: Engine, wanted: Iterable[EngineRequest]) -> dict[str, list[EngineOutput]]:
    outputs: dict[str, list[EngineOutput]] = {}
    for each in wanted:
        engine.add(each)
        outputs[each.id] = []
    while engine.has_work:
        for output in engine.step():
            outputs[output.id].append(output)
    engine.scheduler.check()
    assert not engine._masks
    return outputs


def tokens(outputs: Sequence[EngineOutput]) -> list[int]:
    return [token_id for output in outputs for token_id in output.token_ids]


def text(outputs: Sequence[EngineOutput]) -> str:
    assert outputs[-1].finish_reason == "stop", outputs[-1]
    return b"".join(TOKENS[id] for id in tokens(outputs) if id != END).decode()


def follows(answer: str, wanted: dict[str, Any]) -> bool:
    if "json" in wanted:
        return Draft202012Validator(wanted["json"]).is_valid(json.loads(answer))
    if "choice" in wanted:
        return answer in wanted["choice"]
    if "regex" in wanted:
        import re

        return re.fullmatch(wanted["regex"], answer) is not None
    return answer.lstrip("(").rstrip(")").isdecimal() and answer.count("(") == answer.count(")")


def test_answers_follow_their_grammars_alone_as_in_a_batch(engine: Engine) -> None:
    """Half of the batch is free. Penalties, end tokens that are switched off and log probabilities change nothing."""
    wanted = []
    for i in range(12):
        kind = GRAMMARS[i // 2 % len(GRAMMARS)]
        more = ({}, {"ignore_eos": True}, {"repetition_penalty": 1.2}, {"logprobs": 2}, {"temperature": 0.0})[i % 5]
        wanted.append(request(str(i), grammar(kind) if i % 2 == 0 else None, **more))
    together = answers(engine, wanted)
    for i, each in enumerate(wanted):
        alone = answers(engine, [each])[each.id]
        assert tokens(alone) == tokens(together[each.id])
        assert [o.logprobs is None for o in alone] == [each.sampling.logprobs is None] * len(alone)
        if each.grammar is not None and each.sampling.temperature:  # a greedy one may count for ever
            kind = GRAMMARS[i // 2 % len(GRAMMARS)]
            assert follows(text(together[each.id]), kind), text(together[each.id])


def test_many_schemas_are_kept_to(engine: Engine) -> None:
    wanted = [request(str(i), grammar({"json": PERSON}), temperature=2.0) for i in range(24)]
    found = [text(outputs) for outputs in answers(engine, wanted).values()]
    assert all(follows(each, {"json": PERSON}) for each in found)
    assert len(set(found)) == len(found)
    assert {json.loads(each)["city"] for each in found} == {"北京", "上海", "Paris"}


def test_a_special_token_is_never_inside(engine: Engine) -> None:
    anything = grammar({"regex": "(.|\n){40}"})
    bias = dict.fromkeys((0, 1), 100.0)  # they are what the model wants most
    outputs = answers(engine, [request("3", anything, logit_bias=bias)])["3"]
    assert not set(tokens(outputs)) & {0, 1} and len(text(outputs)) == 40


def test_the_answer_is_bound_from_some_text_on(engine: Engine) -> None:
    """Before that, anything may come: here the model is made to say so."""
    bound = grammar({"choice": ["yes", "no"]}, after="ab")
    ids = encode("a") + encode("b")
    outputs = answers(engine, [request("1", bound, logit_bias=dict.fromkeys(ids, 60.0))])["1"]
    free, _, rest = text(outputs).partition("ab")
    assert set(free) <= {"a", "b"} and rest in ("yes", "no")


def test_preempted_answers_follow_on(engine: Engine) -> None:
    wanted = [request(str(i), grammar(GRAMMARS[0])) for i in range(8)]
    alone = {each.id: tokens(answers(engine, [each])[each.id]) for each in wanted}
    scarce = restrict(engine, num_pages=18, max_model_len=128, max_num_seqs=6)
    assert {name: tokens(outputs) for name, outputs in answers(scarce, wanted).items()} == alone
    assert scarce.scheduler.num_preemptions


def test_aborted_ones_leave_nothing_behind(engine: Engine) -> None:
    wanted = [request(str(i), grammar(GRAMMARS[i % 2])) for i in range(6)]
    rest = {each.id: tokens(answers(engine, [each])[each.id]) for each in wanted[4:]}
    found: dict[str, list[int]] = {each.id: [] for each in wanted}
    for each in wanted:
        engine.add(each)
    engine.abort("0")  # which is not compiled yet, or only just
    for step in range(400):
        if step in (2, 5, 9):
            engine.abort(str((2, 5, 9).index(step) + 1))
        for output in engine.step():
            found[output.id] += output.token_ids
        if not engine.has_work:
            break
    engine.scheduler.check()
    assert not engine._masks and not engine._compiling
    assert {name: found[name] for name in rest} == rest and not found["0"]


def test_what_does_not_compile_is_refused_and_nobody_else_notices(engine: Engine) -> None:
    """It was tried before, by whoever asks; the engine trusts nobody."""
    bomb = "start: A\nA: /(.*a.{30})/ & /(.*b.{30})/ & ~/(.*c.{20})/"
    wanted = [
        request("0", Grammar(bomb)),
        request("1", grammar(GRAMMARS[0])),
        request("2", Grammar("?")),
        request("3", None),
    ]
    alone = {each.id: tokens(answers(engine, [each])[each.id]) for each in (wanted[1], wanted[3])}
    found = answers(engine, wanted)
    for name in ("0", "2"):
        (output,) = found[name]
        assert output.refused and output.finish_reason == "error" and not output.token_ids
    assert "fuel exhausted" in (found["0"][0].error or "")
    assert {name: tokens(found[name]) for name in alone} == alone


def test_nobody_waits_for_a_grammar_that_compiles(engine: Engine) -> None:
    slow: Future[Any] = Future()
    grammars = engine.grammars
    assert grammars is not None
    grammars._copies["slow"] = [Copy(slow)]
    engine.add(request("0", Grammar("slow")))
    free = request("1", None, ignore_eos=True, max_tokens=10)
    engine.add(free)
    took = []
    while len(took) < 10:
        took += tokens(engine.step())
    assert engine.has_work and engine.step() == []
    slow.set_result(grammars.compile(grammar(GRAMMARS[2])).compiled.result())
    found: list[EngineOutput] = []
    while engine.has_work:
        found += engine.step()
    assert text(found) in GRAMMARS[2]["choice"]


def test_large_grammars_are_kept_as_long_as_there_is_room(monkeypatch: pytest.MonkeyPatch, engine: Engine) -> None:
    """Those that nobody follows make room; where all are followed, the next is refused."""
    monkeypatch.setattr(module, "_MAX_BYTES", 100)
    grammars = Grammars(engine.grammars._read)  # type: ignore[union-attr]

    def large(index: int) -> Grammar:
        return msgspec.structs.replace(grammar({"regex": f"a{{{index}}}"}), num_bytes=40)

    for index in range(1, 9):
        grammars.compile(large(index)).compiled.result()
    assert grammars._num_bytes <= 100 and len(grammars._copies) == 2
    uses = [grammars.compile(large(index)) for index in (20, 21)]
    with pytest.raises(RequestError, match="all memory") as caught:
        grammars.compile(large(22))
    assert caught.value.status == 503
    assert grammars.compile(large(20)).copy is uses[0].copy
    uses[1].compiled.result()
    del uses[1:]
    assert grammars.compile(large(22)).compiled.result() is not None


def test_a_grammar_that_cannot_go_on_ends_its_own_request(engine: Engine) -> None:
    """One that grows beyond llguidance's limits as the answer does."""
    deep = "start: x{1000}\nx: y{1000}\ny: z{1000}\nz: /[a-z]/"
    wanted = [request("1", grammar(GRAMMARS[0])), request("2", Grammar(deep), max_tokens=40), request("3", None)]
    alone = {each.id: tokens(answers(engine, [each])[each.id]) for each in (wanted[0], wanted[2])}
    found = answers(engine, wanted)
    assert {name: tokens(found[name]) for name in alone} == alone
    assert found["2"][-1].finish_reason in ("error", "length")


def test_a_vocabulary_is_read_once(folder: Path) -> None:
    reader = Reader()
    grammars = Grammars(lambda: reader.for_grammars(256))
    assert not reader.num_read
    uses = [grammars.compile(grammar(each)) for each in [*GRAMMARS, GRAMMARS[0]]]
    assert uses[0].copy is uses[-1].copy and [use.compiled.result() for use in uses]
    assert reader.num_read == 1


def test_many_answers_share_few_copies_of_a_grammar(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that threads that fill their masks do not wait for one lock."""
    monkeypatch.setattr("ingle.kernels.cpu.threads.default_count", lambda: 4)
    grammars = Grammars(lambda: Reader().for_grammars(256))
    wanted = grammar(GRAMMARS[1])
    uses = [grammars.compile(wanted) for _ in range(40)]
    copies = {use.copy for use in uses}
    assert len(copies) == 3 and {len(copy.uses) for copy in copies} == {13, 14}
    masks = [grammars.mask(wanted, use) for use in uses if use.compiled.result()]
    words = np.zeros((40, 8), np.int32)
    for text in ("你好", " "):
        assert not grammars.fill_rows(list(zip(masks, range(40), strict=True)), words)
        token_id = encode(text)[0]
        assert (words == words[0]).all() and words[0, token_id // 32] >> token_id % 32 & 1
        for mask in masks:
            mask.take([token_id])
    with pytest.raises(ValueError, match="cannot be followed"):
        masks[0].take([encode("na")[0]])
    masks[1].take([encode("12")[0]])
    assert masks[1].ended and not masks[2].ended
    del uses, masks, mask
    gc.collect()
    assert not any(copy.uses for copy in copies)


def test_an_engine_without_a_vocabulary_refuses(engine: Engine) -> None:
    from ingle.errors import RequestError

    engine.grammars = None
    with pytest.raises(RequestError, match="no vocabulary"):
        engine.add(request("0", grammar(GRAMMARS[0])))


def test_a_request_with_a_grammar_crosses_processes() -> None:
    from ingle.request import decode_token_ids, encode_token_ids

    sent = request("0", grammar(GRAMMARS[0], after="</think>"))
    body = msgspec.msgpack.encode(sent, enc_hook=encode_token_ids)
    assert msgspec.msgpack.decode(body, type=EngineRequest, dec_hook=decode_token_ids).grammar == sent.grammar


def test_compiling_is_bounded_in_time(folder: Path) -> None:
    grammars = Grammars(lambda: Reader().for_grammars(256))
    many = {"type": "object", "properties": {f"property {i}": {"type": "string"} for i in range(2000)}}
    started = time.monotonic()
    grammars.compile(grammar({"json": many})).compiled.exception(timeout=60)
    assert time.monotonic() - started < 30


def test_a_number_ends(engine: Engine) -> None:
    """The model wants nothing but zeros; digits of a string are its own."""
    zeros = dict.fromkeys([encode("0")[0], encode("00")[0]], 90.0)
    for kind, schema in (("number", {"type": "number", "minimum": 0}), ("string", {"type": "string", "maxLength": 60})):
        bound = Grammar(grammar_text(StructuredOutputs(json=schema)), is_json=True)
        first = {encode('"' if kind == "string" else "1")[0]: 80.0}
        answer = text(answers(engine, [request("1", bound, logit_bias={**zeros, **first})])["1"])
        longest = max(len(part) for part in answer.replace("e", ".").replace("E", ".").strip('"').split("."))
        assert (len(answer) == 62) if kind == "string" else (longest <= 25), answer
        assert json.loads(answer) is not None


@pytest.mark.parametrize("cut", range(1, 9))
def test_numbers_are_told_from_strings(cut: int) -> None:
    """However the text is cut into tokens."""
    body = json.dumps({"a": '1"2\\', "\\\\": [10**39], "c": "9" * 40, 'd\\"': 7}).encode()
    longest, numbers = 0, Numbers()
    for start in range(0, len(body), cut):
        numbers.take(body[start : start + cut])
        longest += numbers.too_long
        before = body[: start + cut]
        digits = len(before) - len(before.rstrip(b"0123456789"))
        assert numbers.too_long == (digits >= 24 and before[-digits - 1 : len(before) - digits] == b"[")
    assert longest


def test_tokens_that_have_to_follow_take_no_step_of_their_own(engine: Engine) -> None:
    """With log probabilities each is drawn: the same tokens, in more steps. Nor does preemption change one."""
    wanted = [request(str(i), grammar({"json": PERSON})) for i in range(6)]
    drawn = [request(str(i), grammar({"json": PERSON}), logprobs=0) for i in range(6)]
    jumped, one_by_one = answers(engine, wanted), answers(engine, drawn)
    for each in wanted:
        assert tokens(jumped[each.id]) == tokens(one_by_one[each.id])
        assert all(len(output.token_ids) == 1 for output in one_by_one[each.id])
        assert engine._max_in_flight != 1 or len(jumped[each.id]) < len(tokens(jumped[each.id])) * 0.8
    scarce = restrict(engine, num_pages=18, max_model_len=128, max_num_seqs=6, max_num_batched_tokens=8)
    again = answers(scarce, wanted)
    assert {name: tokens(each) for name, each in again.items()} == {name: tokens(each) for name, each in jumped.items()}
    assert scarce.scheduler.num_preemptions


@pytest.mark.parametrize("max_tokens", range(1, 24))
def test_a_limit_holds_within_what_has_to_follow(engine: Engine, max_tokens: int) -> None:
    whole = tokens(answers(engine, [request("1", grammar({"json": PERSON}))])["1"])
    (*_, last) = cut = answers(engine, [request("1", grammar({"json": PERSON}), max_tokens=max_tokens)])["1"]
    assert tokens(cut) == whole[:max_tokens] and last.finish_reason == "length"
