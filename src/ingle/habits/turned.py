"""Flags of others whose value is something else here: what each becomes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import NamedTuple


class Turned(NamedTuple):
    """What a flag with its value is here."""

    words: tuple[str, ...] = ()
    """Of our own command line."""
    implied: tuple[str, ...] = ()
    """The same, unless the command line says otherwise."""
    model: str | None = None
    """In place of the model as it was given."""
    environment: tuple[str, str] | None = None
    """A variable that this process shall see."""
    notice: str = ""
    refusal: str = ""


Turn = Callable[[str, str | None], Turned]
"""From a value, and the model if one was given."""


def _context(value: str, model: str | None) -> Turned:
    """--max-model-len; 0 is the model's own"""
    return Turned() if value == "0" else Turned(("--max-model-len", value))


def _answer(value: str, model: str | None) -> Turned:
    """--max-tokens; -1 is as many as the context holds"""
    return Turned() if value in ("-1", "-2") else Turned(("--max-tokens", value))


def _seed(value: str, model: str | None) -> Turned:
    """--seed; -1 is any"""
    return Turned() if value == "-1" else Turned(("--seed", value))


def _threads(value: str, model: str | None) -> Turned:
    """--threads; -1 and 0 are the default"""
    return Turned() if value in ("-1", "0") else Turned(("--threads", value))


def _step(value: str, model: str | None) -> Turned:
    """--max-num-batched-tokens"""
    return Turned(("--max-num-batched-tokens", value))


def _slots(value: str, model: str | None) -> Turned:
    """--max-num-seqs; each sequence may have the whole context"""
    if value in ("-1", "0"):
        return Turned()
    return Turned(
        ("--max-num-seqs", value), notice="is --max-num-seqs here, and each sequence may have the whole context"
    )


def _gpu_layers(value: str, model: str | None) -> Turned:
    """0 is --device cpu, any other number the GPU where there is one"""
    if value == "0":
        return Turned(("--device", "cpu"), notice="is --device cpu here")
    if value in ("-1", "all", "auto") or (value.isdecimal() and int(value) >= 33):
        return Turned()
    return Turned(notice="changes nothing here: all layers are on the GPU where there is one (--device cpu: none)")


def _names(value: str, model: str | None) -> Turned:
    """--served-model-name, of names between commas"""
    return Turned(("--served-model-name", *filter(None, value.split(","))))


def _llama_device(value: str, model: str | None) -> Turned:
    """--device"""
    return Turned(("--device", value.lower()))


def _host_cache_mib(value: str, model: str | None) -> Turned:
    """--host-cache, of so many MiB; 0 is none"""
    return _host_cache(value, "MiB")


def _host_cache_gib(value: str, model: str | None) -> Turned:
    """--host-cache, of so many GiB; 0 is none"""
    return _host_cache(value, "GiB")


def _host_cache(value: str, unit: str) -> Turned:
    try:
        number = float(value)
    except ValueError:
        return Turned(refusal="it is not a number")
    if number < 0:
        return Turned(refusal="the prompt cache in host memory has a limit here: --host-cache 8GiB, for instance")
    return Turned(("--host-cache", f"{value}{unit}")) if number else Turned()


def _rope_scale(value: str, model: str | None) -> Turned:
    """--rope-factor, of a linear scaling unless --rope-scaling says otherwise"""
    return Turned(("--rope-factor", value), implied=("--rope-scaling", "linear"))


def _rope_freq_scale(value: str, model: str | None) -> Turned:
    """--rope-factor, which is 1 divided by it"""
    try:
        factor = 1 / float(value)
    except (ValueError, ZeroDivisionError):
        return Turned(refusal="it is not a number above 0")
    if factor == 1:
        return Turned()
    words = ("--rope-factor", f"{factor:.6g}")
    return Turned(words, ("--rope-scaling", "linear"), notice=f"is --rope-factor {factor:.6g} here, 1 divided by it")


def _static_fraction(value: str, model: str | None) -> Turned:
    """--gpu-memory-utilization, which counts activations too"""
    notice = f"is --gpu-memory-utilization {value} here, which counts activations too: a little more may be given"
    return Turned(("--gpu-memory-utilization", value), notice=notice)


def _cache_type(value: str, model: str | None) -> Turned:
    """--kv-cache-dtype int8 for q8_0, of keys and values together; nothing for 16-bit types"""
    if value.lower() in ("auto", "f16", "fp16", "float16", "bf16", "bfloat16", "1", "30"):
        return Turned()
    if value.lower() in ("q8_0", "int8", "8"):
        notice = "is --kv-cache-dtype int8 here, for keys and values together"
        return Turned(("--kv-cache-dtype", "int8"), notice=notice)
    return Turned(refusal="keys and values take 8 bits at least: --kv-cache-dtype int8, or leave the flag out")


_ROPE_KEYS = {"rope_scaling", "rope_parameters", "rope_theta"}


_RERANKER_KEYS = {"architectures", "classifier_from_token", "is_original_qwen3_reranker", "method"}


def _overrides(value: str, model: str | None) -> Turned:
    """--rope-scaling and --rope-theta, of the rope's keys; no other can be replaced, but by --rerank-template qwen3"""
    try:
        given = json.loads(value)
    except (ValueError, RecursionError):
        given = None
    if not isinstance(given, dict):
        return Turned(refusal='it is not a JSON object, such as {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}')
    if given.get("is_original_qwen3_reranker") is True and given.keys() <= _RERANKER_KEYS:
        return Turned(("--rerank-template", "qwen3"))
    if others := sorted(map(str, given.keys() - _ROPE_KEYS)):
        return Turned(refusal=f"of a model's configuration only the rope can be replaced, not {', '.join(others)}")
    rope = given.get("rope_scaling") or given.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        return Turned(refusal="its rope scaling is not a JSON object")
    theta = rope.pop("rope_theta", given.get("rope_theta"))
    words = ("--rope-scaling", json.dumps(rope)) if rope else ()
    return Turned(words if theta is None else (*words, "--rope-theta", str(theta)))


_POOLING_KEYS = {"pooling_type", "seq_pooling_type", "type", "task", "normalize", "use_activation"}
_EMBEDS = "changes nothing here: any model answers /v1/embeddings"


def _pooler(value: str, model: str | None) -> Turned:
    """--pooling last, mean or cls, of its type"""
    try:
        given = json.loads(value)
    except (ValueError, RecursionError):
        given = None
    if not isinstance(given, dict):
        return Turned(refusal='it is not a JSON object, such as {"pooling_type": "MEAN"}: --pooling mean says the same')
    kinds = [given[key] for key in ("pooling_type", "seq_pooling_type", "type") if given.get(key) is not None]
    asks = given.get("normalize") is False or given.get("use_activation") is False
    if others := sorted(map(str, given.keys() - _POOLING_KEYS)):
        return Turned(refusal=f"of how texts are pooled only the type can be replaced, not {', '.join(others)}")
    if any(str(kind).lower() not in ("last", "mean", "cls") for kind in kinds):
        return Turned(refusal="ingle pools the last token, the mean or the first token: --pooling last, mean or cls")
    notice = "leaves out normalize, which each request may say" if asks else ""
    return Turned(("--pooling", str(kinds[0]).lower()) if kinds else (), notice=notice)


def _task(value: str, model: str | None) -> Turned:
    """Nothing: any model answers /v1/embeddings, and a reranker /v1/rerank"""
    if value.lower() in ("embed", "embedding", "pooling"):
        return Turned(notice=_EMBEDS)
    if value.lower() in ("score", "rerank"):
        return Turned(notice="changes nothing here: a reranker is told by its card, or by --rerank-template")
    if value.lower() in ("auto", "generate", "none"):
        return Turned()
    return Turned(refusal="ingle serves models that write text, make vectors of texts, or rank texts")


def _hub_cache(value: str, model: str | None) -> Turned:
    """The variable HF_HUB_CACHE: where downloads lie"""
    return Turned(environment=("HF_HUB_CACHE", value), notice=f"is HF_HUB_CACHE={value} here, for this start")


def _token(value: str, model: str | None) -> Turned:
    """The variable HF_TOKEN, which nobody else sees"""
    return Turned(
        environment=("HF_TOKEN", value), notice="is HF_TOKEN here: set that instead, as others see command lines"
    )


def _offline(value: str, model: str | None) -> Turned:
    """The variable HF_HUB_OFFLINE"""
    return Turned(environment=("HF_HUB_OFFLINE", "0" if value.lower() in ("false", "off", "0") else "1"))


def _hub(value: str, model: str | None) -> Turned:
    """The variable INGLE_HUB, huggingface or modelscope: where org/name lies"""
    if value.lower() not in ("huggingface", "hf", "modelscope", "ms"):
        return Turned(refusal="it is not a hub: give huggingface or modelscope")
    return Turned(environment=("INGLE_HUB", value))


def _revision(value: str, model: str | None) -> Turned:
    """MODEL@REVISION"""
    if model is None or value.lower() in ("none", "main") or "@" in model:
        return Turned()
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        return Turned(notice="changes nothing here: only models of a hub have revisions")
    return Turned(model=f"{model}@{value}")


def _tokenizer(value: str, model: str | None) -> Turned:
    """The model's own, always"""
    if model is None or value == model or value.lower() == "none":
        return Turned()
    if "gguf" in model.lower():
        return Turned(notice="changes nothing here: a GGUF file brings its tokenizer")
    return Turned(
        refusal="a model is served with its own tokenizer: leave the flag out, or put the other's tokenizer.json into "
        "its folder"
    )


def _model_type(value: str, model: str | None) -> Turned:
    """`ingle chat` for chat, `ingle generate` for base"""
    if value.lower() == "base":
        return Turned(notice="changes nothing here: `ingle generate MODEL PROMPT` continues a text without a template")
    return Turned()


def _concurrent_requests(value: str, model: str | None) -> Turned:
    """--max-num-queued-reqs bounds those that wait, --max-num-seqs those that run"""
    return Turned(notice="changes nothing here: --max-num-seqs bounds what runs, --max-num-queued-reqs what waits")


def _origins(value: str, model: str | None) -> Turned:
    """--cors-origin, of a JSON list, or of words between commas"""
    try:
        given = json.loads(value)
    except (ValueError, RecursionError):
        given = value.split(",")
    if not isinstance(given, list) or not all(isinstance(each, str) for each in given):
        return Turned(refusal="it is not a list of origins: --cors-origin https://chat.example.com says one")
    words = [each.strip() for each in given if each.strip()]
    return Turned(("--cors-origin", *words)) if words else Turned()


def _verbose(value: str, model: str | None) -> Turned:
    """--log-level debug"""
    return Turned() if value.lower() in ("false", "off", "0") else Turned(("--log-level", "debug"))


_BY_TURN: dict[Turn, tuple[str, str]] = {
    _context: ("=", "-c --ctx-size --n-ctx"),
    _answer: ("=", "-n --n-predict --predict"),
    _seed: ("=", "-s"),
    _threads: ("=", "-t --n-threads"),
    _step: ("=", "-b --batch-size --n-batch"),
    _slots: ("=", "-np --parallel --n-parallel"),
    _gpu_layers: ("=", "-ngl --n-gpu-layers --gpu-layers"),
    _names: ("=", "-a --alias --model-alias --model-names"),
    _llama_device: ("=", "-dev"),
    _host_cache_mib: ("=", "--cache-ram -cram"),
    _host_cache_gib: ("=", "--kv-offloading-size --hicache-size"),
    _rope_scale: ("=", "--rope-scale"),
    _rope_freq_scale: ("=", "--rope-freq-scale"),
    _static_fraction: ("=", "--mem-fraction-static"),
    _cache_type: ("=", "--cache-type-k -ctk --cache-type-v -ctv --type-k --type-v"),
    _overrides: ("=", "--hf-overrides --json-model-override-args"),
    _pooler: ("=", "--pooler-config --override-pooler-config"),
    _task: ("=", "--task --runner --convert"),
    _hub_cache: ("=", "--download-dir --cache-dir --huggingface-hub-cache --weights-cache-override"),
    _token: ("=", "--hf-token -hft"),
    _offline: ("?", "--offline"),
    _hub: ("=", "--hub"),
    _revision: ("=", "--revision"),
    _tokenizer: ("=", "--tokenizer --tokenizer-path"),
    _model_type: ("=", "--model-type"),
    _concurrent_requests: ("=", "--max-concurrent-requests"),
    _origins: ("=", "--allowed-origins --cors-allow-origin --cors-origins --cors-allow-origins"),
    _verbose: ("?", "--verbose -v --log-verbose"),
}

TURNED: dict[str, tuple[str, Turn]] = {
    name: (takes, turn) for turn, (takes, names) in _BY_TURN.items() for name in names.split()
}
"""Theirs, what follows it, and what it is here."""


def by_meaning() -> list[tuple[str, str]]:
    """What each is here, and what goes by that."""
    return [(turn.__doc__ or "", names) for turn, (_, names) in _BY_TURN.items()]
