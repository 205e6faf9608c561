"""One made-up checkpoint as a GPTQ int4 folder and as a Q4_K_M file: how many bytes a second each decodes on a CPU.

    python benchmarks/cpu_gptq_q4_k.py [--targets native x86-64-v3] [--threads 2 --clock perf_counter] --output FILE

The file is quantized by llama.cpp (`cpu_engines/peer.py` builds it), the folder written here: round to nearest,
symmetric, groups of 128. They are decoded in turn, each run a process of its own; by default one thread, in the time
for which it had the processor: ratios hold on a machine that others use.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import gguf_shape
import numpy as np
import torch
from cpu_engines import peer, report
from cpu_engines.session import OURS, Session, random_prompts
from safetensors.torch import save_file

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "dtype": "float16", "vocab_size": 32768,
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 12, "num_attention_heads": 16,
    "num_key_value_heads": 8, "hidden_act": "silu", "max_position_embeddings": 4096, "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0, "tie_word_embeddings": False,
}  # fmt: skip
GROUP = 128
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": False,
        "checkpoint_format": "gptq"}  # fmt: skip
F16, F32, Q4_K_M = 1, 0, 15
NAMES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip
TOP = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
       "output.weight": "lm_head.weight"}  # fmt: skip
QUANTIZE = """
import ctypes, json, sys
import llama_cpp
source, out, kind = json.loads(sys.argv[1])
params = llama_cpp.llama_model_quantize_default_params()
params.ftype = kind
assert llama_cpp.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(params)) == 0
"""
PROMPT, OUT = 64, 64


@dataclass(frozen=True)
class Stored:
    """A tensor of the file before it is quantized."""

    name: str
    values: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    @property
    def type(self) -> int:
        return F16 if self.values.dim() > 1 else F32

    @property
    def num_bytes(self) -> int:
        return self.values.numel() * (2 if self.type == F16 else 4)

    def write(self, file: BinaryIO) -> None:
        file.write(self.values.to(torch.float16 if self.type == F16 else torch.float32).numpy().tobytes())
        file.write(bytes(-self.num_bytes % 32))


def checkpoint() -> list[Stored]:
    """Tensors by the file's names: numbers as those of a model, rows of about the length 1."""
    torch.manual_seed(0)
    made = []
    for tensor in gguf_shape.tensors(CONFIG):
        if len(tensor.shape) > 1:
            values = torch.randn(tensor.shape) / tensor.shape[1] ** 0.5
        else:
            values = torch.zeros(tensor.shape) if tensor.name.endswith("bias") else torch.ones(tensor.shape)
        made.append(Stored(tensor.name, values.half().float()))
    return made


def write_folder(tensors: list[Stored], folder: Path) -> None:
    """GPTQ's layout of the layers' matrices; the rest in float16."""
    held = {}
    for tensor in tensors:
        name = TOP.get(tensor.name)
        if name is None:
            _, layer, kind, what = tensor.name.split(".")
            name = f"model.layers.{layer}.{NAMES[kind]}"
            if what == "weight" and len(tensor.shape) > 1:
                held |= {f"{name}.{part}": value for part, value in gptq(tensor.values).items()}
                continue
            name = f"{name}.{what}"
        held[name] = tensor.values.half()
    folder.mkdir()
    save_file(held, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": GPTQ}))


def gptq(values: torch.Tensor) -> dict[str, torch.Tensor]:
    rows, columns = values.shape
    grouped = values.view(rows, -1, GROUP)
    scales = (grouped.abs().amax(-1) / 7).half()
    codes = (grouped / scales.float()[..., None]).round().clamp(-8, 7).add(8).view(rows, columns)
    shifts = 4 * np.arange(8, dtype=np.uint32)
    words = (codes.T.reshape(-1, 8, rows).numpy().astype(np.uint32) << shifts[:, None]).sum(1, dtype=np.uint32)
    return {
        "qweight": torch.from_numpy(words.view(np.int32).copy()),
        "qzeros": torch.full((columns // GROUP, rows // 8), 0x77777777, dtype=torch.int32),  # 8, less one
        "scales": scales.T.contiguous(),
        "g_idx": (torch.arange(columns) // GROUP).int(),
    }


def write_file(tensors: list[Stored], path: Path, built: peer.Peer) -> None:
    """By llama.cpp, out of a file of float16."""
    source = path.with_suffix(".f16.gguf")
    with source.open("wb") as file:
        file.write(gguf_shape.header(CONFIG, tensors))
        for tensor in tensors:
            tensor.write(file)
    arguments = json.dumps([str(source), str(path), Q4_K_M])
    session = Session(built, "native", 1)
    subprocess.run([str(built.python), "-c", QUANTIZE, arguments], check=True, env=session.environment(),
                   stderr=subprocess.DEVNULL)  # fmt: skip
    source.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=peer.INSTRUCTIONS, default=["native", "x86-64-v3"])
    parser.add_argument("--activations", nargs="+", choices=["int16", "int8"], default=["int16", "int8"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=["process_time", "perf_counter"], default="process_time")
    parser.add_argument("--num-runs", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where both forms are kept; made there if they are not")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    built = peer.install("native", lambda text: print(text, flush=True))
    with tempfile.TemporaryDirectory() as scratch:
        forms = forms_in(options.folder or Path(scratch), built)
        found = [
            measured(forms, target, activations, options, built)
            for target in options.targets
            for activations in options.activations
        ]
    about = {
        "benchmark": "cpu_gptq_q4_k",
        "date": time.strftime("%Y-%m-%d"),
        "processor": report.processor(),
        "config": CONFIG,
        "num_threads": options.threads,
        "clock": options.clock,
        "num_runs": options.num_runs,
    }
    options.output.write_text(json.dumps({**about, "results": found}, indent=1) + "\n")
    print(f"written to {options.output}")


def forms_in(folder: Path, built: peer.Peer) -> dict[str, Path]:
    forms = {"GPTQ int4": folder / "gptq", "Q4_K_M": folder / "model-q4_k_m.gguf"}
    if not all(path.exists() for path in forms.values()):
        folder.mkdir(parents=True, exist_ok=True)
        tensors = checkpoint()
        write_folder(tensors, forms["GPTQ int4"])
        write_file(tensors, forms["Q4_K_M"], built)
    return forms


def measured(
    forms: dict[str, Path], target: str, activations: str, options: argparse.Namespace, built: peer.Peer
) -> dict[str, object]:
    session = Session(built, target, options.threads, options.clock, activations)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in forms}
    for index in range(options.num_runs):
        for name, path in forms.items():
            prompts = random_prompts(index, 2, PROMPT)
            runs[name].append(
                session.call(OURS, "decode", path, prompts=[[token % 32768 for token in each] for each in prompts],
                             num_out=OUT, clock=options.clock)
            )  # fmt: skip
    result: dict[str, object] = {"target": target, "activations": activations}
    rates = {}
    for name, each in runs.items():
        least = min(run["next_s"] for run in each)
        rates[name] = each[0]["bytes_per_token"] / least
        result[name] = {
            "bytes_per_token": each[0]["bytes_per_token"],
            "tokens_per_s": 1 / least,
            "bytes_per_s": rates[name],
            "median_bytes_per_s": each[0]["bytes_per_token"] / statistics.median(run["next_s"] for run in each),
        }
    result["ratio"] = rates["GPTQ int4"] / rates["Q4_K_M"]
    print(target, activations, {name: f"{rate / 1e9:.1f} GB/s" for name, rate in rates.items()}, result["ratio"])
    return result


if __name__ == "__main__":
    main()
