"""Any decoder that transformers implements, by its own modelling code with ingle's paged attention plugged in.

A step's tokens go through that code as one row of a batch, each with its own position. Attention is the only place
where a decoder's tokens meet, and there each looks up the pages of its own sequence; transformers' caches and masks
are not used. Whatever a model asks of attention that the pages cannot do is refused when it is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F

from ingle import kernels, progress
from ingle.errors import ConfigError, ModelError
from ingle.kernels import reference_kv
from ingle.kernels.batch import Batch, KvCache
from ingle.kernels.group import Border
from ingle.kernels.options import AttentionOptions
from ingle.kv import KvSpec, one_group
from ingle.model.config_keys import unknown_keys
from ingle.model.registry import FAMILIES
from ingle.model.sizes import Mixture
from ingle.weights.matrix import Weight

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_ATTENTION = "ingle_paged"
_SAME = 0.02
"""Relative difference of hidden states that 16-bit products may have when a batch is in another order."""
_PAGED_LAYERS = ("full_attention", "sliding_attention")
# What modules also hand to attention and what changes nothing in it: the pages and positions are known already.
_IGNORED = frozenset((
    "position_ids", "cache_position", "position_embeddings", "use_cache", "logits_to_keep", "output_attentions",
    "output_hidden_states", "output_router_logits", "return_dict", "dropout",
))  # fmt: skip


@dataclass(frozen=True)
class FallbackConfig:
    """The sizes of a model that transformers' code runs; `DecoderConfig` says what each one is."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    windows: tuple[int | None, ...]
    max_position_embeddings: int

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def attention_elements_per_token(self) -> int:
        return 2 * (self.num_heads + self.num_kv_heads) * self.head_dim

    @property
    def mlp_elements_per_token(self) -> int:
        return 3 * self.intermediate_size

    def kv_spec(self, dtype: str) -> KvSpec:
        return KvSpec((one_group(self.windows),), sides=2, heads=self.num_kv_heads, dim=self.head_dim, dtype=dtype)


@dataclass(frozen=True)
class FallbackPlan:
    """A checkpoint that transformers can run, looked at but not loaded."""

    path: Path
    hf_config: PretrainedConfig
    model_class: type[PreTrainedModel]
    trust_remote_code: bool
    max_position_embeddings: int
    unknown_keys: tuple[str, ...] = ()
    """What to say of keys of its configuration that transformers passes over."""

    @property
    def family(self) -> str:
        return str(self.hf_config.model_type)

    @property
    def tied_embeddings(self) -> bool:
        return bool(getattr(self.hf_config.get_text_config(decoder=True), "tie_word_embeddings", False))

    @property
    def notice(self) -> str:
        """What the user should know about a model that runs this way."""
        activation = "with its activation " if self.family in FAMILIES else ""
        return (
            f"model_type {self.family!r} {activation}has no implementation of ingle's own: transformers' "
            f"{self.model_class.__name__} runs, with ingle's paged attention; slower, and without CUDA graphs"
        )


class _Step(Protocol):
    """What takes the place of a model's attention during one forward."""

    def attend(
        self,
        module: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        options: AttentionOptions,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """q and k [T, Hq, D] and [T, Hkv, D], v [T, Hkv, Dv] with Dv <= D, to [T, Hq, Dv]. sinks: [Hq]."""
        ...


_step: ContextVar[_Step] = ContextVar("step")
"""Of the forward that runs: not every module hands attention the arguments that it was given."""


@dataclass(frozen=True)
class _PagedStep:
    batch: Batch
    kv_cache: KvCache

    def attend(
        self,
        module: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        options: AttentionOptions,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        cache, batch, scales = self.kv_cache.of_layer(module.layer_idx, self.batch)
        reference_kv.store(k, F.pad(v, (0, k.shape[-1] - v.shape[-1])), cache, scales, batch.kv_places)
        of_cache = q if scales is not None else q.to(cache.dtype)
        wide = None if sinks is None else sinks.float().contiguous()
        out = kernels.paged_attention(of_cache.contiguous(), cache, batch, options, scales, wide)
        return out[..., : v.shape[-1]].to(q.dtype)


class _Probe:
    """Learns on a few tokens what each layer asks of attention, and refuses what the pages cannot do.

    Its attention lets every token see itself alone.
    """

    def __init__(self) -> None:
        self.heads: dict[int, tuple[int, int, int]] = {}
        """Of each layer: query heads, key heads, head dimension."""
        self.windows: dict[int, int | None] = {}

    def attend(
        self,
        module: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        options: AttentionOptions,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        where = f"{type(module).__name__} of layer {module.layer_idx}"
        if not getattr(module, "is_causal", True):
            raise ModelError(f"{where} attends to later tokens too: that is no decoder")
        if k.shape[:2] != v.shape[:2] or k.shape[-1] < v.shape[-1] or len(k) != len(q):
            raise ModelError(f"{where} has keys {tuple(k.shape)} that do not fit its values {tuple(v.shape)}")
        if module.layer_idx in self.heads:
            raise ModelError(f"{where} attends twice in one step, which one page table cannot hold")
        self.heads[module.layer_idx] = q.shape[1], k.shape[1], k.shape[2]
        self.windows[module.layer_idx] = options.window
        return v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)


@dataclass(frozen=True)
class TransformersModel:
    """A `Model` whose forward is transformers'."""

    config: FallbackConfig
    embedding: Weight
    head: Weight
    body: torch.nn.Module
    """The decoder without its head."""
    to_logits: PreTrainedModel
    """The class for language modelling with its decoder taken out: whatever it does to logits is done here too."""
    capturable: bool = False
    mixture: Mixture | None = None
    border: Border | None = None

    def forward(self, batch: Batch, kv_cache: KvCache) -> torch.Tensor:
        return _hidden(self.body, batch.token_ids, batch.inputs.positions, _PagedStep(batch, kv_cache))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.to_logits(inputs_embeds=hidden[None], use_cache=False).logits[0]
        return logits

    def logits_share(self, hidden: torch.Tensor) -> None:
        return None

    def parameters(self) -> Iterator[torch.Tensor]:
        yield from self.body.parameters()
        yield from self.to_logits.parameters()


def plan_fallback(path: Path, config: Mapping[str, Any], *, trust_remote_code: bool) -> FallbackPlan:
    """How transformers runs the folder at `path`, whose normalized config no family knows.

    Code from the folder is imported only with `trust_remote_code`. Raises `ModelError` when transformers has no
    decoder for it either, or one whose attention cannot be paged.
    """
    kind = config["model_type"]
    if not path.is_dir():
        raise ModelError(f"{path}: model_type {kind!r} of a .gguf file is not supported")
    hf_config = _hf_config(path, config, trust_remote_code)
    model_class = _model_class(path, hf_config, trust_remote_code)
    _check_pageable(path, hf_config.get_text_config(decoder=True), model_class)
    known = _keys_of(kind)
    told = () if known is None else tuple(unknown_keys(config, known))
    return FallbackPlan(path, hf_config, model_class, trust_remote_code, _context(hf_config), told)


def check_length(plan: FallbackPlan, max_model_len: int | None) -> None:
    """Raises `ConfigError` for a context beyond what transformers' code serves."""
    if max_model_len is not None and max_model_len > plan.max_position_embeddings:
        raise ConfigError(
            f"--max-model-len {max_model_len}: transformers' code for {plan.family} serves at most "
            f"{plan.max_position_embeddings} tokens",
            alternative="give no more",
        )


def load_fallback(
    plan: FallbackPlan,
    *,
    dtype: torch.dtype,
    device: torch.device,
    max_model_len: int | None,
    dummy_seed: int | None = None,
) -> tuple[TransformersModel, list[str]]:
    """Reads the weights, or makes random ones from `dummy_seed`. With it comes what to tell the user of the checkpoint.

    Raises `ModelError` for missing or misshapen weights.
    """
    check_length(plan, max_model_len)
    _register()
    model, notices = _made_by_transformers(plan, dtype, dummy_seed)
    model = model.to(device).eval()
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding is None or head is None:
        raise ModelError(f"{plan.path}: {plan.model_class.__name__} has no matrix of embeddings, or none of its head")
    body = _take_out_decoder(model)
    table = Weight.of(embedding.weight)
    loaded = TransformersModel(
        config=_probe(plan, body, model, device),
        embedding=table,
        head=table if head.weight is embedding.weight else Weight.of(head.weight),
        body=body,
        to_logits=model,
    )
    return loaded, notices


class _GivenStates(torch.nn.Module):
    """Stands where the decoder was, and passes on the hidden states that it made."""

    def forward(self, *_: Any, inputs_embeds: torch.Tensor, **__: Any) -> Any:
        from transformers.modeling_outputs import MoeModelOutputWithPast

        states = MoeModelOutputWithPast(last_hidden_state=inputs_embeds)
        states.cross_attentions = None  # heads of models that could also be encoder-decoders pass it on
        return states


def _keys_of(kind: str) -> set[str] | None:
    """The keys that transformers' own configuration class writes, and other names for them; None if it has no such."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if kind not in CONFIG_MAPPING:
        return None
    try:
        config = CONFIG_MAPPING[kind]()
    except Exception:  # some classes take no defaults, and then none can be told from the unknown
        return None
    text = config.get_text_config(decoder=True)
    return {*config.to_dict(), *text.to_dict(), *config.attribute_map, *text.attribute_map}


def _hf_config(path: Path, config: Mapping[str, Any], trust_remote_code: bool) -> PretrainedConfig:
    from transformers import AutoConfig, __version__
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind, auto_map = config["model_type"], config.get("auto_map")
    if kind not in CONFIG_MAPPING:
        if not isinstance(auto_map, dict):
            raise ModelError(f"{path}: model_type {kind!r} is known neither to ingle nor to transformers {__version__}")
        if not trust_remote_code:
            raise ModelError(
                f"{path}: model_type {kind!r} comes with its own code, which ingle does not run unasked: "
                "read it, and if you trust it, give --trust-remote-code"
            )
        if any("--" in str(reference) for reference in auto_map.values()):
            raise ModelError(f"{path}: auto_map names code in another repository; only the folder's own is run")
    try:
        made: PretrainedConfig = AutoConfig.from_pretrained(
            path, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:  # a configuration class may raise anything about values that it does not like
        raise ModelError(f"{path}: transformers cannot use config.json: {error}") from error
    return made


def _model_class(path: Path, hf_config: PretrainedConfig, trust_remote_code: bool) -> type[PreTrainedModel]:
    from transformers import AutoModelForCausalLM
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    known: Any = AutoModelForCausalLM._model_mapping
    found: type[PreTrainedModel]
    if type(hf_config) in known:
        found = known[type(hf_config)]
        return found
    reference = getattr(hf_config, "auto_map", {}).get("AutoModelForCausalLM")
    if trust_remote_code and reference:
        found = get_class_from_dynamic_module(reference, path, local_files_only=True)
        return found
    raise ModelError(
        f"{path}: model_type {hf_config.model_type!r} is no decoder-only language model: transformers has no "
        "AutoModelForCausalLM for it"
    )


def _check_pageable(path: Path, config: PretrainedConfig, model_class: type[PreTrainedModel]) -> None:
    """What can be known without loading; `_Probe` sees the rest."""
    name = model_class.__name__
    if config.is_encoder_decoder:
        raise ModelError(f"{path}: {name} is an encoder-decoder, and ingle runs decoders only")
    if model_class._is_stateful:
        raise ModelError(f"{path}: {name} keeps a recurrent state beside its keys and values, which pages do not hold")
    other = set(getattr(config, "layer_types", None) or ()) - set(_PAGED_LAYERS)
    if other:
        raise ModelError(f"{path}: {name} has layers of type {', '.join(sorted(other))}, which pages do not hold")


def _context(hf_config: PretrainedConfig) -> int:
    """The longest context whose rotary angles do not depend on what else is in the batch.

    transformers picks LongRoPE's factors by the longest sequence of a forward, and so for all of them.
    """
    config = hf_config.get_text_config(decoder=True)
    longest = int(getattr(config, "max_position_embeddings", None) or 2048)
    rope = getattr(config, "rope_parameters", None) or {}
    parts = [part for part in (rope, *rope.values()) if isinstance(part, dict)]
    originals = [part["original_max_position_embeddings"] for part in parts if part.get("rope_type") == "longrope"]
    return min([longest, *map(int, originals)])


def _register() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(_ATTENTION, _attention)


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query [1, Hq, T, D], key and value [1, Hkv, T, D], to [1, T, Hq, D].

    s_aux: sinks, [Hq].
    """
    if attention_mask is not None:
        raise ModelError(f"{type(module).__name__} brings a mask of its own to attention, which pages do not follow")
    for name, other in others.items():
        if other is not None and name not in _IGNORED:
            raise ModelError(f"{type(module).__name__} asks for attention with {name}, which is not done over pages")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    options = AttentionOptions(scale, sliding_window, softcap)
    progress.layer_done()
    return _step.get().attend(module, q, k, v, options, s_aux)[None], None


def _hidden(body: torch.nn.Module, token_ids: torch.Tensor, positions: torch.Tensor, step: _Step) -> torch.Tensor:
    before = _step.set(step)
    try:
        output = body(input_ids=token_ids[None], position_ids=positions[None], use_cache=False, return_dict=True)
    finally:
        _step.reset(before)
    hidden: torch.Tensor = output.last_hidden_state[0]
    return hidden


def _made_by_transformers(plan: FallbackPlan, dtype: torch.dtype, dummy_seed: int | None) -> tuple[Any, list[str]]:
    """The whole model on the CPU."""
    try:
        if dummy_seed is None:
            return _read_model(plan, dtype)
        torch.manual_seed(dummy_seed)
        plan.hf_config._attn_implementation = _ATTENTION
        from_config: Any = plan.model_class._from_config
        return from_config(plan.hf_config, dtype=dtype), []
    except ModelError:
        raise
    except Exception as error:  # transformers raises what its many models and readers raise
        message = f"{type(error).__name__}: {error}"
        raise ModelError(f"{plan.path}: transformers cannot load it with ingle's attention: {message}") from error


def _read_model(plan: FallbackPlan, dtype: torch.dtype) -> tuple[Any, list[str]]:
    """transformers itself would start at random what a checkpoint lacks, and go on.

    A head that is stored and differs from the embedding it uses, whatever the configuration says.
    """
    read: Any = plan.model_class.from_pretrained
    with quiet_transformers():
        model, report = read(
            plan.path,
            config=plan.hf_config,
            dtype=dtype,
            attn_implementation=_ATTENTION,
            local_files_only=True,
            output_loading_info=True,
        )
    missing = set(map(str, report["missing_keys"]))
    without_head = tie_missing_head(model, missing)
    for problem, keys in (("missing", missing), ("mismatched", report["mismatched_keys"])):
        if names := sorted(map(str, keys)):
            raise ModelError(f"{plan.path}: {len(names)} tensors are {problem}, such as {names[0]}")
    if without_head:
        return model, ["the checkpoint has no matrix of the head: the embedding takes its place"]
    embedding, head = (
        getattr(m, "weight", None) for m in (model.get_input_embeddings(), model.get_output_embeddings())
    )
    if embedding is not None and head is not None and embedding is not head:
        if torch.equal(embedding, head):
            model.get_output_embeddings().weight = embedding  # held once
        elif plan.tied_embeddings:
            return model, ["the configuration ties the head to the embedding; the checkpoint has one of its own: used"]
    return model, []


def tie_missing_head(model: PreTrainedModel, missing: set[str]) -> bool:
    """Has the embedding take the place of a head that is among the missing tensors, and takes it out of them."""
    embedding: Any = model.get_input_embeddings()
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    names = [name for name, module in model.named_modules() if module is head and head is not None]
    if embedding is None or not names or f"{names[0]}.weight" not in missing:
        return False
    missing.remove(f"{names[0]}.weight")
    head.weight = embedding.weight
    return True


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' progress bars."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _take_out_decoder(model: Any) -> torch.nn.Module:
    """The decoder in a class for language modelling, which is left with its head."""
    body = model.get_decoder()
    for parent in model.modules():
        for name, child in parent.named_children():
            if child is body:
                setattr(parent, name, _GivenStates())
                decoder: torch.nn.Module = body
                return decoder
    raise ModelError(f"{type(model).__name__} does not keep its decoder apart from its head")


@torch.inference_mode()
def _probe(plan: FallbackPlan, body: torch.nn.Module, head: PreTrainedModel, device: torch.device) -> FallbackConfig:
    """Runs three tokens, and learns the sizes that configurations name in many ways."""
    name, probe, rows = plan.model_class.__name__, _Probe(), torch.arange(3, device=device)
    try:
        hidden = _hidden(body, rows, rows, probe)
        backwards = _hidden(body, rows.flip(0), rows.flip(0), _Probe()).flip(0)
        vocab_size = head(inputs_embeds=hidden[None], use_cache=False).logits.shape[-1]
    except (TypeError, AttributeError, RuntimeError, ValueError) as error:
        raise ModelError(f"{plan.path}: {name} does not run as transformers' decoders usually do: {error}") from error
    if (hidden - backwards).abs().max() > _SAME * hidden.abs().max():
        raise ModelError(
            f"{plan.path}: in {name} tokens meet outside attention, too, and pages do not hold what is there"
        )
    config = plan.hf_config.get_text_config(decoder=True)
    if sorted(probe.heads) != list(range(config.num_hidden_layers)):
        raise ModelError(
            f"{plan.path}: {name} attends through ingle's pages in {len(probe.heads)} of {config.num_hidden_layers} "
            "layers; the others compute in a way of their own"
        )
    kinds = getattr(config, "layer_types", None) or []
    if any(kind == "sliding_attention" and probe.windows[layer] is None for layer, kind in enumerate(kinds)) or (
        not kinds and getattr(config, "sliding_window", None) and not any(probe.windows.values())
    ):
        raise ModelError(f"{plan.path}: {name} does not tell attention its sliding window, which pages have to know")
    if len(set(probe.heads.values())) > 1:
        raise ModelError(f"{plan.path}: layers of {name} differ in their attention heads; one cache holds one kind")
    num_heads, num_kv_heads, head_dim = probe.heads[0]
    return FallbackConfig(
        family=plan.family,
        vocab_size=vocab_size,
        hidden_size=hidden.shape[-1],
        intermediate_size=getattr(config, "intermediate_size", None) or 4 * hidden.shape[-1],
        num_layers=config.num_hidden_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        windows=tuple(probe.windows[layer] for layer in range(config.num_hidden_layers)),
        max_position_embeddings=plan.max_position_embeddings,
    )
