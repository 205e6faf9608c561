"""What tests of the model and the engine share: tiny random checkpoints, and ways to run them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ingle.config import EngineConfig
from ingle.device import Device
from ingle.device.inputs import inputs_of
from ingle.device.native.device import NativeDevice
from ingle.device.torch.device import TorchDevice
from ingle.engine.build import build_engine
from ingle.engine.engine import Engine
from ingle.engine.facts import EngineFacts
from ingle.engine.grammar import Grammars
from ingle.engine.pages import PagePool
from ingle.engine.scheduler import Scheduler
from ingle.engine.worker import Worker
from ingle.kv import longest
from ingle.request import EngineOutput, EngineRequest, SamplingParams
from ingle.step import Masks

TINY = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def save_checkpoint(folder: Path, model_type: str = "llama", *, seed: int = 0, **overrides: Any) -> Path:
    """A small random checkpoint in float32, as transformers writes it. Norm weights and biases are random too."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **{**TINY, **overrides})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                centre = "norm" in name and not model_type.startswith("gemma")  # whose norms multiply by 1 + weight
                parameter.copy_(torch.randn_like(parameter) * 0.3 + centre)
            else:
                parameter.copy_(torch.randn_like(parameter) * 0.08)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn_like(buffer) * 0.1)
    model.save_pretrained(folder)
    return folder


def reference_model(folder: Path) -> Any:
    """The checkpoint in transformers, float32, eager attention."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@torch.inference_mode()
def reference_greedy(model: Any, prompt: Sequence[int], num_tokens: int) -> list[int]:
    """Greedy tokens by transformers' forward with its own cache."""
    ids, cache, out = torch.tensor([list(prompt)]), None, []
    for _ in range(num_tokens):
        step = model(ids, past_key_values=cache, use_cache=True)
        cache = step.past_key_values
        ids = step.logits[:, -1:].argmax(-1)
        out.append(int(ids))
    return out


def engine_for(folder: Path, **options: Any) -> Engine:
    """A float32 engine on the CPU with a small KV cache."""
    config = EngineConfig.of(str(folder), **{"dtype": "float32", "device": "cpu", "kv_cache_memory": "8MiB", **options})
    return build_engine(config, folder)[0]


def restrict(engine: Engine, *, num_pages: int, overlap: bool = False, **limits: Any) -> Engine:
    """The same weights under other limits, in a new engine."""
    new = dataclasses.replace(engine.scheduler.limits, **limits)
    chunk = new.max_num_batched_tokens
    most = longest(new.windows, num_pages - 1, new.page_size, chunk, new.max_model_len)
    new = dataclasses.replace(new, max_model_len=most)
    old = engine.worker.device
    device: Device
    if isinstance(old, NativeDevice):
        device = NativeDevice(old.model, new, num_pages, old.kv.spec.dtype)
    else:
        assert isinstance(old, TorchDevice)
        device = TorchDevice(old.model, new, num_pages, old.device, old.kv_cache.spec)
    scheduler = Scheduler(PagePool(num_pages), new)
    expect_short_answers(scheduler)
    return engine_on(device, scheduler, engine.facts, overlap=overlap, grammars=engine.grammars)


def expect_short_answers(scheduler: Scheduler) -> None:
    """So that more is admitted than there are pages for in the end."""
    for _ in range(200):
        scheduler.forecast.ended(1)


def engine_on(
    device: Device,
    scheduler: Scheduler,
    facts: EngineFacts,
    *,
    overlap: bool = False,
    grammars: Grammars | None = None,
) -> Engine:
    return Engine(scheduler, Worker(device), facts, max_in_flight=2 if overlap else 1, seed=0, grammars=grammars)


def run(engine: Engine, requests: Iterable[EngineRequest]) -> dict[str, list[int]]:
    """Tokens of each request, all added before the first step; checks that nothing is left behind."""
    outputs = collect(engine, requests)
    return {name: [token for output in parts for token in output.token_ids] for name, parts in outputs.items()}


def collect(engine: Engine, requests: Iterable[EngineRequest]) -> dict[str, list[EngineOutput]]:
    outputs: dict[str, list[EngineOutput]] = {}
    for request in requests:
        engine.add(request)
        outputs[request.id] = []
    while engine.has_work:
        for output in engine.step():
            outputs[output.id].append(output)
    engine.scheduler.check()
    return outputs


def greedy(engine: Engine, prompt: Sequence[int], num_tokens: int) -> list[int]:
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    return run(engine, [EngineRequest("greedy", list(prompt), params)])["greedy"]


def random_prompt(seed: int, length: int, vocab_size: int = 256) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocab_size, (length,), generator=generator).tolist()


@torch.inference_mode()
def engine_logits(engine: Engine, prompt: Sequence[int]) -> torch.Tensor:
    """Logits [len(prompt), vocab] of one forward through the pages of an idle engine."""
    engine.add(EngineRequest("logits", list(prompt), SamplingParams(temperature=0.0, max_tokens=1)))
    plan = engine.scheduler.plan()
    assert plan is not None and plan.step.num_tokens == len(prompt), "the prompt must fit one step"
    device, running = engine.worker.device, engine.worker.forward(plan.step)
    engine.worker.sample(running, Masks())
    if isinstance(device, NativeDevice):
        logits = torch.from_numpy(device.model.logits(device.hidden(inputs_of(plan.step, len(prompt)))))
    else:
        assert isinstance(device, TorchDevice)
        logits = device.model.logits(device.model.forward(device.tables.batch_of(plan.step), device.kv_cache))
    engine.scheduler.retire(plan, engine.worker.result(running))
    return logits
