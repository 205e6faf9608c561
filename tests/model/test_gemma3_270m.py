"""Gemma 3 270M in Q4_K_M: a real file with K-quants, SentencePiece and windows, against transformers on that file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from ingle.device.torch.device import TorchDevice
from ingle.engine import torch_build
from ingle.engine.engine import Engine
from ingle.request import EngineRequest, SamplingParams
from ingle.text.load import load_tokenizer
from ingle.text.tokenizer import Tokenizer
from ingle.weights.dequantize import dequantize_into
from ingle.weights.gguf import GgufFile
from tests.support import engine_for, engine_logits, random_prompt, run
from tests.text import corpora

pytestmark = [pytest.mark.weights, pytest.mark.timeout(900)]

WINDOW = 512
PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n    ",
    "法国的首都是",
    "Die Hauptstadt von Deutschland ist",
    "1, 2, 3, 4, 5,",
]


@pytest.fixture(scope="module", params=["auto", "torch"])
def engine(request: pytest.FixtureRequest, gemma3_gguf: Path) -> Engine:
    """In float32, by ingle's kernels and by PyTorch's operators."""
    limits = {"kv_cache_memory": "256MiB", "max_model_len": 2048, "max_num_batched_tokens": 2048}
    return engine_for(gemma3_gguf, cpu_kernels=request.param, **limits)


@pytest.fixture(scope="module")
def tokenizer(gemma3_gguf: Path) -> Tokenizer:
    return load_tokenizer(gemma3_gguf)


@pytest.fixture(scope="module")
def reference(gemma3_gguf: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        gemma3_gguf.parent, gguf_file=gemma3_gguf.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def test_blocks_are_decoded_as_by_the_reference(gemma3_gguf: Path) -> None:
    ours = GgufFile(gemma3_gguf)
    assert {"Q4_K", "Q6_K", "Q5_0", "Q8_0"} <= set(ours.parameters_by_type)
    for stored in gguf.GGUFReader(gemma3_gguf).tensors:
        tensor = ours.tensors[stored.name]
        if tensor.num_elements < 1 << 21:
            out = torch.empty(tensor.shape)
            dequantize_into(tensor, out)
            np.testing.assert_array_equal(out.numpy(), gguf.dequantize(stored.data, stored.tensor_type))


def test_vocabulary_is_that_of_transformers(gemma3_gguf: Path, tokenizer: Tokenizer) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(gemma3_gguf.parent, gguf_file=gemma3_gguf.name)
    for text in corpora.texts(count=1000):
        token_ids = tokenizer.encode(text)
        assert token_ids == theirs(text)["input_ids"], repr(text)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids, tokenizer.chat_template) == (2, (1,), None)
    assert tokenizer.encode("<start_of_turn>user\n  Hi<end_of_turn>\n") == [2, 105, 2364, 107, 138, 10979, 106, 107]


def test_greedy_text_is_sensible_and_that_of_transformers(engine: Engine, tokenizer: Tokenizer, reference: Any) -> None:
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    prompts.append(random_prompt(0, WINDOW + 90, vocab_size=262144))  # longer than the window of most layers
    params = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)
    answers = run(engine, [EngineRequest(str(i), prompt, params) for i, prompt in enumerate(prompts)])
    for i, prompt in enumerate(prompts):
        with torch.inference_mode():
            logits = reference(torch.tensor([prompt + answers[str(i)]])).logits[0, len(prompt) - 1 : -1]
        assert answers[str(i)] == logits.argmax(-1).tolist(), f"prompt {i}"
    assert "France" in tokenizer.decode(answers["0"])
    assert tokenizer.decode(answers["5"]).startswith(" 6, 7, 8, 9, 10")


def test_logits_are_those_of_transformers_beyond_the_window(
    engine: Engine, tokenizer: Tokenizer, reference: Any
) -> None:
    prompt = tokenizer.encode("".join(corpora.SENTENCES))
    assert len(prompt) > WINDOW
    with torch.inference_mode():
        expected = reference(torch.tensor([prompt])).logits[0]
    # Of 156 million logits, as large as 95, float32 moves the worst by 1.5e-4 in transformers' order of sums and by
    # 2.6e-4 in ours, both against float64; the means are 5.5e-6 and 6.3e-6. That is of PyTorch's products; those of
    # ingle's kernels add up each number in one register, in another order.
    ours = engine_logits(engine, prompt)
    torch.testing.assert_close(ours, expected, atol=4e-4, rtol=0)
    assert (ours - expected).abs().mean() < (1e-5 if isinstance(engine.worker.device, TorchDevice) else 2e-5)


def test_blocks_that_stay_blocks_as_on_a_gpu(gemma3_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits of the decoded file; and no more memory than the file has, but a tenth."""
    options, prompt = {"cpu_kernels": "torch", "max_model_len": 256}, random_prompt(0, 24, vocab_size=262144)
    expected = engine_logits(engine_for(gemma3_gguf, **options), prompt)
    monkeypatch.setattr(torch_build.TorchRunner, "_keeps_blocks", lambda *_: True)
    engine = engine_for(gemma3_gguf, **options)
    torch.testing.assert_close(engine_logits(engine, prompt), expected, atol=4e-4, rtol=0)
    stored = sum(tensor.nbytes for tensor in GgufFile(gemma3_gguf).tensors.values())
    assert engine.facts.weights.total[1] < 1.1 * stored
