"""Configuration: frozen values, validated once. Every command-line flag is a field here and its docstring the help."""

from __future__ import annotations

import json
import logging
import math
import re
import reprlib
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from ingle.config.access import AccessConfig, ListenConfig
from ingle.config.health import HealthConfig
from ingle.config.monitoring import MonitoringConfig
from ingle.errors import ConfigError
from ingle.limits import LimitsConfig

logger = logging.getLogger("ingle")

DType = Literal["auto", "half", "float16", "bfloat16", "float", "float32"]
LoadFormat = Literal["auto", "safetensors", "pt", "gguf", "dummy"]
Device = Literal["auto", "cpu", "cuda"]
CpuKernels = Literal["auto", "torch"]
CpuActivations = Literal["int16", "int8"]
GpuKernels = Literal["auto", "triton", "torch"]
Executor = Literal["mp", "ray"]
KvCacheDtype = Literal["auto", "float16", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2", "int8"]

MAX_REPLICAS = 64
_NAMED_SCALINGS = ("linear", "dynamic", "yarn")
_BYTES = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?b?)", re.IGNORECASE)


def parse_bytes(flag: str, text: str) -> int:
    """Bytes in `4GiB`, `512m`, `1.5 G` or a plain number. Units are powers of 1024. Raises `ConfigError`."""
    match = _BYTES.fullmatch(text.strip())
    if match is None or (value := float(match[1]) * 1024 ** " kmgt".index((match[2] or " ").lower())) < 1:
        raise ConfigError(f"{flag} {text!r} is not a size: write for instance 4GiB or 512MiB")
    return int(value)


def _at_least(field: str, value: int | None, low: int) -> None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        raise ConfigError(f"--{field.replace('_', '-')} {value!r} is not a whole number")
    if value is not None and value < low:
        raise ConfigError(f"--{field.replace('_', '-')} {value} is too small: give at least {low}")


def _number(field: str, value: object) -> None:
    if value is not None and (not isinstance(value, int | float) or isinstance(value, bool)):
        raise ConfigError(f"--{field.replace('_', '-')} {value!r} is not a number")


def _one_of(field: str, value: str, allowed: Any) -> None:
    if value not in get_args(allowed):
        raise ConfigError(f"--{field.replace('_', '-')} {value!r} is not one of {', '.join(get_args(allowed))}")


@dataclass(frozen=True)
class WeightsConfig:
    """What is loaded, and in which type it is computed."""

    dtype: DType = "auto"
    """Type of weights and activations. auto: the checkpoint's, or what this machine computes fastest."""
    load_format: LoadFormat = "auto"
    """dummy: random seeded weights from config.json alone, to measure speed without a download."""
    quantization: str | None = None
    """int4, int8 or fp8 rounds the weights of a folder of floats while they are loaded. How a quantized checkpoint is
    quantized is detected, so leave this out there; another value than its own is an error."""
    rope_scaling: str | None = None
    """Rope scaling in place of the model's own: linear, dynamic or yarn with --rope-factor, none, or JSON such as
    {"rope_type":"yarn","factor":4.0,"original_max_position_embeddings":32768}."""
    rope_factor: float | None = None
    """How many times longer the context becomes by --rope-scaling."""
    rope_theta: float | None = None
    """Base of the rotary embedding in place of the model's own."""
    trust_remote_code: bool = False
    """Let transformers import Python code from the model's folder, if it needs any. Read that code first: it can do
    whatever you can."""

    def __post_init__(self) -> None:
        _one_of("dtype", self.dtype, DType)
        _one_of("load_format", self.load_format, LoadFormat)
        _number("rope_theta", self.rope_theta)
        _number("rope_factor", self.rope_factor)
        self.rope_override()
        if self.rope_theta is not None and not 0.0 < self.rope_theta < math.inf:
            raise ConfigError(f"--rope-theta {self.rope_theta} is not a positive number")

    def rope_override(self) -> dict[str, Any] | None:
        """`rope_scaling` as the object that it is. Raises `ConfigError`; what it says, the model's reader checks."""
        if self.rope_scaling is None:
            if self.rope_factor is not None:
                raise ConfigError(
                    f"--rope-factor {self.rope_factor} needs --rope-scaling: linear, dynamic or yarn say how to stretch"
                )
            return None
        if isinstance(self.rope_scaling, str) and self.rope_scaling.strip().isalnum():
            return self._named_scaling(self.rope_scaling.strip())
        if self.rope_factor is not None:
            raise ConfigError(
                f"--rope-factor {self.rope_factor} beside --rope-scaling in JSON: write it there, as factor"
            )
        try:
            scaling = json.loads(self.rope_scaling)
        except (TypeError, ValueError, RecursionError) as error:
            raise ConfigError(f"--rope-scaling {reprlib.repr(self.rope_scaling)} is not JSON: {error}") from None
        if not isinstance(scaling, dict):
            shown = reprlib.repr(self.rope_scaling)
            raise ConfigError(
                f'--rope-scaling {shown} is not a JSON object such as {{"rope_type":"yarn","factor":4.0}}'
            )
        return scaling

    def _named_scaling(self, name: str) -> dict[str, Any]:
        """One that a name and a factor say."""
        if name.lower() in ("none", "default"):
            return {"rope_type": "default"}
        if name.lower() not in _NAMED_SCALINGS:
            raise ConfigError(
                f"--rope-scaling {name!r} is none of {', '.join(_NAMED_SCALINGS)}, which take --rope-factor, and not a "
                'JSON object such as {"rope_type":"yarn","factor":4.0}'
            )
        if self.rope_factor is None:
            raise ConfigError(f"--rope-scaling {name} needs --rope-factor: how many times longer the context becomes")
        if not 1.0 <= self.rope_factor < math.inf:
            raise ConfigError(f"--rope-factor {self.rope_factor} is not a number of 1 or more")
        return {"rope_type": name.lower(), "factor": float(self.rope_factor)}


@dataclass(frozen=True)
class CacheConfig:
    """The KV cache: how much memory it gets, and in which pages."""

    gpu_memory_utilization: float = 0.9
    """Share of the GPU's memory for weights, activations and KV cache together."""
    kv_cache_memory: str | None = None
    """Memory for the KV cache, such as 4GiB; on a CPU the default is a quarter of what is free, at most 4 GiB."""
    kv_cache_dtype: KvCacheDtype = "auto"
    """Type of cached keys and values. auto, as float16 and bfloat16: as they are computed. fp8 (which is fp8_e4m3),
    fp8_e5m2 and int8 take about half the memory, with a scale for each of a head's keys and values; int8 is the most
    exact."""
    block_size: int = 16
    """Tokens in one page of the KV cache."""
    num_gpu_blocks_override: int | None = None
    """Exact number of KV pages instead of a memory budget; for tests and experiments."""
    enable_prefix_caching: bool = True
    """Reuse the keys and values of prompt prefixes seen before."""
    host_cache: str | None = None
    """Host memory, such as 8GiB, in which prefixes are kept that the KV cache has no more room for. It outlasts a
    restart of the engine, not of the server. Default: none."""
    disk_cache: str | None = None
    """A folder in which prefixes are kept too, so that a new start finds them. Its files, which you alone can read,
    tell as much as the prompts themselves. Default: none."""
    disk_cache_size: str = "16GiB"
    """Most that --disk-cache takes, for all models together; of what is there, the least recently used goes first."""

    def __post_init__(self) -> None:
        _one_of("kv_cache_dtype", self.kv_cache_dtype, KvCacheDtype)
        _at_least("num_gpu_blocks_override", self.num_gpu_blocks_override, 1)
        _number("gpu_memory_utilization", self.gpu_memory_utilization)
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise ConfigError(
                f"--gpu-memory-utilization {self.gpu_memory_utilization} is not a share: "
                "give a number above 0 and at most 1"
            )
        if self.block_size not in (8, 16, 32, 64, 128, 256):
            raise ConfigError(f"--block-size {self.block_size} is not one of 8, 16, 32, 64, 128, 256")
        if self.kv_cache_memory is not None:
            parse_bytes("--kv-cache-memory", self.kv_cache_memory)
        if self.host_cache is not None:
            parse_bytes("--host-cache", self.host_cache)
        if self.disk_cache is not None and not self.disk_cache.strip("\0 "):
            raise ConfigError(f"--disk-cache {self.disk_cache!r} is not a folder")
        parse_bytes("--disk-cache-size", self.disk_cache_size)
        for flag, value in (("--host-cache", self.host_cache), ("--disk-cache", self.disk_cache)):
            if value is not None and not self.enable_prefix_caching:
                raise ConfigError(f"{flag} {value} keeps prefixes, and --no-enable-prefix-caching asks for none")

    @property
    def has_tiers(self) -> bool:
        """Whether prefixes are kept below the device."""
        return self.host_cache is not None or self.disk_cache is not None


@dataclass(frozen=True)
class ParallelConfig:
    """What computes: which device, how many, with which kernels."""

    device: Device = "auto"
    """auto takes a GPU when PyTorch sees one, and says which device runs."""
    threads: int | None = None
    """Threads that compute on a CPU. Default: one for each physical core, or as many as a container grants."""
    cpu_kernels: CpuKernels = "auto"
    """auto: ingle's own, compiled on first use where there is a C++ compiler; torch: PyTorch's operators."""
    cpu_activations: CpuActivations = "int16"
    """What activations are rounded to where ingle's CPU kernels multiply quantized weights. int8, with a scale for each
    32 numbers, as llama.cpp rounds, and prompts' attention in 16-bit integers: prompts are read faster, and answers are
    less exact; x86 only."""
    gpu_kernels: GpuKernels = "auto"
    """auto: ingle's own, by Triton, on cards that Triton supports; triton: on any; torch: PyTorch's operators."""
    tensor_parallel_size: int | Literal["auto"] = 1
    """GPUs that share each layer of the model, with a process each. auto: as many of those here as divide it."""
    pipeline_parallel_size: int = 1
    """GPUs, or groups of --tensor-parallel-size, among which the layers are divided. It needs less of the link between
    them than --tensor-parallel-size does, and several requests at once to keep them busy."""
    pipeline_layers: str | None = None
    """Layers of each stage of --pipeline-parallel-size, such as 13,14,13. Default: equally many bytes for each."""
    distributed_executor_backend: Executor = "mp"
    """Where those processes are. mp: on this machine; ray: on the nodes of the Ray cluster that this machine has joined
    (`pip install 'ingle[ray]'`), stages on different ones. Each node reads its own copy of the model's files."""
    data_parallel_size: int = 1
    """Engines that serve the model side by side, each with GPUs and memory of its own, or its part of a CPU. A request
    goes to the one that has its beginning cached, else to the one that has least to do."""

    def __post_init__(self) -> None:
        _one_of("device", self.device, Device)
        _one_of("cpu_kernels", self.cpu_kernels, CpuKernels)
        _one_of("cpu_activations", self.cpu_activations, CpuActivations)
        _one_of("gpu_kernels", self.gpu_kernels, GpuKernels)
        _one_of("distributed_executor_backend", self.distributed_executor_backend, Executor)
        _at_least("threads", self.threads, 1)
        if self.tensor_parallel_size != "auto":
            _at_least("tensor_parallel_size", self.tensor_parallel_size, 1)
        _at_least("pipeline_parallel_size", self.pipeline_parallel_size, 1)
        _at_least("data_parallel_size", self.data_parallel_size, 1)
        if self.data_parallel_size > MAX_REPLICAS:
            raise ConfigError(f"--data-parallel-size {self.data_parallel_size} is more than {MAX_REPLICAS} engines")
        self.layers_of_stages()

    def layers_of_stages(self) -> tuple[int, ...]:
        """`pipeline_layers` as numbers. Raises `ConfigError`."""
        if self.pipeline_layers is None:
            return ()
        counts = [word.strip() for word in str(self.pipeline_layers).split(",")]
        if not all(word.isascii() and word.isdigit() and int(word) for word in counts):
            raise ConfigError(f"--pipeline-layers {self.pipeline_layers!r} is no list of numbers such as 13,14,13")
        return tuple(map(int, counts))

    @property
    def asks_for_ranks(self) -> bool:
        """Whether several processes may share the model."""
        return self.tensor_parallel_size != 1 or self.pipeline_parallel_size != 1


@dataclass(frozen=True)
class EngineConfig:
    """What the engine runs and within which limits."""

    model: str
    """A short name (qwen3:0.6b), org/name of a hub (also org/name@revision, or org/name:Q4_K_M of a GGUF repository), a
    .gguf file or its URL, or a model's folder. --hub modelscope looks for org/name there, not at Hugging Face."""
    max_model_len: int | None = None
    """Longest sequence, prompt and answer together. Default: the model's own, cut to what KV memory holds."""
    max_num_seqs: int | None = None
    """Most sequences in one step. Default: 256 on a GPU, 64 on a CPU."""
    max_num_batched_tokens: int | None = None
    """Most tokens in one step, prompts being read in chunks. Default: 8192 on a GPU, 512 on a CPU."""
    target_itl_ms: float | None = None
    """Read prompts in portions so small that running answers get their next token about this often, in milliseconds, as
    far as that costs little speed. 0: in the largest portions, for batches that nobody watches. Default: 100 for a
    server, 0 for the other commands."""
    seed: int = 0
    """Seeds dummy weights and the draws of requests that bring no seed."""
    enforce_eager: bool = False
    """No CUDA graphs."""
    overlap: bool | None = None
    """Plan and launch the next step while this one runs. Default: on a GPU only."""
    weights: WeightsConfig = WeightsConfig()
    cache: CacheConfig = CacheConfig()
    parallel: ParallelConfig = ParallelConfig()

    def __post_init__(self) -> None:
        for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens"):
            _at_least(name, getattr(self, name), 1)
        _number("target_itl_ms", self.target_itl_ms)
        if self.target_itl_ms is not None and not 0.0 <= self.target_itl_ms <= 60_000:
            raise ConfigError(f"--target-itl-ms {self.target_itl_ms} is not between 0 and 60000")

    @classmethod
    def of(cls, model: str, **options: Any) -> EngineConfig:
        """From options of all groups by their own names, as flags are, or by those that other tools have for them.

        What of the latter changes nothing is logged as a notice. Raises `ConfigError`, which names an option as Python
        does.
        """
        own = {field.name for kind in (cls, *_GROUPS.values()) for field in fields(kind)} - {"model", *_GROUPS}
        try:
            if not options.keys() <= own:
                model, options = _translated(model, options, own)
            if "dtype" in options:
                options["dtype"] = str(options["dtype"]).removeprefix("torch.")
            if isinstance(options.get("rope_scaling"), dict):
                options["rope_scaling"] = json.dumps(options["rope_scaling"])
            groups: dict[str, Any] = {}
            for group, kind in _GROUPS.items():
                names = {field.name for field in fields(kind)} & options.keys()
                groups[group] = kind(**{name: options.pop(name) for name in names})
            return cls(model, **options, **groups)
        except ConfigError as error:
            raise ConfigError(_as_options(str(error))) from None

    def options(self) -> dict[str, Any]:
        """What `of` takes beside the model."""
        flat = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in _GROUPS}
        for group in _GROUPS:
            flat |= {field.name: getattr(getattr(self, group), field.name) for field in fields(getattr(self, group))}
        del flat["model"]
        return flat


_FLAG = re.compile(r"(?<![\w-])--([a-z][a-z-]*[a-z])")


def _translated(model: str, options: dict[str, Any], own: set[str]) -> tuple[str, dict[str, Any]]:
    """From the names of other tools. Raises `ConfigError`."""
    from ingle.habits.options import translated  # only who brings such names waits for the table

    try:
        model, options, notices = translated(model, options, own)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    for notice in notices:
        logger.warning("notice: %s", notice)
    return model, options


def _as_options(message: str) -> str:
    """What is said of flags, for somebody who gave options in Python: `max_model_len` for `--max-model-len`."""
    return _FLAG.sub(lambda flag: flag[1].replace("-", "_"), message).replace("the flag", "it")


_GROUPS = {"weights": WeightsConfig, "cache": CacheConfig, "parallel": ParallelConfig}


@dataclass(frozen=True)
class TextConfig:
    """How a conversation, or a text to be embedded or ranked, becomes a prompt: the same for every command that loads a
    model."""

    chat_template: str | None = None
    """In place of the model's own: a Jinja file, the template itself, or one that ingle brings, by name (tigerbot)."""
    merge_system: bool = False
    """Put the system message at the beginning of the first user message, for templates that take none (Gemma 2)."""
    pooling: Literal["auto", "last", "mean", "cls"] = "auto"
    """What /v1/embeddings makes a vector of: the last token's hidden state, the mean of all, or the first token's.
    auto: as the model's files say, and the last token's where they say nothing."""
    rerank_template: Literal["auto", "qwen3", "none"] = "auto"
    """The prompt in which /v1/rerank has the model judge a text. auto: as the model's files say, if they do."""
    tool_call_parser: str | None = None
    """The format in which the model calls tools, by vLLM's name: hermes, llama3_json, mistral, pythonic, qwen3_coder,
    deepseek_v3 and others; none to read no calls. Default: the one that the chat template shows."""
    reasoning_parser: str | None = None
    """The format in which the model writes its thoughts, by vLLM's name: deepseek_r1, qwen3, mistral, openai_gptoss and
    others; none to leave them in the text of the answer. Default: the one that the chat template shows."""


@dataclass(frozen=True)
class ServerConfig:
    """How the HTTP server is reached and what it calls the model."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for every interface."""
    port: int = 8000
    """Port to listen on; 0 for any free one."""
    served_model_name: tuple[str, ...] = ()
    """Names under which the API knows the model; the first is the one it answers with. Default: the model as given."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """The least grave messages that are written to stderr."""
    show_paths: bool = False
    """Report the path of the model's files as its root in /v1/models. Default: its name."""
    disable_access_log: bool = False
    """Do not log a line per HTTP request."""
    page: bool = True
    """Show browsers a page at / to talk to the model, and one of the API at /docs. --no-page: neither."""
    strict_fields: bool = False
    """Refuse requests with fields that nobody knows. Default: they are ignored, and named in the log and in the header
    `X-Ingle-Ignored-Fields` of the answer."""
    stream_interval: int = 1
    """Tokens of a streamed answer that are sent together, after the first. More leave a machine that many streams share
    more time to compute: text comes in larger pieces, and in all sooner."""
    response_store: str = "256MB"
    """Most memory for answers of /v1/responses that can be asked for again, and continued by `previous_response_id`,
    such as 1GiB; 0 keeps none. The oldest go first."""
    response_store_hours: float = 24.0
    """How long such an answer is kept at most."""

    files_dir: str | None = None
    """Folder for uploaded files and batches. Default: one of INGLE_HOME's, by the name under which the model is served:
    servers of one name on one machine share it."""
    max_files_size: str = "8GiB"
    """Most that uploaded files and batches may take together on disk; 0 takes no files."""
    health: HealthConfig = HealthConfig()  # noqa: RUF009 (frozen)
    limits: LimitsConfig = LimitsConfig()  # noqa: RUF009

    listen: ListenConfig = ListenConfig()  # noqa: RUF009 (frozen)
    access: AccessConfig = AccessConfig()  # noqa: RUF009
    monitoring: MonitoringConfig = MonitoringConfig()  # noqa: RUF009

    def __post_init__(self) -> None:
        _number("response_store_hours", self.response_store_hours)
        self.response_store_bytes()
        if not 0.0 < self.response_store_hours < math.inf:
            raise ConfigError(f"--response-store-hours {self.response_store_hours} is not a time: give hours above 0")
        if not self.host.strip():
            raise ConfigError("--host has an empty value: leave the flag out, or give 0.0.0.0 for every interface")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port {self.port} is not a port: give 1 to 65535, or 0 for any free one")
        _at_least("stream_interval", self.stream_interval, 1)
        if self.max_files_size != "0":
            parse_bytes("--max-files-size", self.max_files_size)
        if not all(name.strip() for name in self.served_model_name):
            raise ConfigError("--served-model-name has an empty value: leave the flag out, or give it one")

    def response_store_bytes(self) -> int:
        return 0 if self.response_store.strip() == "0" else parse_bytes("--response-store", self.response_store)


@dataclass(frozen=True)
class ServeConfig:
    """Serve a model behind an OpenAI-compatible HTTP API.

    A model that is not on this machine yet is pulled first. MODEL may also be given as --model MODEL.
    """

    engine: EngineConfig
    text: TextConfig = TextConfig()
    server: ServerConfig = ServerConfig()


CONFIGURATION = (
    *(EngineConfig, WeightsConfig, CacheConfig, ParallelConfig, TextConfig),
    *(ServerConfig, ListenConfig, AccessConfig, HealthConfig, MonitoringConfig, LimitsConfig),
)
"""Classes whose every field may also be set by the environment, and in a file."""
