"""ingle: language models on your own hardware, from a model's name to a measured, OpenAI-compatible service."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ingle.version import __version__

if TYPE_CHECKING:
    from ingle.llm import LLM
    from ingle.request import PoolingParams, RequestOutput, SamplingParams

__all__ = ["LLM", "PoolingParams", "RequestOutput", "SamplingParams", "__version__"]

_HOMES = {
    "LLM": "ingle.llm",
    "PoolingParams": "ingle.request",
    "RequestOutput": "ingle.request",
    "SamplingParams": "ingle.request",
}


def __getattr__(name: str) -> Any:
    """Names are imported on first use, so that `import ingle` costs milliseconds."""
    if name not in _HOMES:
        raise AttributeError(f"module 'ingle' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
