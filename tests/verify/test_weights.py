"""Quantized files are worth what their numbers are: perplexity of real weights, and the memory that they take."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ingle.config import EngineConfig
from ingle.text.load import load_tokenizer
from ingle.verify.prompts import PASSAGE
from ingle.verify.reference import reference_for
from ingle.verify.scores import perplexity, score_by_engine
from tests.support import engine_for

pytestmark = [pytest.mark.weights, pytest.mark.timeout(900)]
WINDOW, NUM_WINDOWS = 500, 8

_MEASURED = """
import json, sys
from pathlib import Path
from ingle.config import EngineConfig
from ingle.engine.build import build_engine
from ingle.kernels.cpu import library
import ingle.engine.native_build

def anonymous():
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024

assert library.start(2) is None
before = anonymous()
path = Path(sys.argv[1])
limits = {"max_model_len": 64, "max_num_seqs": 1, "num_gpu_blocks_override": 16}
config = EngineConfig.of(str(path), device="cpu", threads=2, **limits)
engine, info = build_engine(config, path)
print(json.dumps([anonymous() - before, info.weight_bytes]))
"""


@pytest.fixture(params=["smollm2_gguf", "gemma3_gguf"])
def model(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


def test_perplexity_is_that_of_the_decoded_model(model: Path) -> None:
    """Of transformers' code in float32, over 4,000 tokens of a text."""
    tokens = load_tokenizer(model).encode(PASSAGE.read_text(encoding="utf-8"))[: WINDOW * NUM_WINDOWS]
    assert len(tokens) == WINDOW * NUM_WINDOWS
    windows = [tokens[start : start + WINDOW] for start in range(0, len(tokens), WINDOW)]
    engine = engine_for(model, dtype="auto", max_model_len=WINDOW + 8, kv_cache_memory="256MiB")
    ours = perplexity(score_by_engine(engine, windows))
    del engine
    reference = reference_for(EngineConfig.of(str(model)), model, torch.device("cpu"))
    right = perplexity(reference.score(torch.float32, windows, lambda stage: None))
    assert ours == pytest.approx(right, rel=0.005)


def test_memory_is_the_files_size(model: Path) -> None:
    """What the process takes more once the model is there: its weights, and next to nothing else."""
    run = [sys.executable, "-c", _MEASURED, str(model)]
    resident, weights = json.loads(subprocess.run(run, check=True, capture_output=True, text=True).stdout)
    file = model.stat().st_size
    assert 0.9 * file < weights < 1.1 * file
    assert resident < 1.1 * file + (8 << 20)
