"""Every kernel that steps take can be compiled for the cards that ingle runs on, on a machine without any."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.model.checkpoints import CHECKPOINTS
from tests.model.test_gpt_oss import published
from tests.model.test_quantized import FORMATS, quantize
from tests.support import save_checkpoint

ROOT = Path(__file__).parents[2]
SIZES = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
}
pytest.importorskip("triton")


def kernels_of(capability: int, dtype: str, *folders: Path) -> set[str]:
    command = [sys.executable, "-m", "tests.kernels.compiled", str(capability), dtype, *map(str, folders)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [
        (90, "bfloat16"),
        *(
            pytest.param(*card, marks=pytest.mark.slow)
            for card in [
                (75, "float16"),
                (80, "bfloat16"),
                (86, "float16"),
                (89, "bfloat16"),
                (90, "float16"),
                (100, "bfloat16"),
                (120, "bfloat16"),
            ]
        ),
    ],
)
def test_a_dense_model(capability: int, dtype: str, tmp_path: Path) -> None:
    done = kernels_of(capability, dtype, save_checkpoint(tmp_path, "qwen2", **SIZES))
    assert {
        "_decode_hopper_kernel" if capability == 90 else "_decode_kernel",
        "_prefill_kernel",
        "_draw_kernel",
    } <= done
    assert ("_few_rows_kernel" in done) == (capability in (90, 100) and dtype == "bfloat16")


@pytest.mark.slow
@pytest.mark.parametrize("capability", [86, 90, 120])
def test_every_kind_of_layer(capability: int, tmp_path: Path) -> None:
    names = ["gemma2", "qwen2-moe-dense-between", "deepseek-v3"]
    made: list[tuple[str, dict[str, Any]]] = [CHECKPOINTS[name] for name in names]
    folders = [
        save_checkpoint(tmp_path / name, kind, **options) for name, (kind, options) in zip(names, made, strict=True)
    ]
    assert "_draw_kernel" in kernels_of(capability, "bfloat16", *folders)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 86, 90, 120])
def test_wide_heads(capability: int, tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, "gemma2", **{**SIZES, "num_hidden_layers": 2}, head_dim=256)
    decode = "_decode_hopper_kernel" if capability == 90 else "_decode_kernel"
    assert {decode, "_prefill_kernel"} <= kernels_of(capability, "bfloat16", folder)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [86, 90, 120])
def test_every_form_of_codes(capability: int, tmp_path: Path) -> None:
    plain = save_checkpoint(tmp_path / "plain", "qwen2", **SIZES)
    folders = [quantize(plain, tmp_path / name, layout) for name, layout in FORMATS.items()]
    assert any("coded" in name for name in kernels_of(capability, "bfloat16", *folders))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "dtype"), [(75, "float16"), (80, "bfloat16"), (90, "bfloat16"), (90, "float16"), (120, "bfloat16")]
)
def test_gpt_oss(capability: int, dtype: str, tmp_path: Path) -> None:
    """Sinks, and experts with biases: of MXFP4, and of floats."""
    done = kernels_of(capability, dtype, *published(tmp_path))
    assert {"_decode_kernel", "_prefill_kernel", "_expert_vector_kernel", "_experts_kernel", "_gate_up_kernel"} <= done
