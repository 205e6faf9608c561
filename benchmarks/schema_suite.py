"""How much of JSON Schema's own test suite constrained answers handle.

    git clone https://github.com/json-schema-org/JSON-Schema-Test-Suite
    python benchmarks/schema_suite.py JSON-Schema-Test-Suite

Each of its schemas is compiled as a request's would be, and each of its instances is held against the grammar: as JSON
writes it, and with the properties in the order in which the grammar wants them. No tokenizer of a model is needed.
A schema is handled where it compiles; else a request that brings it is refused. What would be wrong: an instance that
the schema forbids and the grammar lets pass.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llguidance import LLMatcher, LLTokenizer

from ingle.errors import RequestError
from ingle.structured import StructuredOutputs
from ingle.text.grammar import compile_grammar, grammar_text

_MAX_ORDERS = 120
"""Of an instance's properties that are tried."""
BYTES = LLTokenizer("byte")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("suite", type=Path, help="a checkout of JSON-Schema-Test-Suite")
    parser.add_argument("--draft", default="draft2020-12")
    parser.add_argument("--list", action="store_true", help="name what is wrong, and what is refused")
    given = parser.parse_args()
    counts: Counter[str] = Counter()
    files = sorted((given.suite / "tests" / given.draft).glob("*.json"))
    for file, group in ((each, group) for each in files for group in json.loads(each.read_text())):
        counts["schemas"] += 1
        counts["instances"] += len(group["tests"])
        try:
            matcher = _compiled(group["schema"])
        except (RequestError, ValueError) as error:
            if _admits_nothing(error):
                matcher = None  # and so do we: a request with it is refused, and no wrong answer comes
            else:
                counts["refused"] += 1
                if given.list:
                    print(f"refused  {file.stem}: {group['description']}: {str(error)[:100]}")
                continue
        counts["handled"] += 1
        for test in group["tests"]:
            passes = matcher is not None and any(_accepts(matcher, text) for text in _spellings(test["data"]))
            verdict = "right" if passes == test["valid"] else "too loose" if passes else "too strict"
            counts[verdict] += 1
            if given.list and verdict != "right":
                print(f"{verdict}  {file.stem}: {group['description']}: {test['description']}")
    _print(given.draft, counts)


def _print(draft: str, counts: Counter[str]) -> None:
    schemas, tried = counts["schemas"], counts["right"] + counts["too loose"] + counts["too strict"]
    print(f"{draft}: {counts['handled']} of {schemas} schemas are handled ({counts['handled'] / schemas:.0%}), "
          f"{counts['refused']} refused")  # fmt: skip
    print(f"of their {tried} instances {counts['right']} are judged right ({counts['right'] / tried:.1%}), "
          f"{counts['too strict']} are valid and could not be written, "
          f"{counts['too loose']} are invalid and could")  # fmt: skip


def _compiled(schema: dict[str, Any] | bool) -> LLMatcher:
    return compile_grammar(grammar_text(StructuredOutputs(json=schema)), BYTES)


def _admits_nothing(error: Exception) -> bool:
    text = str(error)
    return "Unsatisfiable" in text or "no answer can follow" in text or "schema false" in text


def _accepts(matcher: LLMatcher, text: str) -> bool:
    state = matcher.deep_copy()
    data = list(text.encode())
    return state.try_consume_tokens(data) == len(data) and state.is_accepting()


def _spellings(value: Any) -> Iterator[str]:
    """JSON texts of a value, with its properties in different orders."""
    orders = itertools.islice(_orders(value), _MAX_ORDERS)
    return (json.dumps(each, ensure_ascii=False, separators=separators) for each in orders for separators in _SPACES)


_SPACES = ((",", ":"), (", ", ": "))


def _orders(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for names in itertools.permutations(value):
            for inner in itertools.product(*(list(itertools.islice(_orders(value[name]), 6)) for name in names)):
                yield dict(zip(names, inner, strict=True))
    elif isinstance(value, list):
        for inner in itertools.product(*(list(itertools.islice(_orders(each), 6)) for each in value)):
            yield list(inner)
    else:
        yield value


if __name__ == "__main__":
    main()
