from __future__ import annotations

import sys
import types

import pytest

from ingle.config import EngineConfig, ServeConfig, ServerConfig, TextConfig
from ingle.config.access import AccessConfig
from tests.cli.conftest import Run

Calls = list[ServeConfig]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """What `run_server` was called with."""
    calls: Calls = []
    launch = types.ModuleType("ingle.server.launch")
    launch.run_server = lambda process, config: calls.append(config)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ingle.server.launch", launch)
    return calls


@pytest.mark.parametrize("argv", ["serve m", "serve --model m", "serve m --model m"])
def test_defaults_are_those_of_the_configuration(ingle: Run, calls: Calls, argv: str) -> None:
    assert ingle(*argv.split()).code == 0
    assert calls == [ServeConfig(EngineConfig.of("m"))]


VLLM = """
--max-model-len 32K --max-num-seqs 64 --max-num-batched-tokens 8k --dtype bfloat16 --host 0.0.0.0 --port 9000
--gpu-memory-utilization 0.8 --tensor-parallel-size 1 --no-enable-prefix-caching --no-trust-remote-code
--chat-template a.jinja --api-key k1 k2 --load-format dummy --seed 7 --block-size 32 --enforce-eager
--served-model-name one two
"""


@pytest.mark.parametrize("underscores", [False, True])
def test_the_flags_that_vllm_users_type(ingle: Run, calls: Calls, underscores: bool) -> None:
    words = VLLM.split()
    if underscores:
        words = [f"--{word[2:].replace('-', '_')}" if word.startswith("--") else word for word in words]
    result = ingle("serve", "m", *words)
    assert (result.code, result.err) == (0, "")
    engine = EngineConfig.of(
        "m",
        max_model_len=32768,
        max_num_seqs=64,
        max_num_batched_tokens=8000,
        dtype="bfloat16",
        gpu_memory_utilization=0.8,
        enable_prefix_caching=False,
        load_format="dummy",
        seed=7,
        block_size=32,
        enforce_eager=True,
    )
    server = ServerConfig(
        host="0.0.0.0",
        port=9000,
        served_model_name=("one", "two"),
        access=AccessConfig(api_key=("k1", "k2")),
    )
    assert calls == [ServeConfig(engine, TextConfig(chat_template="a.jinja"), server)]


def test_short_flags(ingle: Run, calls: Calls) -> None:
    assert ingle("serve", "m", "-tp", "1").code == 0
    assert ingle("serve", "m", "-tp=1", "--enable-prefix-caching").code == 0
    assert calls == [ServeConfig(EngineConfig.of("m"))] * 2
    assert ingle("serve", "m", "-q", "awq").code == 0
    assert calls[-1] == ServeConfig(EngineConfig.of("m", quantization="awq"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("", "MODEL"),
        ("a --model b", "'a'; the model was already given as --model b"),
        ("m --port 99999", "--port 99999 is not a port"),
        ("m --port http", "'http' is not a whole number"),
        ("m -tp 0", "--tensor-parallel-size 0 is too small"),
        ("m --gpu-memory-utilization nan", "--gpu-memory-utilization nan is not a share"),
        ("m --max-modle-len 4k", "did you mean --max-model-len?"),
        ("m --dtype int3", "'int3'"),
        ("m --api-key", "--api-key: a value is missing"),
        ("m --api-key --port 1", "--api-key: a value is missing"),
        ("m --api-key=", "--api-key has an empty value"),
        ("--served-model-name n m --port 1", "--served-model-name takes all words up to the next flag"),
    ],
)
def test_mistakes_never_start_a_server(ingle: Run, calls: Calls, argv: str, message: str) -> None:
    result = ingle("serve", *argv.split())
    assert (result.code, result.out, calls) == (2, "", [])
    assert message in result.err
    assert result.err.startswith("ingle: ") and result.err.count("\n") == 1
