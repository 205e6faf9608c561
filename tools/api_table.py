#!/usr/bin/env python3
"""The tables of docs/api.md: every endpoint and every field, made from the code, against OpenAI's, vLLM's and others'.

python tools/api_table.py           writes them into docs/api.md
python tools/api_table.py --check   says whether they are there as they should be
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "api.md"
BEGIN, END = "<!-- made by tools/api_table.py -->", "<!-- end of what tools/api_table.py makes -->"
_MAX_DEPTH = 4

# What the references of others list, each by its path. A dot leads into an object, [] into a list.
_CHAT = """messages model audio frequency_penalty function_call functions logit_bias logprobs max_completion_tokens
max_tokens metadata modalities n parallel_tool_calls prediction presence_penalty prompt_cache_key
prompt_cache_retention reasoning_effort response_format safety_identifier seed service_tier stop store stream
stream_options stream_options.include_usage stream_options.include_obfuscation temperature tool_choice tools
top_logprobs top_p user verbosity web_search_options messages[].role messages[].content messages[].name
messages[].refusal messages[].audio messages[].function_call messages[].tool_calls messages[].tool_calls[].id
messages[].tool_calls[].type messages[].tool_calls[].function messages[].tool_calls[].function.name
messages[].tool_calls[].function.arguments messages[].tool_call_id messages[].content[].type messages[].content[].text
tools[].type tools[].function tools[].function.name tools[].function.description tools[].function.parameters
tools[].function.strict"""
_COMPLETION = """model prompt best_of echo frequency_penalty logit_bias logprobs max_tokens n presence_penalty seed
stop stream stream_options stream_options.include_usage stream_options.include_obfuscation suffix temperature top_p
user"""
_VLLM_SAMPLING = """use_beam_search top_k min_p repetition_penalty length_penalty stop_token_ids
include_stop_str_in_output ignore_eos min_tokens skip_special_tokens spaces_between_special_tokens
truncate_prompt_tokens prompt_logprobs allowed_token_ids bad_words add_special_tokens response_format
structured_outputs guided_json guided_regex guided_choice guided_grammar priority request_id
return_tokens_as_token_ids return_token_ids cache_salt kv_transfer_params vllm_xargs logits_processors model n
frequency_penalty presence_penalty logit_bias logprobs max_tokens seed stop stream stream_options
stream_options.include_usage stream_options.continuous_usage_stats temperature top_p user"""
_VLLM_CHAT = """messages messages[].role messages[].content messages[].name messages[].tool_call_id
messages[].tool_calls messages[].reasoning messages[].reasoning_content messages[].content[].type
messages[].content[].text max_completion_tokens top_logprobs tools tool_choice parallel_tool_calls reasoning_effort
include_reasoning echo add_generation_prompt continue_final_message documents chat_template chat_template_kwargs
mm_processor_kwargs thinking_token_budget"""
_VLLM_TOKENIZE = """model prompt add_special_tokens return_token_strs messages add_generation_prompt
continue_final_message chat_template chat_template_kwargs mm_processor_kwargs tools"""
_RESPONSES = """background conversation include input instructions max_output_tokens max_tool_calls metadata model
parallel_tool_calls previous_response_id prompt prompt_cache_key prompt_cache_retention reasoning safety_identifier
service_tier store stream stream_options temperature text tool_choice tools top_logprobs top_p truncation user"""
_MESSAGES = """model messages max_tokens cache_control container inference_geo metadata output_config service_tier
stop_sequences stream system temperature thinking tool_choice tools top_k top_p"""

FIELDS: Mapping[str, Mapping[str, str]] = {
    "/v1/chat/completions": {
        "OpenAI": _CHAT,
        "vLLM": f"{_VLLM_SAMPLING} {_VLLM_CHAT}",
        "llama.cpp": "return_progress reasoning_format",
    },
    "/v1/completions": {
        "OpenAI": _COMPLETION,
        "vLLM": f"{_VLLM_SAMPLING} prompt echo prompt_embeds",
        "llama.cpp": "return_progress",
    },
    "/tokenize": {"vLLM": _VLLM_TOKENIZE},
    "/detokenize": {"vLLM": "model tokens"},
    "/v1/embeddings": {
        "OpenAI": "input model dimensions encoding_format user",
        "vLLM": "input model dimensions encoding_format user truncate_prompt_tokens add_special_tokens priority",
    },
    "/v1/rerank": {"vLLM": "model query documents top_n truncate_prompt_tokens priority"},
    "/v1/responses": {"OpenAI": _RESPONSES},
    "/v1/responses/input_tokens": {
        "OpenAI": "conversation input instructions model parallel_tool_calls previous_response_id reasoning text "
        "tool_choice tools truncation"
    },
    "/v1/messages": {"Anthropic": _MESSAGES},
    "/v1/messages/count_tokens": {
        "Anthropic": "model messages cache_control output_config system thinking tool_choice tools"
    },
    "/v1/batches": {"OpenAI": "input_file_id endpoint completion_window metadata output_expires_after"},
}
"""What each takes at an endpoint."""

ENDPOINTS_OF: Mapping[str, str] = {
    "OpenAI": """POST /v1/chat/completions
POST /v1/completions
POST /v1/embeddings
POST /v1/responses
GET /v1/responses/{response_id}
DELETE /v1/responses/{response_id}
POST /v1/responses/{response_id}/cancel
GET /v1/responses/{response_id}/input_items
POST /v1/responses/input_tokens
POST /v1/files
GET /v1/files
GET /v1/files/{file_id}
DELETE /v1/files/{file_id}
GET /v1/files/{file_id}/content
POST /v1/batches
GET /v1/batches
GET /v1/batches/{batch_id}
POST /v1/batches/{batch_id}/cancel
GET /v1/models
GET /v1/models/{model}
POST /v1/moderations
POST /v1/audio/speech
POST /v1/audio/transcriptions
POST /v1/audio/translations
POST /v1/images/generations
POST /v1/fine_tuning/jobs""",
    "vLLM": """POST /v1/chat/completions
POST /v1/completions
POST /v1/embeddings
POST /v1/responses
POST /v1/messages
POST /v1/audio/transcriptions
POST /v1/audio/translations
POST /v1/chat/completions/render
POST /v1/completions/render
GET /v1/models
GET /health
GET /ping
GET /version
GET /metrics
GET /load
POST /tokenize
POST /detokenize
POST /pooling
POST /classify
POST /score
POST /v1/score
POST /rerank
POST /v1/rerank
POST /v2/rerank""",
    "Anthropic": """POST /v1/messages
POST /v1/messages/count_tokens""",
}
_PLACES = {"model": "{model}", "response_id": "{id}", "file_id": "{id}", "batch_id": "{id}"}


def tables() -> str:
    """Markdown, without a line break at its end."""
    from ingle.server.app import ENDPOINTS
    from ingle.server.description import document

    schema = document(ENDPOINTS)
    lines = ["### Every endpoint", "", *_endpoint_table(schema)]
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            if "requestBody" in operation and not path.endswith("/render"):
                lines += ["", f"### Fields of `{method.upper()} {path}`", "", *_field_table(schema, path, operation)]
    return "\n".join(lines)


def _endpoint_table(schema: dict[str, Any]) -> Iterator[str]:
    yield "| endpoint | answers | also of |"
    yield "| --- | --- | --- |"
    others = {who: set(map(_alike, text.splitlines())) for who, text in ENDPOINTS_OF.items()}
    here = set()
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            name = f"{method.upper()} {path}"
            here.add(_alike(name))
            streams = "text/event-stream" in str(operation["responses"]["200"]["content"].keys())
            text = operation.get("summary", "") + ("; JSON or a stream of events" if streams else "")
            yield f"| `{name}` | {text} | {_who(others, _alike(name))} |"
    absent: dict[str, None] = {}
    for text in ENDPOINTS_OF.values():
        absent |= dict.fromkeys(name for name in text.splitlines() if _alike(name) not in here)
    for name in absent:
        yield f"| `{name}` | **not here** | {_who(others, _alike(name))} |"


def _alike(name: str) -> str:
    """Whatever a parameter of the path is called."""
    return "/".join("{}" if part.startswith("{") else part for part in name.split("/"))


def _field_table(schema: dict[str, Any], path: str, operation: dict[str, Any]) -> Iterator[str]:
    from ingle.server.anthropic import protocol as messages
    from ingle.server.openai.protocol import REMARKS
    from ingle.server.responses import protocol as responses

    of_paths = {"/v1/messages": messages.REMARKS, "/v1/responses": responses.REMARKS}
    own = next((names for start, names in of_paths.items() if path.startswith(start)), frozenset())
    yield "| field | values | here | also of |"
    yield "| --- | --- | --- | --- |"
    others = {who: set(text.split()) for who, text in FIELDS.get(path, {}).items()}
    body = operation["requestBody"]["content"]["application/json"]["schema"]
    rows: dict[str, tuple[str, str]] = {}
    inherited = _inherited()
    for kind in body.get("anyOf", [body]):
        path_of_base, names = inherited.get(kind["$ref"].rpartition("/")[2], ("", set()))
        if path_of_base:
            yield f"| | | all fields of `{path_of_base}` too | |"
        for name, field, required in _fields(schema, kind, ""):
            if name.partition(".")[0].partition("[")[0] in names:
                continue
            if field.get("description") == "Known, and not supported.":
                neutral = ", ".join(f"`{_json(value)}`" for value in field["enum"] if value is not None)
                shown = (neutral or "`null`", "**refused**, but for these values")
            elif name in REMARKS or name.rpartition(".")[2] in own:
                shown = (_values(schema, field), "accepted; changes nothing")
            else:
                shown = (_values(schema, field), "required" if required else "used")
            rows.setdefault(name, shown)
    of_base = set().union(*(names for kind, (_, names) in inherited.items() if kind in str(body)))
    for name in sorted(set().union(*others.values()) - rows.keys() - of_base):
        rows[name] = ("", "ignored, and named in `X-Ingle-Ignored-Fields`")
    for name, (values, here) in sorted(rows.items()):
        yield f"| `{name}` | {values} | {here} | {_who(others, name)} |"


def _inherited() -> dict[str, tuple[str, set[str]]]:
    """Bodies that are those of another endpoint with more fields: that one's path, and its fields."""
    from ingle.server.app import ENDPOINTS
    from ingle.server.description import bodies_of

    path_of = {body: endpoint.path for endpoint in reversed(ENDPOINTS) for body in bodies_of(endpoint)}
    found = {}
    for body in path_of:
        base = next((each for each in body.__mro__[1:] if each in path_of), None)
        if base is not None:
            found[body.__name__] = (path_of[base], {*base.model_fields, *base.UNSUPPORTED})
    return found


def _who(others: Mapping[str, set[str]], name: str) -> str:
    return ", ".join(who for who, names in others.items() if name in names)


def _fields(schema: dict[str, Any], kind: dict[str, Any], before: str) -> Iterator[tuple[str, dict[str, Any], bool]]:
    """Each field's path, its schema, and whether it has to be there."""
    kind = _resolved(schema, kind)
    for name, field in kind.get("properties", {}).items():
        path = f"{before}{name}"
        yield path, field, name in kind.get("required", ())
        if path.count(".") < _MAX_DEPTH:
            for inner, suffix in _objects(schema, field):
                yield from _fields(schema, inner, f"{path}{suffix}.")


def _objects(schema: dict[str, Any], field: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Objects that a field may hold, and how a path leads into them."""
    for option in _options(field):
        resolved = _resolved(schema, option)
        if "anyOf" in resolved or "oneOf" in resolved:
            yield from _objects(schema, resolved)
        elif "properties" in resolved:
            yield resolved, ""
        elif isinstance(resolved.get("items"), dict):
            yield from ((inner, f"[]{suffix}") for inner, suffix in _objects(schema, resolved["items"]))


def _options(field: dict[str, Any]) -> list[dict[str, Any]]:
    options: list[dict[str, Any]] = field.get("anyOf") or field.get("oneOf") or [field]
    return options


def _resolved(schema: dict[str, Any], kind: dict[str, Any]) -> dict[str, Any]:
    if "$ref" not in kind:
        return kind
    found: dict[str, Any] = schema["components"]["schemas"][kind["$ref"].rpartition("/")[2]]
    return found


def _values(schema: dict[str, Any], field: dict[str, Any]) -> str:
    shown = dict.fromkeys(_value(schema, option) for option in _options(field) if option.get("type") != "null")
    return ", or ".join(filter(None, shown)) or "any"


def _value(schema: dict[str, Any], kind: dict[str, Any]) -> str:
    kind = _resolved(schema, kind)
    if "anyOf" in kind or "oneOf" in kind:
        return _values(schema, kind)
    if "const" in kind:
        return f"`{_json(kind['const'])}`"
    if "enum" in kind:
        return ", ".join(f"`{_json(value)}`" for value in kind["enum"] if value is not None)
    of_type = kind.get("type", "any")
    if of_type in ("integer", "number"):
        return f"{of_type} {_bounds(kind)}".rstrip()
    if of_type == "array":
        most = f", at most {kind['maxItems']}" if "maxItems" in kind else ""
        inner = _value(schema, kind.get("items", {})) or "anything"
        return f"list of {inner}{most}" if ", or " not in inner else f"list of ({inner}){most}"
    return {"any": "any", "string": "text"}.get(of_type, of_type)


def _bounds(kind: dict[str, Any]) -> str:
    low = kind.get("minimum", kind.get("exclusiveMinimum"))
    high = kind.get("maximum")
    high = None if high is not None and abs(high) >= 2**31 - 1 else high
    if low is None or abs(low) >= 2**31:
        return "" if high is None else f"≤ {high:g}"
    sign = "≥" if "minimum" in kind else ">"
    if high is None:
        return f"{sign} {low:g}"
    return f"{low:g} to {high:g}" if "minimum" in kind else f"> {low:g}, ≤ {high:g}"


def _json(value: Any) -> str:
    import json

    return json.dumps(value, ensure_ascii=False)


def page_with_tables(page: str) -> str:
    """`page` with the tables that it should have. Raises `ValueError` for one without a place for them."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"docs/api.md lacks {BEGIN!r} or {END!r}")
    return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{after}"


def main() -> int:
    page = PAGE.read_text(encoding="utf-8")
    wanted = page_with_tables(page)
    if wanted == page:
        return 0
    if "--check" in sys.argv[1:]:
        print("the tables of docs/api.md are old: run python tools/api_table.py", file=sys.stderr)
        return 1
    PAGE.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
