"""Variables of the environment: those of other tools, and what sets the same here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple


class Variable(NamedTuple):
    says: str
    """What to set, with `{}` for the value; or why nothing is to be set."""
    value: Callable[[str], str | None] = str
    """The value as it is here; None where nothing needs to be said."""
    changes: str = "changes nothing here"


def _address(value: str) -> str | None:
    """Ollama's host: `0.0.0.0`, `:11434`, `http://127.0.0.1:11434/`; without a port it is 11434."""
    rest = value.strip().strip("\"'").partition("://")[2] or value.strip().strip("\"'")
    host, colon, port = rest.rstrip("/").rpartition(":")
    if not colon or not port.isdecimal():
        host, port = rest.rstrip("/"), "11434"
    return f"INGLE_HOST={host or '127.0.0.1'} and INGLE_PORT={port}"


def _truthy(value: str) -> str | None:
    return value if value.lower() not in ("", "0", "false", "no", "off") else None


def _level(value: str) -> str | None:
    return {"warn": "warning", "critical": "error", "fatal": "error"}.get(value.lower(), value.lower())


def _several(value: str) -> str | None:
    return value if "," in value else None


KEYS = ("VLLM_API_KEY", "LLAMA_API_KEY")
"""Obeyed, with a notice: a server that took no notice of the key would be open to whoever reaches it, and one that
takes it where it was not meant refuses clients that have none, which is seen at once and harms nobody."""

VARIABLES: Mapping[str, Variable] = {
    "OLLAMA_HOST": Variable("set {}", _address),
    "OLLAMA_MODELS": Variable("models lie in INGLE_HOME, and Ollama's own store is not read"),
    "OLLAMA_CONTEXT_LENGTH": Variable("set INGLE_MAX_MODEL_LEN={}"),
    "OLLAMA_NUM_PARALLEL": Variable("set INGLE_MAX_NUM_SEQS={}"),
    "OLLAMA_MAX_QUEUE": Variable("set INGLE_MAX_NUM_QUEUED_REQS={}"),
    "OLLAMA_KEEP_ALIVE": Variable("a model stays loaded until its server is stopped"),
    "OLLAMA_MAX_LOADED_MODELS": Variable("a server has one model"),
    "OLLAMA_ORIGINS": Variable("set INGLE_CORS_ORIGIN={}"),
    "OLLAMA_KV_CACHE_TYPE": Variable("keys and values are not quantized yet"),
    "OLLAMA_DEBUG": Variable("set INGLE_LOG_LEVEL=debug", _truthy),
    "OLLAMA_FLASH_ATTENTION": Variable("ingle picks its kernels by itself", _truthy),
    "VLLM_USE_MODELSCOPE": Variable("set INGLE_HUB=modelscope", _truthy),
    "VLLM_LOGGING_LEVEL": Variable("set INGLE_LOG_LEVEL={}", _level),
    "VLLM_CPU_KVCACHE_SPACE": Variable("set INGLE_KV_CACHE_MEMORY={}GiB"),
    "VLLM_CPU_OMP_THREADS_BIND": Variable("set INGLE_THREADS to the number of threads"),
    "VLLM_CACHE_ROOT": Variable("what ingle keeps lies in INGLE_HOME"),
    "LLAMA_ARG_MODEL": Variable("set INGLE_MODEL={}"),
    "LLAMA_ARG_HF_REPO": Variable("set INGLE_MODEL={}"),
    "LLAMA_ARG_CTX_SIZE": Variable("set INGLE_MAX_MODEL_LEN={}"),
    "LLAMA_ARG_N_PARALLEL": Variable("set INGLE_MAX_NUM_SEQS={}"),
    "LLAMA_ARG_HOST": Variable("set INGLE_HOST={}"),
    "LLAMA_ARG_PORT": Variable("set INGLE_PORT={}"),
    "LLAMA_ARG_THREADS": Variable("set INGLE_THREADS={}"),
    "LLAMA_ARG_ALIAS": Variable("set INGLE_SERVED_MODEL_NAME={}"),
    "CUDA_VISIBLE_DEVICES": Variable("a model runs on one of them, the first", _several, "holds"),
}
"""Noticed where they are set; none but that of CUDA is obeyed."""

PREFIXES = ("VLLM_", "OLLAMA_", "LLAMA_ARG_", "SGLANG_")
"""Others of these tools change nothing here, and are named in one line."""

OURS = {"INGLE_API_KEYS", "INGLE_ADMIN_API_KEYS", "INGLE_HOME", "INGLE_CPU_TARGET", "INGLE_CONFIG", "INGLE_HUB"}
"""Beside those of the flags."""


def noticed(environment: Mapping[str, str]) -> Iterator[str]:
    """What to say of the variables of other tools that are set."""
    for name, variable in VARIABLES.items():
        if (given := environment.get(name)) and (value := variable.value(given)):
            yield f"{name}={given} {variable.changes}: {variable.says.format(value)}"
    others = [name for name in sorted(environment) if name.startswith(PREFIXES) and name not in VARIABLES]
    others = [name for name in others if name not in KEYS]
    if others:
        more = f" and {len(others) - 8} more" if len(others) > 8 else ""
        change = "changes" if len(others) == 1 else "change"
        yield f"{', '.join(others[:8])}{more} {change} nothing here"
