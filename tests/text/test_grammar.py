"""Grammars of every kind, over vocabularies of every kind: bytes of tokens, what is refused, and how soon."""

from __future__ import annotations

import json
import random
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from llguidance import LLMatcher, LLTokenizer
from tokenizers import Tokenizer as Backend

from ingle.errors import RequestError
from ingle.limits import LimitsConfig, holding
from ingle.request import SamplingParams
from ingle.structured import StructuredOutputs
from ingle.text.grammar import GrammarCheck, compile_grammar, grammar_text, unforced
from ingle.text.load import load_tokenizer
from ingle.text.sandbox import Sandboxes
from ingle.text.tokenizer import Tokenizer
from tests.text import toys

_MOST = LimitsConfig().max_grammar_bytes

BYTES = LLTokenizer("byte")
KINDS: dict[str, Callable[[], Backend]] = {
    "byte-level": toys.byte_level,
    "llama": toys.sentence_piece,
    "gemma": lambda: toys.sentence_piece(toys.llama_decoder(strip=0)),
}


def matcher(tokenizer: LLTokenizer = BYTES, **wanted: Any) -> LLMatcher:
    return compile_grammar(grammar_text(StructuredOutputs(**wanted)), tokenizer)


def accepts(text: str, **wanted: Any) -> bool:
    """The same with and without forced tokens."""
    given, data = grammar_text(StructuredOutputs(**wanted)), list(text.encode())
    found = set()
    for each in (given, unforced(given)):
        state = compile_grammar(each, BYTES)
        found.add(state.try_consume_tokens(data) == len(data) and state.is_accepting())
    (answer,) = found
    return answer


def json_accepts(schema: Any, value: Any) -> bool:
    return accepts(json.dumps(value, ensure_ascii=False), json=schema)


# ---- each kind


@pytest.mark.parametrize(
    ("wanted", "yes", "no"),
    [
        ({"regex": r"\d{3}-\d{4}"}, ["123-4567"], ["123-456", "x123-4567", "123-45678"]),
        ({"regex": "^(你好|世界)+$"}, ["你好世界"], ["你", ""]),
        ({"regex": r"[\p{Han}]{2}"}, ["北京"], ["ab", "北"]),
        ({"choice": ["yes", "yes please", "no"]}, ["yes", "yes please", "no"], ["yes ", "", "maybe"]),
        ({"choice": ['a"b', "c\\d", "e\nf", "你 {x}", "/i"]}, ['a"b', "c\\d", "e\nf", "你 {x}", "/i"], ["a", "ab"]),
        ({"grammar": 'start: "(" start ")" | "x"'}, ["x", "((x))"], ["(x", "()"]),
        ({"grammar": 'root ::= "a" [0-9]+ ("," root)?'}, ["a1", "a1,a22"], ["a", "a1,"]),
        ({"grammar": 'start: %json {"type": "array", "items": {"type": "null"}}'}, ["[]", "[null]"], ["[1]"]),
        ({"json_object": True}, ["{}", '{"a": [1, {"b": null}]}', '{"你": "好"}'], ["[]", "1", "{", "{} "]),
        ({"json": True}, ["{}", "[1]", '"x"', "null"], ["x"]),
        ({"json": '{"type": "integer"}'}, ["0", "-12"], ["1.5", "01", '"1"']),
    ],
)
def test_what_an_answer_may_be(wanted: dict[str, Any], yes: list[str], no: list[str]) -> None:
    assert [text for text in yes if not accepts(text, **wanted)] == []
    assert [text for text in no if accepts(text, **wanted)] == []


TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "value": {"type": "integer"},
                "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 3},
            },
            "required": ["value"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/node",
}


@pytest.mark.parametrize(
    ("schema", "yes", "no"),
    [
        ({"enum": ["红", "绿", 3, None, True]}, ["红", "绿", 3, None, True], ["蓝", 4, False]),
        ({"const": {"a": [1, "二"]}}, [{"a": [1, "二"]}], [{"a": [1]}, {}]),
        (
            {"type": "array", "items": {"type": "number"}, "minItems": 1, "maxItems": 2},
            [[1], [1.5, -2e3]],
            [[], [1, 2, 3], ["a"]],
        ),
        ({"type": "array", "prefixItems": [{"type": "string"}], "items": False}, [["a"]], [["a", 1], [1]]),
        ({"type": "string", "pattern": "^[A-Z]{2}\\d+$"}, ["AB1", "XY123"], ["A1", "ab1", "AB"]),
        ({"type": "string", "minLength": 2, "maxLength": 3}, ["你好", "abc", "😀😀"], ["a", "abcd", "你好世界"]),
        ({"type": "string", "format": "date"}, ["2024-02-29"], ["2024-13-01", "x"]),
        ({"type": "string", "format": "uuid"}, ["123e4567-e89b-12d3-a456-426614174000"], ["123"]),
        ({"type": "integer", "minimum": -5, "exclusiveMaximum": 12}, [-5, 0, 11], [-6, 12, 1.5]),
        ({"type": "number", "minimum": 0.5, "maximum": 2}, [0.5, 1, 1.75, 2], [0.25, 2.1, -1]),
        ({"type": "integer", "multipleOf": 5}, [0, 5, 100], [3]),
        (TREE, [{"value": 1}, {"value": 1, "children": [{"value": 2, "children": []}]}], [{}, {"value": "1"}]),
        ({"type": ["string", "null"]}, ["x", None], [1]),
        ({"anyOf": [{"type": "integer"}, {"type": "string", "maxLength": 1}]}, [5, "a"], ["ab", None]),
        (
            {"allOf": [{"type": "object", "properties": {"a": {"type": "integer"}}}, {"required": ["a"]}]},
            [{"a": 1}],
            [{}, {"a": "x"}],
        ),
        (
            {"type": "object", "properties": {"a": True}, "additionalProperties": {"type": "boolean"}},
            [{}, {"a": 1, "b": True}],
            [{"b": 1}],
        ),
        (
            {"type": "object", "patternProperties": {"^x_": {"type": "integer"}}, "additionalProperties": False},
            [{"x_a": 1}],
            [{"y": 1}, {"x_a": "1"}],
        ),
        (
            {"oneOf": [
                {"type": "object", "properties": {"kind": {"const": "cat"}}, "required": ["kind"]},
                {"type": "object", "properties": {"kind": {"const": "dog"}}, "required": ["kind"]},
            ], "discriminator": {"propertyName": "kind"}},
            [{"kind": "cat"}, {"kind": "dog"}],
            [{"kind": "cow"}, {}],
        ),
    ],
)  # fmt: skip
def test_schemas(schema: dict[str, Any], yes: list[Any], no: list[Any]) -> None:
    validator = Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER)
    assert [value for value in yes if not (json_accepts(schema, value) and validator.is_valid(value))] == []
    assert [value for value in no if json_accepts(schema, value)] == []


def test_objects_may_be_closed() -> None:
    inner = {"properties": {"b": {"type": "integer"}}, "default": {"properties": {}}}
    schema = {"type": "object", "properties": {"properties": {"type": "array", "items": {"$ref": "#/$defs/inner"}}}}
    schema |= {"$defs": {"inner": {"type": "object", **inner}}}
    given = {"properties": [{"b": 1}]}
    more = [{"properties": [{"b": 1, "c": 2}]}, {**given, "a": 1}]
    for value in (given, *more):
        assert accepts(json.dumps(value), json=schema)
        assert accepts(json.dumps(value), json=schema, disable_additional_properties=True) is (value is given)
    said = {"type": "object", "properties": {}, "additionalProperties": True}
    assert accepts('{"a": 1}', json=said, disable_additional_properties=True)


def test_white_space_is_some_and_never_without_end() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "integer"}}}, "required": ["a"]}
    value = {"a": [1, 2]}
    for text in (json.dumps(value), json.dumps(value, indent=4), json.dumps(value, indent="\t"), '{"a":[1,2]}'):
        assert accepts(text, json=schema)
    assert not accepts('{"a":   [1,2]}', json=schema) and not accepts('{\n\n\n"a":[1,2]}', json=schema)
    assert accepts('{"a":[1,2]}', json=schema, disable_any_whitespace=True)
    assert not accepts('{"a": [1,2]}', json=schema, disable_any_whitespace=True)
    assert accepts('{"a":   [1,2]}', json=schema, whitespace_pattern=" {0,3}")
    assert accepts('{"a":   [1,2]}', json={**schema, "x-guidance": {"whitespace_pattern": " {0,3}"}})


@pytest.mark.parametrize("schema", [{"not": {}}, {"if": {}, "then": {}}, {"uniqueItems": True}, {"format": "colour"}])
def test_what_is_not_handled_is_refused_whatever_the_schema_asks_for(schema: dict[str, Any]) -> None:
    for lenient in ({}, {"x-guidance": {"lenient": True}}):
        with pytest.raises(RequestError, match=r"Unimplemented|Unknown format"):
            matcher(json={**schema, **lenient})


# ---- what is refused


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({}, "takes one of json, regex, choice, grammar, json_object, got none"),
        ({"regex": "a", "json_object": True}, "got regex and json_object"),
        ({"choice": []}, "1 to 4096 strings"),
        ({"choice": ["a", ""]}, "not empty"),
        ({"choice": "abc"}, "must be a list of strings, got 'abc'"),
        ({"choice": {"a": 1}}, "must be a list of strings"),
        ({"choice": ["x"] * 5000}, "choice has 5000 strings, at most 4096 are taken (--max-grammar-choices)"),
        ({"json": "{"}, "json is not valid JSON"),
        ({"json": [1]}, "must be a JSON Schema, which is an object"),
        ({"json": False}, "no answer can follow"),
        ({"json": {"enum": [float("nan")]}}, "json is no JSON Schema"),
        ({"json": {"enum": [object()]}}, "json is no JSON Schema"),
        ({"json": "[" * 100_000}, "json is not valid JSON"),
        ({"regex": "a" * (_MOST + 1)}, f"at most {_MOST} are taken (--max-grammar-bytes)"),
        ({"json": {"enum": ["a" * _MOST]}}, f"at most {_MOST} are taken (--max-grammar-bytes)"),
        ({"regex": 3}, "regex must be a string, got 3"),
        ({"regex": "a", "disable_any_whitespace": True}, "whitespace is that of JSON"),
        ({"rule": "a"}, "has no rule"),
    ],
)
def test_values_are_checked(wanted: dict[str, Any], message: str) -> None:
    with holding(LimitsConfig()), pytest.raises(RequestError, match=re.escape(message)) as error:
        SamplingParams(structured_outputs=wanted)  # type: ignore[arg-type]
    assert error.value.param == "structured_outputs"


def test_a_schema_may_be_nested_but_not_without_end() -> None:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(45):
        schema = {"type": "array", "items": schema}
    assert not matcher(json=schema).is_error()
    for _ in range(60):
        schema = {"type": "array", "items": schema}
    with pytest.raises(ValueError, match="nested too deeply"):
        StructuredOutputs(json=schema)


def refs(kind: str) -> dict[str, Any]:
    """Each of forty definitions names the next one twice."""
    two = {f"d{i}": {kind: [{"type": "object", "properties": {str(j): {"$ref": f"#/$defs/d{i + 1}"}}} for j in (1, 2)]}
           for i in range(40)}  # fmt: skip
    return {"$ref": "#/$defs/d0", "$defs": {**two, "d40": {"type": "string"}}}


BOMBS: dict[str, dict[str, Any]] = {
    "repetitions": {"regex": "((a{1,1000}){1,1000}){1,1000}"},
    "intersections": {"grammar": "start: A\nA: /(.*a.{30})/ & /(.*b.{30})/ & ~/(.*c.{20})/"},
    "states": {"regex": ".*a.{60}|.*b.{60}|.*c.{60}"},
    "parentheses": {"regex": "(" * 5000 + "a" + ")" * 5000},
    "rules": {"grammar": "start: x{1000}\nx: y{1000}\ny: z{1000}\nz: /[a-z]/"},
    "ambiguity": {"grammar": 'start: x x x x x x\nx: x x | "a" | ""'},
    "deep grammar": {"grammar": "start: " + "(" * 3000 + '"a"' + ")" * 3000},
    "products": {"json": {"allOf": [{"anyOf": [{"type": "object", "properties": {f"{i}_{j}": {}}} for j in range(4)]}
                                    for i in range(9)]}},
    "references to alternatives": {"json": refs("anyOf")},
    "references to all": {"json": refs("allOf")},
    "a reference to itself": {"json": {"$ref": "#"}},
    "names": {"json": {"type": "object", "properties": {f"property {i}": {} for i in range(3000)}}},
    "choices": {"json": {"enum": [f"item {i}" for i in range(9000)]}},
    "a billion items": {"json": {"type": "array", "items": {}, "minItems": 10**9}},
    "many digits": {"json": {"type": "number", "minimum": 1e-300, "maximum": 1e300, "multipleOf": 1e-7}},
    "primes": {"json": {"type": "integer", "multipleOf": 999999937}},
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_or_bounded(name: str) -> None:
    """In time that others need not mind: on a machine that does nothing else, the worst takes a second or two."""
    started = time.process_time()
    try:
        state = matcher(**BOMBS[name])
    except (RequestError, ValueError) as error:
        assert "\n" not in str(error) and len(str(error)) < 400
        state = None
    assert time.process_time() - started < 10
    for _ in range(20) if state is not None else ():
        started = time.process_time()
        allowed = [i for i, bit in enumerate(state.compute_logit_bias()) if bit]
        assert time.process_time() - started < 0.5
        if state.is_error() or state.is_stopped() or not state.consume_token(allowed[0]):
            break


# ---- vocabularies


def toy(kind: str) -> Tokenizer:
    backend = KINDS[kind]()
    end = "<|im_end|>" if kind == "byte-level" else "</s>"
    return Tokenizer(backend, special_tokens={"eos_token": end}, eos_token_ids=[], chat_template=None)


def model_tokenizer(kind: str, request: pytest.FixtureRequest) -> Tokenizer:
    if kind in KINDS:
        return toy(kind)
    path: Path = request.getfixturevalue(kind)
    return load_tokenizer(path)


ALL_KINDS = [*KINDS, "smollm2_gguf", pytest.param("gemma3_gguf", marks=pytest.mark.weights)]


@pytest.fixture(params=ALL_KINDS, scope="module")
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return model_tokenizer(request.param, request)


@pytest.fixture(scope="module")
def guided(tokenizer: Tokenizer) -> LLTokenizer:
    return tokenizer.for_grammars(tokenizer.vocab_size).for_llguidance()


def test_every_token_has_its_bytes(tokenizer: Tokenizer) -> None:
    """One that is a special token, or nothing, is never allowed; all others are, where any text may come."""
    vocab_size = tokenizer.vocab_size + 70  # as models have whose matrices are padded
    vocabulary = tokenizer.for_grammars(vocab_size)
    guided = vocabulary.for_llguidance()
    assert guided.vocab_size == vocab_size and set(guided.eos_tokens) == set(tokenizer.eos_token_ids)
    anything = compile_grammar("start: /(.|\\n)*/", guided).compute_logit_bias()
    special = tokenizer.special_token_ids.union(tokenizer.eos_token_ids)
    for token_id, data in enumerate(vocabulary.tokens):
        if token_id in special:
            assert bool(anything[token_id]) == (token_id in tokenizer.eos_token_ids)
            continue
        if not data or b"\xff" in data:
            assert not anything[token_id]
            continue
        assert guided.decode_bytes([token_id]) == data
        # A token that begins within a character may not begin a text.
        begins = data[0] & 0xC0 != 0x80 and _may_be_text(data)
        assert bool(anything[token_id]) == bool(begins), (token_id, data)


def _may_be_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data"
    return True


@pytest.mark.parametrize("text", [text for text in toys.TEXTS if text and "<" not in text])
def test_a_text_is_followed_as_the_model_writes_it(tokenizer: Tokenizer, guided: LLTokenizer, text: str) -> None:
    quoted = json.dumps(text, ensure_ascii=False)
    prefix = tokenizer.encode('"', add_special_tokens=False)[-1:]  # without what begins a text
    for ids in (tokenizer.encode(quoted, add_special_tokens=False), guided.greedy_tokenize(quoted)):
        spelled = b"".join(map(tokenizer.token_bytes, ids))
        ids = prefix + ids[1:] if spelled != quoted.encode() else ids
        if b"".join(map(tokenizer.token_bytes, ids)) == quoted.encode():
            state = matcher(guided, json={"type": "string"})
            assert state.consume_tokens(ids), state.get_error()
            assert state.is_accepting()


@pytest.mark.parametrize("seed", range(4))
def test_what_is_forced_is_what_the_grammar_has(tokenizer: Tokenizer, guided: LLTokenizer, seed: int) -> None:
    """Any walk along the masks ends in an answer that the schema admits, and no mask allows what it refuses."""
    schema = {
        "type": "object",
        "properties": {
            "first name": {"enum": ["abc", "你好", "Zoë"]},
            "flag": {"type": "boolean"},
            "numbers": {"type": "array", "items": {"enum": [1, 22, 333]}, "minItems": 2, "maxItems": 3},
        },
        "required": ["first name", "flag", "numbers"],
        "additionalProperties": False,
    }
    state = matcher(guided, json=schema)
    chosen: list[int] = []
    generator = random.Random(seed)
    while not state.is_stopped():
        allowed = [i for i, bit in enumerate(state.compute_logit_bias()) if bit]
        forced = state.compute_ff_tokens()
        assert not forced or allowed == forced[:1]
        chosen.append(generator.choice(allowed))
        assert state.consume_token(chosen[-1]), state.get_error()
    text = b"".join(tokenizer.token_bytes(i) for i in chosen if i not in tokenizer.eos_token_ids).decode()
    Draft202012Validator(schema).validate(json.loads(text))


def test_a_grammar_may_name_special_tokens() -> None:
    tokenizer = toy("byte-level")
    wanted = StructuredOutputs(grammar='start: <|im_start|> "a" | "b"')
    bound = tokenizer.grammars.grammar(wanted)
    allowed = compile_grammar(bound.text, tokenizer.for_grammars(400).for_llguidance()).compute_logit_bias()
    assert {i for i, bit in enumerate(allowed) if bit} == {tokenizer.token_id("<|im_start|>"), tokenizer.token_id("b")}
    with pytest.raises(RequestError, match="structured_outputs: grammar"):
        tokenizer.grammars.grammar(StructuredOutputs(grammar="start: <|nobody|>"))


def test_a_model_without_an_end_token_is_not_bound() -> None:
    check = GrammarCheck({}, [], 300)
    with pytest.raises(RequestError, match="no end token"):
        check.grammar(StructuredOutputs(regex="a"))


def test_what_could_not_be_tried_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    check, wanted = GrammarCheck({0: b"</s>"}, [0], 300), StructuredOutputs(regex="a+")
    with monkeypatch.context() as patch:
        patch.setattr("ingle.text.sandbox.sandboxes", Sandboxes())
        patch.setattr("ingle.text.sandbox.sys", SimpleNamespace(executable="/nothing", path=[]))
        with pytest.raises(RequestError, match="cannot compile a grammar now: its process cannot start") as error:
            check.grammar(wanted)
        assert error.value.status == 503
    assert check.grammar(wanted).text


def test_what_was_tried_is_known() -> None:
    check = GrammarCheck({0: b"</s>"}, [0], 300)
    wanted = StructuredOutputs(json={"type": "string"})
    assert check.grammar(wanted) is check.grammar(StructuredOutputs(json='{"type":"string"}'))
    for _ in range(2):
        with pytest.raises(RequestError, match="guided_json: json: Unimplemented") as error:
            check.grammar(StructuredOutputs(json={"not": {}}, asked_as="guided_json"))
        assert error.value.param == "guided_json"


def test_one_of_many_that_ask_for_the_same_compiles_it(monkeypatch: pytest.MonkeyPatch) -> None:
    check, going, calls = GrammarCheck({}, [0], 10), threading.Event(), []

    def slowly(wanted: StructuredOutputs) -> str:
        calls.append(wanted)
        assert going.wait(10)
        return "no"

    monkeypatch.setattr(check, "_check", slowly)
    monkeypatch.setattr("ingle.text.grammar._PATIENCE_S", 0.01)
    first, others = StructuredOutputs(regex="a"), [StructuredOutputs(regex=letter) for letter in "bc"]

    def asked(wanted: StructuredOutputs) -> str | None:
        with pytest.raises(RequestError) as error:
            check.grammar(wanted)
        return error.value.code

    with ThreadPoolExecutor(8) as pool:
        same = [pool.submit(asked, first) for _ in range(4)]
        while len(calls) < 1:
            time.sleep(0.001)
        second = pool.submit(asked, others[0])
        while len(calls) < 2:
            time.sleep(0.001)
        assert pool.submit(asked, others[1]).result() == "server_busy"
        going.set()
        assert {each.result() for each in [*same, second]} == {"invalid_grammar"}
    assert calls == [first, others[0]]
    assert asked(others[1]) == "invalid_grammar"


EXPLODING: list[dict[str, Any]] = [
    {"json": {"type": "integer", "multipleOf": 99_999_937}},
    {"json": {"allOf": [{"type": "integer", "multipleOf": number} for number in (99_989, 99_991, 99_971)]}},
    {"regex": "((a{1000}){1000}){1000}"},
]


@pytest.mark.parametrize("wanted", EXPLODING)
def test_what_explodes_is_refused_in_time_and_costs_this_process_no_memory(wanted: dict[str, Any]) -> None:
    def resident_kb() -> int:
        return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1])  # type: ignore[index]

    before = resident_kb()
    check = GrammarCheck({0: b"</s>"}, [0], 300)
    with pytest.raises(RequestError, match=r"cannot be compiled: it takes too|fuel exhausted"):
        check.grammar(StructuredOutputs(**wanted))
    assert resident_kb() < before + (8 << 10)
    found = check.grammar(StructuredOutputs(json={"type": "integer", "multipleOf": 7}))
    assert 0 <= found.num_bytes < 1 << 20
