"""Configuration: refused once, at the door, with what to do."""

from __future__ import annotations

from typing import Any

import pytest

from ingle.config import EngineConfig, ServerConfig, parse_bytes
from ingle.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "expected"), [("4GiB", 4 << 30), ("512m", 512 << 20), ("1.5 G", 3 << 29), ("100", 100), ("2kb", 2048)]
)
def test_sizes(text: str, expected: int) -> None:
    assert parse_bytes("--kv-cache-memory", text) == expected


@pytest.mark.parametrize(
    "options",
    [
        {"kv_cache_memory": "lots"}, {"kv_cache_memory": "0"}, {"max_model_len": 0}, {"gpu_memory_utilization": 1.5},
        {"block_size": 17}, {"tensor_parallel_size": 0}, {"pipeline_parallel_size": 0}, {"pipeline_layers": "3,0"},
        {"device": "tpu"}, {"dtype": "int8"}, {"load_format": "bin"}, {"max_model_len": "4k"},
        {"rope_theta": 0.0}, {"rope_theta": float("nan")}, {"rope_theta": float("inf")},
        {"rope_scaling": "yarn"}, {"rope_scaling": "[4.0]"}, {"rope_scaling": 4.0}, {"rope_scaling": "[" * 100_000},
        {"gpu_memory_utilization": "0.9"}, {"rope_factor": "8"}, {"rope_factor": 8.0}, {"rope_scaling": "ntk"},
    ],
)  # fmt: skip
def test_values_that_cannot_be_used_are_refused_by_their_name(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ConfigError, match=rf"^{name} "):
        EngineConfig.of("x", **options)


def test_a_port_is_a_port() -> None:
    with pytest.raises(ConfigError, match="--port 70000"):
        ServerConfig(port=70000)
