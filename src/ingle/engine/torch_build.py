"""Loads a model for PyTorch to run: on a GPU, by transformers' code, or where ingle's CPU kernels do not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch

from ingle import kernels
from ingle.config import EngineConfig
from ingle.device.kernel_choice import multiplies_bfloat16
from ingle.device.torch.device import TorchDevice
from ingle.engine.facts import EngineFacts
from ingle.engine.gpu_card import Card, check_card, triton_notice
from ingle.engine.memory import DeviceMemory, MemoryPlan, check_weights, kv_budget, memory_of, plan_memory
from ingle.engine.startup import Loaded, ModelFiles, Numerics, OpenModel, Startup, dtype_on_gpu
from ingle.errors import Collected, ConfigError
from ingle.kernels.cpu import library, threads
from ingle.kv import cache_dtype
from ingle.model.architecture import DecoderConfig
from ingle.model.fallback import FallbackPlan, check_length, load_fallback, plan_fallback
from ingle.model.interface import Model
from ingle.model.load import load_decoder
from ingle.model.sizes import ModelConfig, WeightSizes
from ingle.parallel.group import Member
from ingle.weights import code_types
from ingle.weights.formats import PlainFormat
from ingle.weights.matrix import total_size
from ingle.weights.quantized.rounding_source import RoundingSource

_DTYPES = {
    "half": torch.float16,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float": torch.float32,
    "float32": torch.float32,
}


class TorchRunner:
    """What is decided before a model is loaded: the device, and whether ingle's CPU kernels help."""

    def __init__(
        self, config: EngineConfig, device_type: str, *, our_kernels: bool, member: Member | None = None
    ) -> None:
        """`member`: what this process is of several, each of which loads its share."""
        self._config = config
        self._our_kernels = our_kernels
        self._member = member
        self._device = torch.device(device_type, 0) if device_type == "cuda" else torch.device("cpu")
        if member is not None:
            self._device = member.device
        self._with_triton, self._card_notices = False, list[str]()
        self._card = _card_of(self._device, member) if self._on_gpu else None
        if self._card is not None:
            self._with_triton, self._card_notices = _ready_gpu(config, self._card)
        else:
            num_ranks = 1 if member is None else member.num_beside
            torch.set_num_threads(config.parallel.threads or max(1, threads.default_count() // num_ranks))

    @property
    def _on_gpu(self) -> bool:
        return self._device.type == "cuda"

    def check(self, opened: OpenModel) -> None:
        """Raises `ConfigError` when memory lacks, as far as that is known before the weights are read."""
        numerics = self.numerics(opened)
        if opened.decoder is not None:
            self._plan(opened.decoder, numerics, numerics.weight_bytes(opened.decoder, opened.stored_types))
        else:
            num_bytes = sum(opened.stored_types.values()) * numerics.float_itemsize
            check_weights(num_bytes, memory_of(self._device), on_gpu=self._on_gpu)

    def numerics(self, opened: OpenModel) -> Numerics:
        dtype, notices = pick_dtype(self._config, opened.files.hf_config, self._card)
        numerics = self._numerics(dtype, [*self._card_notices, *notices])
        if self._keeps_blocks(opened, dtype):
            return numerics.keeping_blocks()
        return numerics

    def _keeps_blocks(self, opened: OpenModel, dtype: torch.dtype) -> bool:
        """Whether a GGUF file's blocks are multiplied as they are stored."""
        by_kernels = code_types.BLOCKS_ON_GPU and self._with_triton and dtype != torch.float32
        return by_kernels and opened.decoder is not None and opened.files.gguf is not None

    def load(self, opened: OpenModel, startup: Startup) -> tuple[Numerics, Loaded]:
        """Plans memory, reads the weights, and allocates the KV cache.

        Of a model that transformers' code runs only that code knows the sizes: there memory is planned when the weights
        are loaded.
        """
        numerics = self.numerics(opened)
        dtype = _DTYPES[numerics.dtype]
        if opened.decoder is None:
            model, memory, notices = self._load_fallback(opened, dtype, numerics, startup)
        else:
            model, memory, notices = self._load_decoder(opened, opened.decoder, dtype, numerics, startup)
        if not self._on_gpu and library.started():
            library.settle_memory()
        with startup.phase("kv_cache", "allocating the KV cache"):
            kv = model.config.kv_spec(numerics.kv_dtype)
            device = TorchDevice(
                model,
                memory.limits,
                memory.num_pages,
                self._device,
                kv,
                use_graphs=self._with_triton and not self._config.enforce_eager and self._captures_sums,
                among=self._member,
                in_halves=self._member is not None and self._member.stages is not None,
            )
        facts = EngineFacts(model.config, _sizes(model), on_gpu=self._on_gpu, kv=kv)
        name = torch.cuda.get_device_name(self._device) if self._on_gpu else "cpu"
        factors = frozenset((numerics.product_dtype,))
        return numerics, Loaded(device, name, facts, memory, opened.stored_types, factors, tuple(notices))

    def _numerics(self, dtype: torch.dtype, notices: list[str]) -> Numerics:
        ours = self._our_kernels and dtype == torch.float32
        beside = " and Triton's" if self._with_triton else " and ingle's" if ours else ""
        kv_dtype = cache_dtype(self._config.cache.kv_cache_dtype, _name(dtype))
        return Numerics.of_floats(_name(dtype), kv_dtype, f"PyTorch's{beside}", notices)

    def _plan(self, model: ModelConfig, numerics: Numerics, weight_bytes: int) -> MemoryPlan:
        free = self._memory()
        check_weights(weight_bytes, free, on_gpu=self._on_gpu)
        left = free.beside(weight_bytes)
        budget = kv_budget(self._config, model, left)
        kv = model.kv_spec(numerics.kv_dtype)
        plan = plan_memory(self._config, model, kv, on_gpu=self._on_gpu, budget=budget, free=left.free)
        return plan if self._member is None else _least(plan, self._member, kv.page_bytes(plan.limits.page_size))

    def _memory(self) -> DeviceMemory:
        """What is free now. CPUs have one memory for all ranks of a machine."""
        memory = memory_of(self._device)
        if self._member is None or self._on_gpu or memory.free is None:
            return memory
        return DeviceMemory(memory.free // self._member.num_beside)

    @property
    def _captures_sums(self) -> bool:
        """Whether a CUDA graph can hold what ranks compute together."""
        member = self._member
        groups = () if member is None else (member.group, member.stages)
        return all(group is None or group.on_devices for group in groups)

    def _load_decoder(
        self, opened: OpenModel, decoder: DecoderConfig, dtype: torch.dtype, numerics: Numerics, startup: Startup
    ) -> _LoadedModel:
        memory = self._plan(decoder, numerics, numerics.weight_bytes(decoder, opened.stored_types))
        stage = f"loading weights of {decoder.family} on {self._device}"
        with startup.phase("weights", stage):
            model = load_decoder(
                decoder,
                opened.source.on(self._device) if isinstance(opened.source, RoundingSource) else opened.source,
                matrices=PlainFormat(dtype, self._device, keeps_blocks=self._keeps_blocks(opened, dtype)),
                dtype=dtype,
                device=self._device,
                max_model_len=memory.limits.max_model_len,
                count_layers=startup.counter(stage, len(decoder.layers)),
                group=None if self._member is None else self._member.group,
                border=None if self._member is None else self._member.border(decoder.hidden_size, dtype),
            )
        return _LoadedModel(model, memory, [])

    def _load_fallback(
        self, opened: OpenModel, dtype: torch.dtype, numerics: Numerics, startup: Startup
    ) -> _LoadedModel:
        config, plan = self._config, opened.fallback or fallback_plan(self._config, opened.files)
        opened.close()  # transformers reads the files by itself
        with startup.phase("weights", f"loading weights of {plan.family} on {self._device}"):
            model, notices = load_fallback(
                plan,
                dtype=dtype,
                device=self._device,
                max_model_len=config.max_model_len,
                dummy_seed=config.seed if config.weights.load_format == "dummy" else None,
            )
        memory = self._plan(model.config, numerics, weight_bytes=0)
        return _LoadedModel(model, memory, [plan.notice, *plan.unknown_keys, *notices])


def _card_of(device: torch.device, member: Member | None) -> Card:
    """This card, or an older one of another rank, by which all go. Raises `ConfigError` if nothing runs on this one."""
    card = Card(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))
    if torch.version.hip is None:
        check_card(card, torch.cuda.get_arch_list(), torch.__version__)
    if member is not None and member.capability is not None and member.capability < card.capability:
        return Card("another rank's GPU", member.capability)
    return card


def _ready_gpu(config: EngineConfig, card: Card) -> tuple[bool, list[str]]:
    """Whether Triton's kernels run on this card, and what there is to tell."""
    wanted, notice = config.parallel.gpu_kernels, triton_notice(card)
    with_triton = wanted == "triton" or (wanted == "auto" and notice is None)
    kernels.use_triton(with_triton)
    return with_triton, [notice] if notice is not None and wanted == "auto" else []


def _least(plan: MemoryPlan, member: Member, page_bytes: int) -> MemoryPlan:
    """What all ranks have room for."""
    num_pages, max_model_len = member.least(plan.num_pages, plan.limits.max_model_len)
    if (num_pages, max_model_len) == (plan.num_pages, plan.limits.max_model_len):
        return plan
    notice = f"another of {member.place.layout.num_ranks} devices has room for {num_pages} pages, and no more"
    limits = replace(plan.limits, max_model_len=max_model_len)
    return MemoryPlan(limits, num_pages, num_pages * page_bytes, (*plan.notices, notice))


class _LoadedModel(NamedTuple):
    model: Model
    memory: MemoryPlan
    notices: list[str]


def fallback_plan(config: EngineConfig, files: ModelFiles) -> FallbackPlan:
    """How transformers' code runs it. Raises `ModelError` and `ConfigError`."""
    found, plan = Collected(), None
    with found.apart("write rope_scaling or rope_theta into its config.json"):
        if config.weights.rope_scaling is not None or config.weights.rope_theta is not None:
            raise ConfigError(
                f"--rope-scaling and --rope-theta: model_type {files.hf_config['model_type']!r} is run by "
                "transformers' code, which they do not reach"
            )
    with found.apart():
        plan = plan_fallback(files.path, files.hf_config, trust_remote_code=config.weights.trust_remote_code)
        check_length(plan, config.max_model_len)
    found.raise_any()
    assert plan is not None, "nothing was refused"
    return plan


def _sizes(model: Model) -> WeightSizes:
    head, embedding = model.head, model.embedding
    return WeightSizes(
        total=total_size(model.parameters()),
        head=total_size([head]),
        looked_up=total_size([] if embedding is head else [embedding]),
        mixture=model.mixture,
    )


def pick_dtype(config: EngineConfig, hf_config: dict[str, Any], card: Card | None) -> tuple[torch.dtype, list[str]]:
    """The type to compute in, on a GPU or a CPU, and what to tell the user about it."""
    if card is not None:
        computes_bfloat16 = card.capability >= (8, 0)
        name, notices = dtype_on_gpu(
            config.weights.dtype, hf_config.get("torch_dtype"), computes_bfloat16=computes_bfloat16
        )
        return _DTYPES[name], notices
    if config.weights.dtype != "auto":
        return _DTYPES[config.weights.dtype], []
    stored = _DTYPES.get(str(hf_config.get("torch_dtype")), torch.bfloat16)
    if multiplies_bfloat16():
        return torch.bfloat16, []
    if stored == torch.float32:
        return torch.float32, []
    return torch.float32, [f"dtype {_name(stored)} -> float32: this CPU does not multiply it natively"]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
