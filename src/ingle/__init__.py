"""ingle: language models on your own hardware, from a model's name to a measured, OpenAI-compatible service."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ingle.version import __version__

if TYPE_CHECKING:
    from ingle.llm import LLM
    from ingle.request import RequestOutput, SamplingParams
    from ingle.structured import StructuredOutputs

__all__ = ["LLM", "RequestOutput", "SamplingParams", "StructuredOutputs", "__version__"]

_HOMES = {
    "LLM": "ingle.llm",
    "SamplingParams": "ingle.request",
    "RequestOutput": "ingle.request",
    "StructuredOutputs": "ingle.structured",
}
_ALSO = {"StructuredOutputsParams": "StructuredOutputs", "GuidedDecodingParams": "StructuredOutputs"}
"""What vLLM calls them, or has called them."""


def __getattr__(name: str) -> Any:
    """Names are imported on first use, so that `import ingle` costs milliseconds."""
    name = _ALSO.get(name, name)
    if name not in _HOMES:
        raise AttributeError(f"module 'ingle' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
