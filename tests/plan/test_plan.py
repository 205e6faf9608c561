"""What `ingle plan` says is what the arithmetic of the write-ups says, and what the engine then takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ingle.config import EngineConfig
from ingle.engine.build import build_engine
from ingle.engine.memory import DeviceMemory
from ingle.errors import ConfigError, ModelError
from ingle.facts import size
from ingle.plan.fit import Fit
from ingle.plan.gpus import all_gpus, find_gpu, least_of, parse_gpus
from ingle.plan.layout import Layout
from ingle.plan.machine import Machine, gpus_here, machine_of
from ingle.plan.plan import Plan, make_plan
from ingle.plan.report import as_dict, lines
from tests.cli.conftest import Run, ingle  # noqa: F401
from tests.model.checkpoints import CHECKPOINTS
from tests.support import save_checkpoint

CONFIGS = Path(__file__).parent / "configs"
SHAPES = Path(__file__).parents[2] / "benchmarks" / "shapes"
TIGERBOT, QWEN_INT4 = CONFIGS / "tigerbot-70b-chat.json", CONFIGS / "qwen-72b-chat-int4.json"
GIB = 1 << 30


def plan(path: Path, gpus: str | None, **options: object) -> Plan:
    return make_plan(path, EngineConfig.of(str(path), **options), machine_of(gpus))


def text(made: Plan, **options: object) -> str:
    name = made.outline.path.name
    return "\n".join(lines(made, name, EngineConfig.of(name, **options)))


def by_name(made: Plan) -> dict[str, Fit]:
    return {found.layout.name: found for found in made.fits}


def test_tigerbot_70b_takes_six_3090s_by_pipeline_and_eight_by_tensor_parallelism() -> None:
    made = plan(TIGERBOT, "8x24GiB")
    assert made.formats[0].name == "float16" and size(made.formats[0].num_bytes) == "129.49 GiB"
    assert made.kv.token_bytes == 2 * 80 * 8 * 128 * 2
    assert (made.least[0].by_pipeline, made.least[0].by_tensor_parallel) == (6, 8)
    fits = by_name(made)
    assert [name for name, found in fits.items() if found.fits] == [
        "TP 8",
        "PP 6",
        "PP 8",
        "TP 2 x PP 4",
        "TP 4 x PP 2",
    ]
    assert fits["TP 8"].weight_bytes == pytest.approx(129.49 / 8 * GIB, rel=0.001)
    assert fits["TP 8"].context == 4096 and fits["TP 8"].num_seqs[4096] >= 16
    said = text(made)
    assert "float16 129.49 GiB" in said and "float16 6 by pipeline, 8 by tensor parallelism" in said
    assert "to serve it: ingle serve tigerbot-70b-chat.json --tensor-parallel-size 8" in said


def test_six_gpus_do_not_divide_64_heads() -> None:
    made = plan(TIGERBOT, "3090:6")
    assert "64 heads cannot be divided among 6 ranks: TP can be 1, 2, 3, 4, 8; 6 GPUs work as PP" in text(made)
    assert not by_name(made)["TP 6"].fits and by_name(made)["PP 6"].fits
    assert by_name(plan(TIGERBOT, "3090:5"))["PP 5"].reason is not None


def test_a_longer_context_than_fits_is_refused_with_what_does() -> None:
    made = plan(TIGERBOT, "3090:6", max_model_len=4096)
    reason = by_name(made)["PP 6"].reason
    assert reason is not None and reason.endswith("of the 4096 tokens that are asked for")
    assert by_name(made)["TP 2 x PP 3"].fits


def test_qwen_72b_int4_on_two_v100s() -> None:
    made = plan(QWEN_INT4, "2x32GiB")
    (stored, *_) = made.formats
    assert stored.num_bytes == pytest.approx(41.2e9, rel=0.01)  # 69.8 B numbers of 4.16 bits, 2.5 B of 16
    assert made.kv.token_bytes == 2 * 80 * 64 * 128 * 2
    split = by_name(made)["TP 2"]
    assert split.fits and 4096 <= split.context < 6000 and split.num_seqs[1024] == 4
    assert split.longest > split.context
    assert not by_name(made)["1 GPU"].fits
    assert split.refusal is None


@pytest.mark.parametrize(
    ("shape", "gpus", "runs"),
    [
        ("qwen2-7b", "3090", True),
        ("qwen2-7b", "2x12GiB", True),
        ("qwen3-0.6b", "t4", True),
        ("gemma2-9b", "a10", True),
    ],
)
def test_what_runs_today_is_said(shape: str, gpus: str, runs: bool) -> None:
    made = plan(SHAPES / shape, gpus)
    best = made.best
    assert best is not None and best.fits and (best.refusal is None) == runs
    command = text(made).splitlines()[-1]
    assert command.startswith("to serve it: ingle serve" if runs else "once it runs: ingle serve")


def test_an_old_card_computes_float16() -> None:
    made = plan(SHAPES / "qwen2-7b", "v100-32")
    assert made.kv.dtype == "float16" and any("does not compute bfloat16" in notice for notice in made.notices)
    assert plan(SHAPES / "qwen2-7b", "4090").kv.dtype == "bfloat16"


def test_what_is_kept_below_the_device_is_counted_in_tokens() -> None:
    options = {"host_cache": "8GiB", "disk_cache": "/var/cache/ingle"}
    found = text(plan(TIGERBOT, "3090:8", **options), **options)
    assert "prompt cache 8.00 GiB of host memory: the prefixes of 26,214 tokens" in found
    assert "prompt cache 16.00 GiB of /var/cache/ingle: the prefixes of 52,428 tokens" in found
    assert "--host-cache 8GiB --disk-cache /var/cache/ingle" in found


def test_speeds_are_bandwidth_over_bytes() -> None:
    made = plan(SHAPES / "qwen2-7b", "h100", max_model_len=1024)
    (one,) = made.fits
    assert one.one is not None and one.many is not None
    read = 7.07e9 * 2 + 1024 * made.kv.token_bytes  # all but the embedding, once a token
    assert one.one.tokens_per_s == pytest.approx(3352e9 / read, rel=0.01)
    assert one.many.num_seqs == one.num_seqs[1024] > 100
    assert one.many.tokens_per_s > 20 * one.one.tokens_per_s
    four = by_name(plan(SHAPES / "qwen2-7b", "4xh100", max_model_len=1024))["TP 4"]
    assert four.one is not None and four.one.tokens_per_s == pytest.approx(4 * one.one.tokens_per_s, rel=0.01)


def test_a_mixture_reads_its_experts() -> None:
    made = plan(SHAPES / "qwen3-30b-a3b", "h100", max_model_len=1024)
    (found,) = made.fits
    assert found.one is not None and found.one.tokens_per_s > 400  # of 30 B parameters it reads 3


def test_sizes_of_tensor_parallelism(tmp_path: Path) -> None:
    """Also those that cut groups of weights, as Qwen1.5-32B's 27392 columns by 8 do, on which guides run aground."""
    config = json.loads(QWEN_INT4.read_text()) | {"intermediate_size": 2 * 27392}
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    made = plan(file, "8x80GiB")
    assert made.tensor_parallel_sizes == (1, 2, 3, 4, 5, 6, 7, 8)
    made = plan(TIGERBOT, "16x24GiB")  # 8 heads of keys, held twice
    assert made.tensor_parallel_sizes == (1, 2, 3, 4, 8, 16) and by_name(made)["TP 16"].fits


@pytest.mark.parametrize("name", ["gqa", "tied", "gemma3", "qwen2-moe", "deepseek-v2", "mistral-window"])
def test_a_plan_on_the_cpu_is_what_the_engine_takes(name: str, tmp_path: Path) -> None:
    model_type, overrides = CHECKPOINTS[name]
    sizes = {**overrides, **({"moe_intermediate_size": 64} if "moe_intermediate_size" in overrides else {})}
    sizes |= {
        key: 32 for key in ("qk_nope_head_dim", "v_head_dim", "qk_rope_head_dim", "q_lora_rank") if sizes.get(key)
    }
    folder = save_checkpoint(tmp_path, model_type, **{**sizes, "hidden_size": 256, "intermediate_size": 512})
    config = EngineConfig.of(str(folder), device="cpu", kv_cache_memory="8MiB")
    found = by_name(make_plan(folder, config, machine_of("cpu")))["CPU"]
    _, info = build_engine(config, folder)
    if info.kernels.startswith("PyTorch"):
        pytest.skip("PyTorch's operators run here, and hold other types")
    assert found.weight_bytes == pytest.approx(info.weight_bytes, rel=0.03)
    assert found.kv_cache_bytes == info.kv_cache_bytes
    assert found.context == info.max_model_len


@pytest.mark.parametrize("options", [{}, {"dtype": "float32"}, {"kv_cache_memory": "64MiB", "max_model_len": 2048}])
def test_a_plan_of_the_default_model_is_what_the_engine_takes(smollm2_gguf: Path, options: dict[str, object]) -> None:
    config = EngineConfig.of(str(smollm2_gguf), device="cpu", **options)
    found = by_name(make_plan(smollm2_gguf, config, machine_of("cpu")))["CPU"]
    _, info = build_engine(config, smollm2_gguf)
    if info.kernels.startswith("PyTorch"):
        pytest.skip("PyTorch's operators run here, and hold other types")
    assert found.weight_bytes == pytest.approx(info.weight_bytes, rel=0.03)
    assert found.kv_cache_bytes == pytest.approx(info.kv_cache_bytes, rel=0.03)
    assert found.context == info.max_model_len


_TAKES = """
import json, sys
from pathlib import Path
from ingle.config import EngineConfig
from ingle.engine.build import build_engine
path = Path(sys.argv[1])
_, info = build_engine(EngineConfig.of(str(path), load_format="dummy", **json.loads(sys.argv[2])), path)
print(json.dumps([info.weight_bytes, info.kv_cache_bytes, info.max_model_len]))
"""


@pytest.mark.gpu
@pytest.mark.parametrize("shape", ["qwen3-0.6b", "qwen2-7b"])
@pytest.mark.parametrize("options", [{}, {"max_model_len": 4096, "max_num_seqs": 64, "gpu_memory_utilization": 0.5}])
def test_a_plan_on_the_gpu_is_what_the_engine_takes(shape: str, options: dict[str, object]) -> None:
    """In a process of its own: whatever this one holds of the GPU is part of what is not free."""
    path = SHAPES / shape
    found = by_name(make_plan(path, EngineConfig.of(str(path), load_format="dummy", **options), machine_of(None)))
    command = [sys.executable, "-c", _TAKES, str(path), json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=200)
    weights, kv_cache, context = json.loads(done.stdout.splitlines()[-1])
    planned = found["1 GPU"]
    print(f"{shape} {options}: planned {planned.weight_bytes} {planned.kv_cache_bytes}, taken {weights} {kv_cache}")
    assert planned.weight_bytes == pytest.approx(weights, rel=0.03)
    assert planned.kv_cache_bytes == pytest.approx(kv_cache, rel=0.03)
    assert planned.context == context


def test_files_are_looked_at_and_not_read(tmp_path: Path) -> None:
    """Weight files of which only headers and beginnings of tensors are there say as much as whole ones."""
    folder = save_checkpoint(tmp_path, tie_word_embeddings=False, vocab_size=2048)
    file = folder / "model.safetensors"
    whole = plan(folder, "24GiB")
    contents = file.read_bytes()
    begin = 8 + int.from_bytes(contents[:8], "little")
    offsets = [entry["data_offsets"][0] for name, entry in json.loads(contents[8:begin]).items() if "weight" in name]
    file.unlink()
    with file.open("wb") as sparse:
        sparse.write(contents[:begin])
        for offset in offsets:
            sparse.seek(begin + offset)
            sparse.write(contents[begin + offset :][:4096])
        sparse.truncate(len(contents))
    if file.stat().st_blocks * 512 >= len(contents) // 2:
        pytest.skip("this file system keeps no holes")
    assert plan(folder, "24GiB").outline == whole.outline
    assert whole.outline.stored_bytes == len(contents) and not whole.outline.decoder.tied_embeddings


def test_bin_folders_are_sized_by_their_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((SHAPES / "qwen3-0.6b" / "config.json").read_text())
    size_of_model = 2 * 596_049_920
    for index in (1, 2):
        with (tmp_path / f"pytorch_model-0000{index}-of-00002.bin").open("wb") as file:
            file.truncate(size_of_model // 2)
    made = plan(tmp_path, "24GiB")
    assert made.outline.stored_bytes == size_of_model and list(made.outline.stored_types) == ["BF16"]


def test_gptq_files_say_what_they_take(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(QWEN_INT4.read_text())
    with (tmp_path / "pytorch_model.bin").open("wb") as file:
        file.truncate(42_000_000_000)
    made = plan(tmp_path, "a100")
    assert made.best is not None and made.best.weight_bytes == pytest.approx(42_000_000_000, rel=0.001)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "vocab_size": 50257},
         "none of ingle's families"),
        ({"model_type": "some_vl", "text_config": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                                                   "intermediate_size": 128, "vocab_size": 500}}, "none of ingle's"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"], "hidden_size": 768, "num_hidden_layers": 12,
          "num_attention_heads": 12, "intermediate_size": 3072, "vocab_size": 30522}, "an encoder, which fills in"),
    ],
)  # fmt: skip
def test_other_models_are_estimated_and_said_to_be(config: dict[str, object], says: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    made = plan(file, "24GiB")
    assert says in text(made) and made.outline.num_parameters > 0


def test_what_is_no_decoder_is_refused_in_a_line(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"model_type": "resnet"}')
    with pytest.raises(ModelError, match="hidden_size"):
        plan(file, "24GiB")


@pytest.mark.parametrize(
    ("written", "count", "memory_gib", "name"),
    [
        ("8x24GiB", 8, 24, "GPU of 24.00 GiB"),
        ("24G", 1, 24, "GPU of 24.00 GiB"),
        ("3090:8", 8, 24, "RTX 3090"),
        ("3090x8", 8, 24, "RTX 3090"),
        ("8 x RTX 3090", 8, 24, "RTX 3090"),
        ("h100", 1, 79.6, "H100 SXM"),
        ("2xV100-32GB", 2, 32, "Tesla V100 32GB"),
        ("V100-32G:2", 2, 32, "Tesla V100 32GB"),
        ("4*a100-40g", 4, 40, "A100 40GB"),
        ("NVIDIA A100-SXM4-80GB", 1, 80, "A100 SXM 80GB"),
        ("NVIDIA H100 80GB HBM3", 1, 79.6, "H100 SXM"),
        ("Tesla V100-SXM2-32GB", 1, 32, "Tesla V100 32GB"),
        ("NVIDIA GeForce RTX 4060 Ti", 1, 8, "RTX 4060 Ti 8GB"),
        ("NVIDIA RTX 6000 Ada Generation", 1, 48, "RTX 6000 Ada"),
        ("NVIDIA A10G", 1, 22.5, "A10G"),
        ("Quadro RTX 8000", 1, 48, "Quadro RTX 8000"),
        ("3090:2,v100-32:1", 3, 24, "the least of RTX 3090 and Tesla V100 32GB"),
    ],
)
def test_gpus_as_people_write_them(written: str, count: int, memory_gib: float, name: str) -> None:
    gpus = parse_gpus(written)
    assert (len(gpus), least_of(gpus).name) == (count, name)
    assert least_of(gpus).memory_bytes / GIB == pytest.approx(memory_gib, rel=0.01)


@pytest.mark.parametrize(
    ("written", "says"),
    [("3o90:4", "there is RTX 3090"), ("0x24GiB", "0 GPUs"), ("RTX 3060 8GB", "not in ingle's table"), ("", "such as"),
     ("8x", "such as"), ("2000000x24GiB", "such as"), ("many", "such as 3090:8"), ("24GiB,", "such as")],
)  # fmt: skip
def test_what_are_no_gpus_is_told_how_to_write_them(written: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_gpus(written)


def test_the_table_of_gpus_is_plausible() -> None:
    for gpu in all_gpus():
        assert gpu.bytes_per_s is not None and gpu.flops_per_s is not None and gpu.source
        assert 5 < gpu.memory_bytes / GIB < 300 and 100e9 < gpu.bytes_per_s < 10e12 and 5e12 < gpu.flops_per_s < 3e15
        assert find_gpu(gpu.name) is gpu


def test_this_machines_gpus_are_read_from_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(
        '#!/bin/sh\necho "NVIDIA GeForce RTX 3090, 24576, 24100, 8.6"\n'
        'echo "NVIDIA GeForce RTX 3090, 24576, 3000, 8.6"\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert [(gpu.capability, gpu.free_bytes) for gpu in gpus_here()] == [((8, 6), 24100 << 20), ((8, 6), 3000 << 20)]
    machine = machine_of(None)
    assert machine.num_gpus == 2 and machine.gpu is not None and machine.gpu.free_bytes == 3000 << 20
    found = by_name(plan(SHAPES / "qwen2-7b", None))["1 GPU"]
    assert found.reason is not None and "2.43 GiB are free" in found.reason
    program.write_text("#!/bin/sh\nexit 9\n")
    assert gpus_here() == ()


def test_memory_beside_the_weights_is_what_counts() -> None:
    machine = Machine(0, None, DeviceMemory(4 * GIB), None, is_here=True)
    config = EngineConfig.of("x", device="cpu", max_model_len=32768)
    found = make_plan(SHAPES / "qwen2-7b", config, machine).fits[-1]
    assert found.layout == Layout(on_cpu=True) and "14.19 GiB" in (found.reason or "")


def test_json_has_what_the_text_has(ingle: Run) -> None:  # noqa: F811
    result = ingle("plan", str(TIGERBOT), "--gpus", "8x24GiB", "--json")
    assert result.code == 0
    said = json.loads(result.out)
    assert said["least_gpus"][0] == {"held": "float16", "by_tensor_parallel": 8, "by_pipeline": 6}
    assert said["layouts"][0]["reason"].startswith("its weights take 129.49 GiB")
    assert said["command"].startswith(f"ingle serve {TIGERBOT}") and said["runs"]
    assert said == json.loads(
        json.dumps(as_dict(plan(TIGERBOT, "8x24GiB"), str(TIGERBOT), EngineConfig(str(TIGERBOT))))
    )


def test_the_command_has_what_was_given(ingle: Run) -> None:  # noqa: F811
    shape = str(SHAPES / "qwen2-7b")
    result = ingle("plan", shape, "--gpus", "3090", "--max-model-len", "8K", "--dtype", "half")
    assert result.out.splitlines()[-1] == f"to serve it: ingle serve {shape} --max-model-len 8192 --dtype half"
    assert "int4" in ingle("plan", shape, "--gpus", "8GiB", "--weights", "int4").out
    assert ingle("plan", shape, "--gpus", "4GiB").out.splitlines()[-1].startswith("nothing of this fits: ")
    assert ingle("plan", shape, "--device", "cuda", "--gpus", "cpu").err.startswith("ingle: --device cuda: there is no")
    assert ingle("plan", shape, "--device", "cpu", "--gpus", "3090").err.startswith("ingle: --device cpu: --gpus names")


def test_what_fits_one_gpu_serves_most_as_replicas() -> None:
    shape = SHAPES / "qwen2-7b"
    said = text(plan(shape, "24GiB:4", max_model_len=4096), max_model_len=4096)
    assert "for most requests a second: ingle serve qwen2-7b --max-model-len 4096 --data-parallel-size 4" in said
    assert "data-parallel" not in text(plan(shape, "24GiB"))
    assert "data-parallel" not in text(plan(TIGERBOT, "8x24GiB")), "which does not fit one"


def test_the_layout_that_is_asked_for() -> None:
    asked = {"tensor_parallel_size": 4, "pipeline_parallel_size": 2}
    made = plan(TIGERBOT, "8x24GiB", **asked)
    assert [each.layout.name for each in made.fits] == ["TP 4 x PP 2"]
    assert text(made, **asked).count("--tensor-parallel-size 4 --pipeline-parallel-size 2") == 1
    auto = plan(TIGERBOT, "6x24GiB", tensor_parallel_size="auto")
    assert [each.layout.name for each in auto.fits] == ["TP 4"]
    with pytest.raises(ConfigError, match="TP 4 x PP 2 takes 8 GPUs, and there are 4"):
        plan(TIGERBOT, "4x24GiB", **asked)
