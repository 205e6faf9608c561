"""What does not run is found out at once, all of it, and before anything is loaded."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from ingle.config import EngineConfig, TextConfig
from ingle.engine import build, check, native_build
from ingle.engine.check import before_loading, check_model, open_model
from ingle.engine.memory import DeviceMemory
from ingle.errors import ConfigError, ModelError, Refusals
from tests.support import save_checkpoint

TOKENIZER = {"version": "1.0", "model": {"type": "BPE", "vocab": {f"<{i}>": i for i in range(256)}, "merges": []}}
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_checkpoint(tmp_path_factory.mktemp("whole"))
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "model")


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_gpu_driver_is_there", "_cuda_library_loads"):
        monkeypatch.setattr(check, name, lambda: False)


def config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def without_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")


def misshapen(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:5]
    save_file(tensors, folder / "model.safetensors")


def as_integers(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name].astype("int8")
    save_file(tensors, folder / "model.safetensors")


def a_missing_shard(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    lost = [name for name in tensors if ".layers.1." in name]
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    save_file({name: tensor for name, tensor in tensors.items() if name not in lost}, folder / shards[0])
    index = {"weight_map": {name: shards[name in lost] for name in tensors}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def no_template(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()


def broken_template(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{% do x %}"}))


def everything(folder: Path) -> None:
    config(folder, architectures=["LlamaForSequenceClassification"], logit_scale=3.0, clip_qkv=8.0)
    config(folder, quantization_config={"quant_method": "exl2", "bits": 4})
    (folder / "tokenizer.json").unlink()
    (folder / "generation_config.json").write_text("{")
    (folder / "model.safetensors").write_bytes(b"x")


Damage = Callable[[Path], object]
NO_TEMPLATE = "the model has no chat template, so /v1/chat/completions needs --chat-template"
CASES: dict[str, tuple[Damage, dict[str, Any], list[str], list[str]]] = {
    "fine": (lambda folder: None, {}, [], []),
    "no template": (no_template, {}, [], [NO_TEMPLATE]),
    "a broken template": (broken_template, {}, [], ["its own chat template cannot render|unknown tag 'do'"]),
    "a tensor is missing": (
        without_tensor, {}, [r"no tensor model.layers.1.mlp.up_proj.weight.*\(so are 1 more of its tensors\); down"],
        [],
    ),
    "a tensor of another shape": (misshapen, {}, ["model.norm.weight has shape .5,., and the configuration asks"], []),
    "integers": (as_integers, {}, ["q_proj.weight is I8, and the configuration does not say how that is"], []),
    "a shard is missing": (a_missing_shard, {}, ["it may be in model-00002-of-00002.safetensors, which is mis"], []),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), {}, ["holds neither model.safetensors"], []),
    "flags": (
        lambda folder: None,
        {"device": "cuda", "load_format": "pt", "rope_scaling": '{"rope_type": "yarn", "factor": -1}'},
        ["--device cuda: there is no driver", "--rope-scaling: rope factor is -1", "--load-format pt"],
        [],
    ),
    "cache": (lambda folder: None, {"num_gpu_blocks_override": 10**9}, ["give less with --num-gpu-blocks-over"], []),
    "all at once": (
        everything,
        {"device": "cuda", "rope_scaling": '{"rope_type": "yarn", "factor": -1}'},
        [
            "no tokenizer: tokenizer.json is missing; download",
            "generation_config.json is not valid JSON",
            "--device cuda: .*; give --device cpu",
            "--rope-scaling: rope factor is -1",
            "holds LlamaForSequenceClassification",
            "quantized by 'exl2' .*; give the model's unquantized folder",
            "logit_scale is 3.0 and clip_qkv is 8.0",
            "model.safetensors: damaged or truncated",
        ],
        [],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_all_is_found_at_once(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damage, options, refused, notices = CASES[name]
    damage(folder)
    report = check_model(EngineConfig.of("m", **{"device": "cpu", **options}), TextConfig(), folder)
    found = [str(finding) for finding in report.findings if finding.refused]
    told = [str(finding) for finding in report.findings if not finding.refused]
    for said, expected in ((found, refused), (told, notices)):
        assert len(said) == len(expected), said
        for pattern in expected:
            assert any(re.search(pattern, each) for each in said), (pattern, said)
    assert report.runs == (not refused)


def test_a_start_raises_what_the_check_finds(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    everything(folder)
    monkeypatch.setattr(build, "_ready_cpu_kernels", lambda *_: pytest.fail("kernels were touched"))
    engine = EngineConfig.of("m", device="cuda")
    with pytest.raises(Refusals) as caught:
        build.build_engine(engine, folder)
    assert len(caught.value.errors) == 5
    with pytest.raises(Refusals) as caught, before_loading(engine, folder):
        raise ModelError("no tokenizer")
    lines = caught.value.lines()
    assert lines[:2] == ["6 things do not run here:", "  - no tokenizer"] and len(lines) == 7


def test_one_thing_is_raised_as_it_stands(folder: Path) -> None:
    with pytest.raises(ConfigError, match="--device cuda") as caught:
        open_model(EngineConfig.of("m", device="cuda"), folder)
    assert len(caught.value.lines()) == 1
    with pytest.raises(ModelError, match=r"^only this$"), before_loading(EngineConfig.of("m", device="cpu"), folder):
        raise ModelError("only this")


def test_memory_that_lacks_is_known_before_anything_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (native_build, check):
        monkeypatch.setattr(module, "host_memory", lambda: DeviceMemory(100_000))
    report = check_model(EngineConfig.of("m", device="cpu"), TextConfig(), folder)
    (finding,) = report.findings
    assert finding.refused and finding.alternative is not None
    assert "the weights take 0.19 MiB, and 97.7 KiB of memory are free" in finding.what
    assert report.need is not None and report.need.free == 100_000 and report.need.total > 100_000


def test_what_a_model_needs(folder: Path) -> None:
    need = check_model(EngineConfig.of("m", device="cpu", max_model_len=64), TextConfig(), folder).need
    assert need is not None and (need.context, need.device) == (64, "cpu")
    assert need.kv_cache == 64 * 2 * 2 * 2 * 16 * 2  # tokens, sides, layers, heads, dimensions, bytes


def test_code_that_is_not_trusted_is_known_beside_flags(folder: Path) -> None:
    config(folder, model_type="of_its_own", auto_map={"AutoModelForCausalLM": "modeling.Own"})
    report = check_model(EngineConfig.of("m", device="cpu", rope_theta=5e5), TextConfig(), folder)
    found = [str(finding) for finding in report.findings]
    assert len(found) == 2
    assert "--rope-scaling and --rope-theta" in found[0] and "give --trust-remote-code" in found[1]
