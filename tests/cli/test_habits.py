"""What people type who come from other tools: each line does what it says, is accepted with a notice, or is answered.

A line is written as guides have it; the program in front of it is what `ingle` is typed for.
"""

# ruff: noqa: E501 (lines stand as they are typed and answered)
from __future__ import annotations

import dataclasses
import json
import re
import shlex
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from ingle.bench.cli import BENCHMARKS, hidden_of
from ingle.cli import flags as cli_flags
from ingle.cli import verify
from ingle.cli.chat import Chat
from ingle.cli.fields import Hidden, flags_of
from ingle.cli.flags import parse
from ingle.cli.generate import Generate
from ingle.cli.line import Dialect, candidates, read
from ingle.cli.local import HIDDEN
from ingle.config import EngineConfig, ServeConfig
from ingle.errors import ConfigError, IngleError, RequestError
from ingle.habits import commands, variables
from ingle.habits.flags import elsewhere, habits
from ingle.habits.near import nearest
from ingle.request import SamplingParams
from ingle.structured import StructuredOutputs
from tests.cli.conftest import Run

PROGRAMS = {
    "python -m vllm.entrypoints.openai.api_server": "serve",
    "python3 -m vllm.entrypoints.openai.api_server": "serve",
    "python -m vllm.entrypoints.api_server": "serve",
    "vllm serve": "serve",
    "vllm chat": "chat",
    "vllm bench": "bench",
    "python -m fastchat.serve.vllm_worker": "serve",
    "python -m fastchat.serve.model_worker": "serve",
    "python -m fastchat.serve.cli": "chat",
    "python3 -m llama_cpp.server": "serve",
    "llama-server": "serve",
    "./server": "serve",
    "llama-cli": "generate",
    "./main": "generate",
    "ollama": "",
    "text-generation-launcher": "serve",
    "python -m sglang.launch_server": "serve",
    "python infer.py": "chat",
    "streamlit run apps/web_demo.py --": "serve",
    "huggingface-cli": "",
    "ingle": "",
}
TARGETS: dict[str, tuple[type, Hidden]] = {
    "serve": (ServeConfig, {}),
    "chat": (Chat, HIDDEN),
    "generate": (Generate, HIDDEN),
    "verify": (verify.Verify, verify._HIDDEN),
    **{f"bench {name}": (kind, hidden_of(name)) for name, kind in BENCHMARKS.items()},
}
LOADING = [name for name, (target, hide) in TARGETS.items()
           if any(flag.owner is EngineConfig for flag in flags_of(target, hide))]  # fmt: skip
"""Commands that load a model."""


class Does(NamedTuple):
    line: str
    options: dict[str, Any]
    """What is other than by default; the model is `m` where nothing is said of it."""
    noticed: str = ""
    """The flags and variables of which a notice speaks, in order."""


class Answer(NamedTuple):
    line: str
    answer: str
    """All of it, but for the program's name before it."""


NOT_SO = (
    "a model is divided by --tensor-parallel-size and --pipeline-parallel-size, and served several times by "
    "--data-parallel-size: leave the flag out"
)
ALL_REPLICAS = "one server starts all replicas, and hands requests to them itself: give it --data-parallel-size alone"
LORA = "adapters are not applied: merge it into the model (peft's merge_and_unload) and give the result"
NOT_SPLIT = (
    "a model is not split between GPU and memory: take a smaller or a quantized .gguf file, or --device cpu"
)  # fmt: skip
YARN = '{"rope_type":"yarn","factor":4.0,"original_max_position_embeddings":32768}'

HABITS: list[Does | Answer] = [
    # ---- vLLM's server
    Does("python -m vllm.entrypoints.openai.api_server --model Qwen/Qwen2-7B-Instruct", {"model": "Qwen/Qwen2-7B-Instruct"}),
    Does("python -m vllm.entrypoints.openai.api_server --served-model-name Qwen2-7B-Instruct --model m",
         {"served_model_name": ("Qwen2-7B-Instruct",)}),
    Does("python -m vllm.entrypoints.openai.api_server --model m --host 0.0.0.0 --port 8000 --dtype half --max-model-len "
         "4096 --gpu-memory-utilization 0.95 --trust-remote-code --swap-space 16 --disable-log-requests",
         {"host": "0.0.0.0", "dtype": "half", "max_model_len": 4096, "gpu_memory_utilization": 0.95,
          "trust_remote_code": True}, "--swap-space --disable-log-requests"),
    Does("python -m vllm.entrypoints.openai.api_server --model=m --tensor-parallel-size=1 --worker-use-ray",
         {}, "--worker-use-ray"),
    Does("python3 -m vllm.entrypoints.openai.api_server --model m --max-num-batched-tokens 4096 --max-paddings 256 "
         "--engine-use-ray --ray-workers-use-nsight", {"max_num_batched_tokens": 4096},
         "--max-paddings --engine-use-ray --ray-workers-use-nsight"),
    Does("python -m vllm.entrypoints.api_server --model m --swap-space=4", {}, "--swap-space"),
    Does("vllm serve m --max_model_len 32k", {"max_model_len": 32_000}),
    Does("vllm serve m --max-model-len=4K", {"max_model_len": 4096}),
    Does("vllm serve m -tp 1", {}),
    Does("vllm serve m -tp=1 -pp=1", {}),
    Does("vllm serve m -tp 2", {"tensor_parallel_size": 2}),
    Does("vllm serve m -tp=auto", {"tensor_parallel_size": "auto"}),
    Does("vllm serve m --tensor_parallel_size 8", {"tensor_parallel_size": 8}),
    Does("vllm serve m --pipeline-parallel-size 2", {"pipeline_parallel_size": 2}),
    Does("vllm serve m -tp 2 -pp 2", {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}),
    Does("vllm serve m -dp 4", {"data_parallel_size": 4}),
    Does("vllm serve m -tp 2 --data-parallel-size=4", {"tensor_parallel_size": 2, "data_parallel_size": 4}),
    Does("python -m sglang.launch_server --model-path m --dp 2 --tp 2",
         {"model": "m", "tensor_parallel_size": 2, "data_parallel_size": 2}),
    Answer("vllm serve m -dcp 4", f"-dcp 4: {NOT_SO}"),
    Answer("vllm serve m -dp 4 --data-parallel-rank 1", f"--data-parallel-rank 1: {ALL_REPLICAS}"),
    Answer("vllm serve m -dp 4 --data-parallel-external-lb", f"--data-parallel-external-lb: {ALL_REPLICAS}"),
    Does("vllm serve m --quantization awq", {"model": "m", "quantization": "awq"}),
    Does("vllm serve m -q gptq", {"model": "m", "quantization": "gptq"}),
    Does("vllm serve m -tp 4 --quantization awq", {"tensor_parallel_size": 4, "quantization": "awq"}),
    Does("vllm serve ./m.gguf --tokenizer TinyLlama/TinyLlama-1.1B-Chat-v1.0 --quantization gguf",
         {"model": "./m.gguf", "quantization": "gguf"}, "--tokenizer"),
    Does("vllm serve m --tokenizer m --tokenizer-mode auto", {}, "--tokenizer-mode"),
    Answer("vllm serve m --tokenizer other", "--tokenizer other: a model is served with its own tokenizer: leave the flag "
           "out, or put the other's tokenizer.json into its folder"),
    Does("vllm serve m --enable-auto-tool-choice --tool-call-parser hermes", {"tool_call_parser": "hermes"},
         "--enable-auto-tool-choice"),
    Does("vllm serve m --enable-reasoning --reasoning-parser deepseek_r1", {"reasoning_parser": "deepseek_r1"},
         "--enable-reasoning"),
    Does("vllm serve m --uvicorn-log-level warning --disable-uvicorn-access-log", {"log_level": "warning",
         "disable_access_log": True}),
    Does("vllm serve m --uvicorn-log-level critical", {"log_level": "error"}),
    Does("vllm serve m --disable-log-stats --disable-log-requests --max-log-len 100",
         {"disable_log_stats": True, "max_log_len": 100}, "--disable-log-requests"),
    Does("vllm serve m --enable-log-requests --otlp-traces-endpoint http://localhost:4317",
         {"log_requests": True, "otlp_traces_endpoint": "http://localhost:4317"}),
    Does("text-generation-launcher --model-id m --json-output --otlp-endpoint http://localhost:4317",
         {"log_format": "json", "otlp_traces_endpoint": "http://localhost:4317"}),
    Does("vllm serve m --enable-chunked-prefill --max-num-seqs 16", {"max_num_seqs": 16}, "--enable-chunked-prefill"),
    Does("vllm serve --enable-chunked-prefill m", {}, "--enable-chunked-prefill"),
    Does("vllm serve --enable-chunked-prefill False m", {}, "--enable-chunked-prefill"),
    Does("vllm serve --disable-log-requests m", {}, "--disable-log-requests"),
    Does("vllm serve m --enable-chunked-prefill=False", {}, "--enable-chunked-prefill"),
    Does("vllm serve m --no-enable-prefix-caching --enforce-eager", {"enable_prefix_caching": False, "enforce_eager": True}),
    Does("vllm serve m --enforce-eager=True", {"enforce_eager": True}),
    Does("vllm serve m --enable-prefix-caching False", {"enable_prefix_caching": False}),
    Does("vllm serve m --response-role assistant --chat-template-content-format openai", {},
         "--response-role --chat-template-content-format"),
    Does("""vllm serve m --limit-mm-per-prompt '{"image": 4}'""", {}, "--limit-mm-per-prompt"),
    Does("vllm serve m --kv-cache-dtype auto", {}),
    Does("vllm serve m --kv-cache-dtype fp8", {"kv_cache_dtype": "fp8"}),
    Does("vllm serve m --kv-cache-dtype bfloat16", {"kv_cache_dtype": "bfloat16"}),
    Does("llama-server -m m -ctk q8_0 --cache-type-v q8_0", {"kv_cache_dtype": "int8"}, "-ctk --cache-type-v"),
    Does("llama-server -m m -ctk f16 -ctv bf16", {}),
    Answer("llama-server -m m -ctk q4_0", "-ctk q4_0: keys and values take 8 bits at least: --kv-cache-dtype int8, or leave "
           "the flag out"),
    Does("""vllm serve m --speculative-config '{"method": "ngram", "num_speculative_tokens": 5}'""", {},
         "--speculative-config"),
    Does("vllm serve m --speculative-config.method ngram", {}, "--speculative-config.method"),
    Does("vllm serve m -O3", {}, "-O3"),
    Does("""vllm serve m --compilation-config '{"level": 3}' --cudagraph-capture-sizes 1 2 4""", {},
         "--compilation-config --cudagraph-capture-sizes"),
    Does("vllm serve --cudagraph-capture-sizes 1 2 4 m", {}, "--cudagraph-capture-sizes"),
    Does("vllm serve m --distributed-executor-backend mp", {}),
    Does("vllm serve m -tp 8 -pp 2 --distributed-executor-backend ray",
         {"tensor_parallel_size": 8, "pipeline_parallel_size": 2, "distributed_executor_backend": "ray"}),
    Does("vllm serve m --async-scheduling", {"overlap": True}),
    Does("vllm serve Qwen/Qwen3-8B --revision abc123", {"model": "Qwen/Qwen3-8B@abc123"}),
    Does("vllm serve m --download-dir /data", {}, "--download-dir"),
    Does("vllm serve m --hf-token hf_x", {}, "--hf-token"),
    Does("vllm serve m --task generate --generation-config auto", {}),
    Does("vllm serve m --task embed", {}, "--task"),
    Does("vllm serve m --runner pooling --convert embed", {}, "--runner --convert"),
    Does("vllm serve m --runner auto --convert none", {}),
    Does("vllm serve m --task score", {}, "--task"),
    Answer("vllm serve m --task classify",
           "--task classify: ingle serves models that write text, make vectors of texts, or rank texts"),
    Does("""vllm serve m --pooler-config '{"pooling_type": "MEAN", "normalize": true}'""", {"pooling": "mean"}),
    Does("""vllm serve m --override-pooler-config '{"pooling_type": "LAST", "normalize": false}'""", {"pooling": "last"},
         "--override-pooler-config"),
    Answer("""vllm serve m --pooler-config '{"pooling_type": "STEP"}'""",
           """--pooler-config {"pooling_type": "STEP"}: ingle pools the last token, the mean or the first token: --pooling """
           "last, mean or cls"),
    Does("""vllm serve m --hf_overrides '{"architectures": ["Qwen3ForSequenceClassification"], "classifier_from_token": """
         """["no", "yes"], "is_original_qwen3_reranker": true}'""", {"rerank_template": "qwen3"}),
    Does("llama-server -m m --embeddings --pooling last", {"pooling": "last"}, "--embeddings"),
    Does("llama-server -m m --embedding --pooling none", {}, "--embedding"),
    Does("llama-server -m m --reranking", {}, "--reranking"),
    Does("llama-server -m m --no-webui --slots", {"page": False}, "--slots"),
    Does("llama-server -m m --webui", {}, "--webui"),
    Does("vllm serve m --disable-fastapi-docs", {"page": False}),
    Answer("vllm serve m --enable-lora --lora-modules sql=./lora",
           f"2 flags cannot be had here: --enable-lora: {LORA}; --lora-modules sql=./lora: {LORA}"),
    Answer("vllm serve m --cpu-offload-gb 10", f"--cpu-offload-gb 10: {NOT_SPLIT}"),
    Does("vllm serve m --cpu-offload-gb 0", {}),
    Answer("vllm serve m --ssl-keyfile k.pem", "--ssl-keyfile needs --ssl-certfile, the server's certificate"),
    Does("vllm serve m --ssl-keyfile k.pem --ssl-certfile c.pem --ssl-ca-certs ca.pem --ssl-cert-reqs 2 --enable-ssl-refresh",
         {"ssl_keyfile": "k.pem", "ssl_certfile": "c.pem", "ssl_ca_certs": "ca.pem", "ssl_cert_reqs": "required"},
         "--enable-ssl-refresh"),
    Does("""vllm serve m --uds /run/x.sock --root-path /llm --allowed-origins '["https://a.example"]' """
         """--allowed-headers '["*"]' --allow-credentials""",
         {"uds": "/run/x.sock", "root_path": "/llm", "cors_origin": ("https://a.example",)},
         "--allowed-headers --allow-credentials"),
    Does("llama-server -m m --ssl-key-file k --ssl-cert-file c --api-prefix /x", {"ssl_keyfile": "k", "ssl_certfile": "c",
         "root_path": "/x"}),
    Does("ingle serve m --api-key a --api-key b --admin-api-key c", {"api_key": ("a", "b"), "admin_api_key": ("c",)}),
    Does(f"vllm serve m --rope-scaling '{YARN}'", {"rope_scaling": YARN}),
    Does("""vllm serve m --hf-overrides '{"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "rope_theta": 1000000}'""",
         {"rope_scaling": '{"rope_type": "yarn", "factor": 4.0}', "rope_theta": 1e6}),
    Answer("""vllm serve m --hf-overrides '{"num_layers": 2}'""",
           """--hf-overrides {"num_layers": 2}: of a model's configuration only the rope can be replaced, not num_layers"""),
    Does("vllm serve m --kv-cache-memory-bytes 2147483648", {"kv_cache_memory": "2147483648"}),
    Does("vllm serve m --kv-offloading-size 8 --kv-offloading-backend native", {"host_cache": "8GiB"},
         "--kv-offloading-backend"),
    Does("llama-server -m m --cache-ram 4096", {"host_cache": "4096MiB"}),
    Does("llama-server -m m -cram 0", {}),
    Answer("llama-server -m m --cache-ram -1",
           "--cache-ram -1: the prompt cache in host memory has a limit here: --host-cache 8GiB, for instance"),
    Does("vllm serve m --api-key token-abc123", {"api_key": ("token-abc123",)}),
    Does("vllm serve m --dtype bf16", {"dtype": "bfloat16"}),
    Does("vllm serve m --device cuda:0", {"device": "cuda"}),
    Does("vllm chat --model m", {}),
    Does("vllm bench throughput --model m --max-model-len 512", {"max_model_len": 512}),
    Does("vllm bench serve --backend openai-chat --base-url http://127.0.0.1:8000 --endpoint /v1/chat/completions --model m "
         "--dataset-name random --random-input-len 512 --random-output-len 64 --num-prompts 100 --request-rate 4 "
         "--max-concurrency 16 --goodput ttft:500 tpot:50 --percentile-metrics ttft,tpot --save-result",
         {"endpoint": "/v1/chat/completions", "model": "m", "dataset_name": "random", "input_len": 512, "output_len": 64,
          "num_prompts": 100, "rate": ("4",), "concurrency": ("16",), "goodput": ("ttft:500", "tpot:50")},
         "--backend --percentile-metrics --save-result"),
    Does("vllm bench serve --dataset-name sharegpt --dataset-path ShareGPT_V3_unfiltered_cleaned_split.json "
         "--request-rate inf --num-prompts 1000 --seed 42 --ignore-eos --model m",
         {"dataset_name": "sharegpt", "dataset_path": Path("ShareGPT_V3_unfiltered_cleaned_split.json"), "rate": ("inf",),
          "num_prompts": 1000, "seed": 42, "model": "m"}),
    Answer("vllm bench serve --host localhost --port 8000", "2 flags cannot be had here: --host localhost: give --base-url "
           "http://HOST:PORT; --port 8000: give --base-url http://HOST:PORT"),
    Answer("vllm serve --foo m", "unknown flag --foo (see `ingle serve --help`)"),
    Answer("vllm serve --foo=3 m --max-modle-len 4",
           "2 flags cannot be had here: unknown flag --foo; unknown flag --max-modle-len; did you mean --max-model-len?"),
    Answer("vllm serve m --maxmodellen 4", "unknown flag --maxmodellen; did you mean --max-model-len? (see `ingle serve "
           "--help`)"),
    Answer("vllm serve m --swap-spaces 4", "unknown flag --swap-spaces (see `ingle serve --help`)"),
    Answer("vllm serve m --ctx", "unknown flag --ctx (see `ingle serve --help`)"),
    # ---- FastChat
    Does("python -m fastchat.serve.vllm_worker --model-path m --controller http://localhost:21001 --num-gpus 1", {},
         "--controller"),
    Does("python -m fastchat.serve.vllm_worker --model-path m --num-gpus 2", {"tensor_parallel_size": 2}),
    Does("python -m fastchat.serve.vllm_worker --model-path m --model-names a,b", {"served_model_name": ("a", "b")}),
    Does("python -m fastchat.serve.model_worker --model-path m --load-8bit", {"quantization": "int8"}),
    Answer("python -m fastchat.serve.model_worker --model-path m --gptq-wbits 4", "--gptq-wbits 4: give --quantization int8 "
           "or int4, which rounds a folder's weights while they are loaded; a quantized folder or .gguf file is read as "
           "it is"),
    Answer("python -m fastchat.serve.vllm_worker --model-path m --conv-template tigerbot", "--conv-template tigerbot: a "
           "conversation is rendered by a Jinja template, the model's own or --chat-template FILE: leave the flag out if "
           "the model has one, which `ingle show MODEL` says"),
    Does("python -m fastchat.serve.cli --model-path m --temperature 0.2 --device cpu",
         {"temperature": 0.2, "device": "cpu"}),
    # ---- llama.cpp and llama-cpp-python
    Does("llama-server -m ./m.gguf -c 4096 --host 0.0.0.0 --port 8080", {"model": "./m.gguf", "max_model_len": 4096,
         "host": "0.0.0.0", "port": 8080}),
    Does("llama-server -m m -c 0 -ngl 99 -fa --mlock --no-mmap", {}, "-fa --mlock --no-mmap"),
    Does("llama-server -m m -ngl 0", {"device": "cpu"}, "-ngl"),
    Does("llama-server -m m -ngl 20", {}, "-ngl"),
    Does("llama-server -fa on -m m -t 8 -tb 16", {"threads": 8}, "-fa -tb"),
    Does("llama-server -m m -t -1", {}),
    Does("llama-server -m m -np 4 -cb -b 512 -ub 128", {"max_num_seqs": 4, "max_num_batched_tokens": 512}, "-cb -ub -np"),
    Does("llama-server -m m --jinja -a my-model --api-key k", {"served_model_name": ("my-model",), "api_key": ("k",)},
         "--jinja"),
    Does("llama-server -hf ggml-org/gemma-3-1b-it-GGUF:Q4_K_M", {"model": "ggml-org/gemma-3-1b-it-GGUF:Q4_K_M"}),
    Does("llama-server -m m --rope-scaling yarn --rope-scale 4", {"rope_scaling": "yarn", "rope_factor": 4.0}),
    Does("llama-server -m m --rope-scale 2", {"rope_scaling": "linear", "rope_factor": 2.0}),
    Does("llama-server -m m --rope-freq-base 1000000 --rope-freq-scale 0.25",
         {"rope_theta": 1e6, "rope_scaling": "linear", "rope_factor": 4.0}, "--rope-freq-scale"),
    Does("llama-server -m m --rope-scaling none", {"rope_scaling": "none"}),
    Answer("llama-server -m m --yarn-orig-ctx 32768", "--yarn-orig-ctx 32768: write it into the scaling: --rope-scaling "
           f"'{YARN}'"),
    Does("llama-server -m m --temp 0.7 --top-k 40 --top-p 0.9 --min-p 0.05 --repeat-penalty 1.1 -n 256", {},
         "--temp --top-k --top-p --min-p --repeat-penalty -n"),
    Does("llama-server -m m --chat-template-file t.jinja --log-disable", {"chat_template": "t.jinja"}, "--log-disable"),
    Does("./server -m m -v", {"log_level": "debug"}),
    Does("llama-server -m m --metrics --slots", {}, "--metrics --slots"),
    Does("llama-server -m m -dev CUDA0", {"device": "cuda"}),
    Answer("llama-server -m m --mmproj p.gguf", "--mmproj p.gguf: images are not read"),
    Answer("llama-server -m m -p hello", "-p hello: a prompt is part of a request, and the port is --port"),
    Answer("llama-server -m a -m b", "--model was given twice: 'a' and 'b'"),
    Answer("llama-server -m", "-m needs a value: a model's name, a folder or a .gguf file"),
    Does("python3 -m llama_cpp.server --model m --n_ctx 16384 --n_gpu_layers 35 --port 8001",
         {"max_model_len": 16384, "port": 8001}),
    Does("python3 -m llama_cpp.server --model m --n_ctx 2048 --n_threads 4 --model_alias x --verbose True",
         {"max_model_len": 2048, "threads": 4, "served_model_name": ("x",), "log_level": "debug"}),
    Answer("python3 -m llama_cpp.server --model m --chat_format chatml", "--chat_format chatml: a conversation is rendered "
           "by a Jinja template, the model's own or --chat-template FILE: leave the flag out if the model has one, which "
           "`ingle show MODEL` says"),
    Does('llama-cli -m m -p "Once upon a time" -n 64 --temp 0 -s 42', {"prompt": "Once upon a time", "max_tokens": 64,
         "temperature": 0.0, "seed": 42}),
    Does('./main -m m --prompt "Hi there" -n -1 --repeat_penalty 1.1 --color -e', {"prompt": "Hi there",
         "repetition_penalty": 1.1}, "--color -e"),
    Does("llama-cli -m m -p '- one' --stop a b", {"prompt": "- one", "stop": ("a", "b")}),
    Does("ingle generate m --stop a -- --five", {"prompt": "--five", "stop": ("a",)}),
    Answer("llama-cli -m m -p x -n", "-n needs a value"),
    Answer("llama-cli -m m -p x --top-k --temp 1", "--top-k needs a value"),
    Answer("llama-cli -m m -f prompt.txt", '-f prompt.txt: give the text itself: ingle generate MODEL "$(cat FILE)"'),
    Answer("llama-cli -m m -p x --mirostat 2", "--mirostat 2: there is no such sampler: use --temperature, --top-k, "
           "--top-p and --min-p"),
    # ---- TigerBot
    Does("CUDA_VISIBLE_DEVICES=0 python infer.py --model_path m --max_input_length 1024 --max_generate_length 512 "
         "--streaming True", {"max_tokens": 512}, "--max_input_length --streaming"),
    Does("python infer.py --model_path=m --model_type=chat --rope_scaling=dynamic --rope_factor=8.0",
         {"rope_scaling": "dynamic", "rope_factor": 8.0}),
    Does("python infer.py --model_path m --rope_scaling yarn --rope_factor 8", {"rope_scaling": "yarn", "rope_factor": 8.0}),
    Does("python infer.py --model_path m --model_type base", {}, "--model_type"),
    Does("streamlit run apps/web_demo.py -- --model_path m --rope_scaling yarn --rope_factor 8 --max_input_length 37888 "
         "--max_generate_length 62112", {"rope_scaling": "yarn", "rope_factor": 8.0},
         "--max_input_length --max_generate_length"),
    Answer("python infer.py --model_path m --rope_scaling dynamic", "--rope-scaling dynamic needs --rope-factor: how many "
           "times longer the context becomes"),
    Answer("python infer.py --model_path m --rope_factor 8", "--rope-factor 8.0 needs --rope-scaling: linear, dynamic or "
           "yarn say how to stretch"),
    # ---- TGI, SGLang
    Does("text-generation-launcher --model-id m --max-total-tokens 2048 --max-input-length 1024 "
         "--max-batch-prefill-tokens 1024", {"max_model_len": 2048, "max_num_batched_tokens": 1024}, "--max-input-length"),
    Does("text-generation-launcher --model-id m --num-shard 1 --hostname 0.0.0.0 --max-concurrent-requests 128",
         {"host": "0.0.0.0"}, "--max-concurrent-requests"),
    Does("text-generation-launcher --model-id m --quantize awq", {"model": "m", "quantization": "awq"}),
    Does("python -m sglang.launch_server --model-path m --tp 1 --mem-fraction-static 0.8 --context-length 8192",
         {"gpu_memory_utilization": 0.8, "max_model_len": 8192}, "--mem-fraction-static"),
    Does("python -m sglang.launch_server --model-path m --disable-cuda-graph --disable-radix-cache --random-seed 3 "
         "--chunked-prefill-size 4096 --attention-backend triton", {"enforce_eager": True, "enable_prefix_caching": False,
         "seed": 3, "max_num_batched_tokens": 4096}, "--attention-backend"),
    Does("python -m sglang.launch_server --model-path m --tp 2", {"tensor_parallel_size": 2}),
    # ---- Ollama
    Does("ollama run m", {}),
    Does("ollama run m --verbose", {"verbose": True}),
    Does("ollama run m --keepalive 5m --nowordwrap", {}, "--keepalive --nowordwrap"),
    Answer("ollama run m --format json", "--format json: answers cannot be bound to a grammar or a schema yet: leave the "
           "flag out"),
    Answer("ollama create mario -f ./Modelfile", "there is no command 'create': there are no Modelfiles: give the model's "
           "file or folder itself, `ingle serve PATH --served-model-name NAME`, with --chat-template FILE where it needs "
           "another"),
    Answer("ollama cp a b", "there is no command 'cp': a model gets another name where it is served: `ingle serve MODEL "
           "--served-model-name NAME`"),
    Answer("ollama push me/m", "there is no command 'push': ingle uploads nothing: `hf upload` brings a model to Hugging "
           "Face"),
    Answer("ollama serve", "ingle serve needs a MODEL: `ingle serve smollm2:135m` (see `ingle serve --help`)"),
    Answer("ollama stop m", "no server for 'm' runs; running: none"),
    # ---- Hugging Face's command
    Answer("huggingface-cli download --resume-download Qwen/Qwen2-7B --local-dir ./q --local-dir-use-symlinks False",
           "--local-dir ./q: models lie in one place, where every command finds them by their name: leave the flag out"),
    Answer("huggingface-cli login", "there is no command 'login': set HF_TOKEN to a token of yours"),
    # ---- one command's flags in another
    Does("ingle chat m --port 8001 --host 0.0.0.0 --api-key a b", {}, "--port --host --api-key"),
    Does("ingle chat m --chat-template t.jinja --max-model-len 2k", {"chat_template": "t.jinja", "max_model_len": 2000}),
    Does("ingle serve m --temperature 0.2", {}, "--temperature"),
    Answer("ingle serve m --system hello", '--system hello: a system message is part of a request: {"role": "system", '
           '"content": …} first in its messages'),
    Does("ingle bench latency m --chat-template t --port 3 --batch-size 4", {"batch_size": 4, "input_len": 128},
         "--chat-template --port"),
    Does("ingle bench throughput m --no-enable-prefix-caching -c 512", {"max_model_len": 512},
         "--no-enable-prefix-caching"),
    Does("ingle verify m --chat-template t --gpu-memory-utilization 0.5 --ctx-size 512 --port 1",
         {"chat_template": "t", "max_model_len": 512}, "--gpu-memory-utilization --port"),
    Answer("ingle verify m --rope-scaling dynamic --rope-factor 2", "2 flags cannot be had here: --rope-scaling dynamic: "
           "the checkpoint is compared as it is: leave the flag out; --rope-factor 2: the checkpoint is compared as it is: "
           "leave the flag out"),
    Answer("ingle smollm2:135m", "there is no command 'smollm2:135m'; to talk to a model: `ingle run smollm2:135m`, to "
           "serve it: `ingle serve smollm2:135m`"),
    Answer("ingle --model m", "a command comes first, such as `ingle serve --model m`; `ingle --help` lists them"),
    Answer("ingle sevre m", "there is no command 'sevre'; did you mean `ingle serve`?"),
    # ---- the environment
    Does("INGLE_PORT=9000 INGLE_HOST=0.0.0.0 INGLE_MAX_MODEL_LEN=4k ingle serve m",
         {"port": 9000, "host": "0.0.0.0", "max_model_len": 4000}),
    Does("INGLE_MODEL=other ingle serve", {"model": "other"}),
    Does("INGLE_MODEL=other ingle serve m --port 1", {"port": 1}),
    Does("INGLE_PORT=9000 ingle serve m --port 9001", {"port": 9001}),
    Does("INGLE_API_KEY='a, b' INGLE_ENFORCE_EAGER=1 ingle serve m", {"api_key": ("a", "b"), "enforce_eager": True}),
    Does("INGLE_TEMPERATURE=0.2 INGLE_PORT=9 ingle chat m", {"temperature": 0.2}),
    Answer("INGLE_PORT=http ingle serve m", "INGLE_PORT=http: 'http' is not a whole number; 4k (4000) and 4K (4096) are "
           "fine"),
    Answer("INGLE_PORT=99999 ingle serve m", "--port 99999 is not a port: give 1 to 65535, or 0 for any free one (set by "
           "INGLE_PORT)"),
    Answer("INGLE_ENFORCE_EAGER=maybe ingle serve m", "INGLE_ENFORCE_EAGER=maybe: 'maybe' is neither true nor false"),
    Answer("INGLE_DTYPE=int3 ingle serve m", "INGLE_DTYPE=int3: 'int3' is not one of auto, half, float16, bfloat16, float, "
           "float32"),
    Does("INGLE_PROT=1 ingle serve m", {}, "INGLE_PROT"),
    Does("INGLE_API_KEYS='a b' INGLE_API_KEY=c ingle serve m", {"api_key": ("c", "a", "b")}),
    Does("INGLE_ALLOW_OPEN=1 ingle serve m --host 0.0.0.0", {"allow_open": True, "host": "0.0.0.0"}),
    Does("INGLE_ADMIN_API_KEY=r ingle serve m", {"admin_api_key": ("r",)}),
    Does("VLLM_API_KEY=secret vllm serve m", {"api_key": ("secret",)}, "VLLM_API_KEY"),
    Does("INGLE_API_KEYS=mine VLLM_API_KEY=secret vllm serve m", {"api_key": ("mine",)}),
    Does("VLLM_API_KEY=secret vllm serve m --api-key mine", {"api_key": ("mine",)}),
    Does("VLLM_USE_V1=1 VLLM_ATTENTION_BACKEND=XFORMERS vllm serve m", {}, "VLLM_ATTENTION_BACKEND,"),
    Does("OLLAMA_HOST=0.0.0.0:11434 ingle serve m", {}, "OLLAMA_HOST=0.0.0.0:11434"),
    Does("OLLAMA_KEEP_ALIVE=5m OLLAMA_NUM_PARALLEL=4 OLLAMA_CONTEXT_LENGTH=8192 ingle serve m", {},
         "OLLAMA_CONTEXT_LENGTH=8192 OLLAMA_NUM_PARALLEL=4 OLLAMA_KEEP_ALIVE=5m"),
    Does("CUDA_VISIBLE_DEVICES=0,1 ingle serve m", {}, "CUDA_VISIBLE_DEVICES=0,1"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in os.environ:
        if name.startswith(("INGLE_", *variables.PREFIXES)) and name != "INGLE_HOME":
            monkeypatch.delenv(name)
    for name in (*variables.KEYS, "CUDA_VISIBLE_DEVICES", "HF_TOKEN", "HF_HUB_CACHE"):
        monkeypatch.setenv(name, "")  # so that it is put back, whoever sets it


def typed(line: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The words after `ingle`, with the variables before it set."""
    words = shlex.split(line)
    while re.fullmatch(r"[A-Z_0-9]+=.*", words[0]):
        name, _, value = words.pop(0).partition("=")
        monkeypatch.setenv(name, value)
    for program, command in PROGRAMS.items():
        given = program.split()
        if words[: len(given)] == given:
            return [*command.split(), *words[len(given) :]]
    raise AssertionError(f"whose line is {line!r}?")


def flat(config: Any) -> Iterator[tuple[str, Any]]:
    """Fields that are not as by default, those of nested classes included."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from flat(value)
        elif value != field.default:
            yield field.name, value


@pytest.mark.parametrize("habit", [each for each in HABITS if isinstance(each, Does)], ids=lambda habit: habit.line)
def test_what_does_as_it_says(habit: Does, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = typed(habit.line, monkeypatch)
    words = [{"run": "chat"}.get(words[0], words[0]), *words[1:]]
    command = next(name for name in TARGETS if words[: len(name.split())] == name.split())
    target, hide = TARGETS[command]
    options = dict(flat(parse(target, words[len(command.split()) :], command=command, hide=hide)))
    err = capsys.readouterr().err.splitlines()
    noticed = [line.split()[2 if line.startswith("notice: /") else 1] for line in err if line.startswith("notice: ")]
    assert options == {"model": "m", **habit.options} or options == _without_defaults(target, habit.options)
    assert sorted(noticed) == sorted(habit.noticed.split()), err
    assert all(line.startswith(("notice: ", "settings: ")) for line in err)


def _without_defaults(target: type, options: dict[str, Any]) -> dict[str, Any]:
    defaults = {flag.field: getattr(flag.owner, flag.field, None) for flag in flags_of(target, {})}
    return {"model": "m"} | {name: value for name, value in options.items() if value != defaults[name]}


@pytest.mark.parametrize("habit", [each for each in HABITS if isinstance(each, Answer)], ids=lambda habit: habit.line)
def test_what_is_answered(ingle: Run, habit: Answer, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    monkeypatch.setattr("ingle.server.engine_process.EngineProcess.__init__", lambda self: started.append(self))
    monkeypatch.setattr("ingle.server.engine_process.EngineProcess.stop", lambda self: None)
    result = ingle(*typed(habit.line, monkeypatch))
    assert (result.out, result.err) == ("", f"ingle: {habit.answer}\n")
    assert result.code != 0


SNIPPETS: list[tuple[str, dict[str, Any] | str, str]] = [
    ('LLM(model="m", tensor_parallel_size=1, swap_space=4, trust_remote_code=True)', {"trust_remote_code": True},
     "swap_space=4"),
    ('LLM("m", gpu_memory_utilization=0.95, max_model_len=4096, enforce_eager=True, dtype="half")',
     {"gpu_memory_utilization": 0.95, "max_model_len": 4096, "enforce_eager": True, "dtype": "half"}, ""),
    ('LLM("m", disable_log_stats=True, download_dir="/data", seed=1)', {"seed": 1},
     "disable_log_stats=True download_dir='/data'"),
    ('LLM("m", tokenizer="m", tokenizer_mode="auto", revision=None, quantization=None)', {}, "tokenizer_mode='auto'"),
    ('LLM("m", rope_scaling={"rope_type": "dynamic", "factor": 2.0})',
     {"rope_scaling": '{"rope_type": "dynamic", "factor": 2.0}'}, ""),
    ('LLM("m", rope_scaling="yarn", rope_factor=4)', {"rope_scaling": "yarn", "rope_factor": 4}, ""),
    ('LLM("m", n_ctx=2048, n_gpu_layers=0, n_threads=4, verbose=False)',
     {"max_model_len": 2048, "device": "cpu", "threads": 4}, "n_gpu_layers=0"),
    ('LLM("m", enable_chunked_prefill=True, max_num_seqs=8)', {"max_num_seqs": 8}, "enable_chunked_prefill=True"),
    ('LLM("org/m", revision="abc")', {"model": "org/m@abc"}, ""),
    ('LLM("m", enable_lora=False, disable_radix_cache=True)', {"enable_prefix_caching": False}, ""),
    ('LLM("m", tensor_parallel_size=2, swap_space=4)', {"tensor_parallel_size": 2}, "swap_space=4"),
    ('LLM("m", tensor_parallel_size=4)', {"tensor_parallel_size": 4}, ""),
    ('LLM("m", pipeline_parallel_size=4)', {"pipeline_parallel_size": 4}, ""),
    ('LLM("m", quantization="awq", cpu_offload_gb=10)', "cpu_offload_gb=10: "
     + NOT_SPLIT.replace("--device", "device"), ""),
    ('LLM("m", max_modle_len=3)', "there is no option max_modle_len; did you mean max_model_len?", ""),
    ('LLM("m", foo=3)', "there is no option foo", ""),
    ('LLM("m", max_model_len=0)', "max_model_len 0 is too small: give at least 1", ""),
    ('SamplingParams(temperature=0.8, top_p=0.95, max_tokens=512, stop=["</s>"])', {"temperature": 0.8}, ""),
    ('SamplingParams(best_of=1, use_beam_search=False, early_stopping=False, n=1, length_penalty=1.0)', {"n": 1}, ""),
    ('SamplingParams(n=2, best_of=2)', {"n": 2}, ""),
    ('SamplingParams(skip_special_tokens=False, include_stop_str_in_output=True, min_tokens=2, stop_token_ids=[7])',
     {"stop_token_ids": (7,), "min_tokens": 2}, ""),
    ('SamplingParams(max_new_tokens=10, repeat_penalty=1.1)', {"max_tokens": 10, "repetition_penalty": 1.1}, ""),
    ('SamplingParams(spaces_between_special_tokens=True)', {}, "spaces_between_special_tokens=True"),
    ('SamplingParams(use_beam_search=True)', "use_beam_search=True: beams are not searched: sample with temperature, and "
     "with n for several answers", ""),
    ('SamplingParams(best_of=5)', "best_of=5: only all of n answers are given: choose among them by their logprobs", ""),
    ('SamplingParams(logits_processors=[1])', "logits_processors=[1]: no code of others runs in a step: logit_bias is what "
     "there is", ""),
    ('SamplingParams(guided_decoding={"regex": "a+", "backend": "xgrammar"})',
     {"structured_outputs": StructuredOutputs(regex="a+")}, ""),
    ('SamplingParams(guided_decoding={"regex": "a+", "json": {}})', "structured_outputs: takes one of json, regex, choice, "
     "grammar, json_object, got json and regex", ""),
    ('SamplingParams(json_schema=\'{"type": "string"}\')',
     {"structured_outputs": StructuredOutputs(json={"type": "string"})}, ""),
    ('SamplingParams(ebnf="root ::= [a-z]")', {"structured_outputs": StructuredOutputs(grammar="root ::= [a-z]")}, ""),
    ('SamplingParams(temprature=1)', "there is no parameter temprature; did you mean temperature?", ""),
]  # fmt: skip


@pytest.mark.parametrize(("snippet", "outcome", "noticed"), SNIPPETS, ids=lambda value: str(value)[:60])
def test_what_python_says(
    snippet: str, outcome: dict[str, Any] | str, noticed: str, caplog: pytest.LogCaptureFixture
) -> None:
    """`LLM` hands its options to `EngineConfig.of` as they are."""
    names = {"LLM": lambda model, **options: EngineConfig.of(model, **options), "SamplingParams": SamplingParams}
    if isinstance(outcome, str):
        with pytest.raises((ConfigError, RequestError)) as error:
            eval(snippet, names)
        assert str(error.value) == outcome
        return
    made = eval(snippet, names)
    if isinstance(made, EngineConfig):
        assert dict(flat(made)) == {"model": "m", **outcome}
    else:
        assert {name: getattr(made, name) for name in outcome} == outcome
    assert [message.split()[1] for message in caplog.messages] == noticed.split()


# ---- the tables


def test_there_are_enough_habits() -> None:
    lines = [habit.line for habit in HABITS] + [snippet for snippet, _, _ in SNIPPETS]
    assert len(lines) == len(set(lines)) >= 150
    assert len(habits()) > 600


def every_flag() -> dict[str, str]:
    """All flags that anybody knows, and what each means."""
    found = {name: habit.says if habit.kind in ("same", "turned") else name for name, habit in habits().items()}
    for target, _ in TARGETS.values():
        for flag in flags_of(target, {}):
            found |= {name: name if name.startswith("--") else flag.name for name in flag.spellings}
    return found


@lru_cache
def dialect(command: str) -> Dialect:
    target, hide = TARGETS[command]
    own = {name: flag for flag in flags_of(target, hide) for name in flag.spellings}
    return Dialect(own, loads_model=True, takes_prompt=command == "generate")


@pytest.mark.parametrize("command", TARGETS)
def test_no_hint_is_a_word_that_only_looks_alike(command: str) -> None:
    """Of all flags, each beside each other that a hint may propose: only what means the same is near."""
    known, may_be = every_flag(), candidates(dialect(command))
    alike = [
        (flag, other)
        for flag in known
        for other in may_be
        if nearest(flag, {other: other}) is not None and known.get(other, other) not in (known[flag], flag)
    ]
    assert [(flag, other) for flag, other in alike if flag.rstrip("s") != other.rstrip("s")] == []


@pytest.mark.parametrize("command", TARGETS)
def test_no_hint_is_what_was_typed(command: str) -> None:
    may_be = candidates(dialect(command))
    assert [flag for flag in {*every_flag(), *may_be} if nearest(flag, may_be) == flag] == []


@pytest.mark.parametrize(
    ("flag", "hint"),
    [
        ("--max-modle-len", "--max-model-len"),
        ("--max-model-lenght", None),
        ("--gpu-memory-utilisation", "--gpu-memory-utilization"),
        ("--tensor-paralel-size", "--tensor-parallel-size"),
        ("--tempereture", None),
        ("--served-modelname", "--served-model-name"),
        ("--ctxsize", None),
        ("--contextlength", "--max-model-len"),
        ("--prot", "--port"),
        ("--top-j", None),
    ],
)
def test_hints(flag: str, hint: str | None) -> None:
    assert nearest(flag, candidates(dialect("serve"))) == hint


@pytest.mark.parametrize("command", LOADING)
def test_every_spelling_is_told_in_every_command(command: str) -> None:
    """Whatever its row: no flag of the tables is unknown to a command that loads a model."""
    for name in habits():
        line = read([f"{name}=1"], dialect(command))
        assert not any("unknown flag" in text for text in line.objections), name
        said = line.objections or line.notices or line.settings or line.positionals or line.environment or line.model
        habit = habits()[name]
        assert said or habit.kind == "turned" or "1" in habits().get(habit.says, habit).harmless, name


def test_what_is_ours_by_another_name_is_read_as_ours() -> None:
    for name, habit in habits().items():
        if habit.kind in ("same", "turned") and habit.says not in ("--model", "PROMPT"):
            try:
                parse(ServeConfig, ["m", f"{name}=1"], command="serve")
            except IngleError as error:
                assert "Missing value" not in str(error) and "unexpected" not in str(error), (name, error)


def test_our_flags_are_known_where_they_do_not_hold() -> None:
    """Those of every configuration class and of sampling, in every command that loads a model."""
    ours = {flag.name for each in (ServeConfig, Chat, Generate) for flag in flags_of(each, {})}
    ours -= {"--model", "--prompt", "--system", "--prompts-file", "--output", "--json", "--verbose"}
    for command in LOADING:
        unknown = ours - dialect(command).own.keys() - elsewhere().keys()
        assert unknown == set(), command


def test_commands_are_not_ours() -> None:
    from ingle.cli.main import COMMANDS

    assert not {*commands.ALIASES, *commands.ANSWERS} & COMMANDS.keys()
    assert set(commands.ALIASES.values()) <= COMMANDS.keys()


# ---- files


def settings(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


FILES = {
    "a.toml": 'model = "m"\nport = 9000\nmax-model-len = "4k"\nenforce_eager = true\napi_key = ["a", "b"]\n'
    "swap_space = 4\n[rope_scaling]\nrope_type = 'yarn'\nfactor = 2.0\n",
    "a.yaml": "model: m\nport: 9000\nmax_model_len: 4k\nenforce-eager: true\napi-key: [a, b]\nswap-space: 4\n"
    "rope_scaling: {rope_type: yarn, factor: 2.0}\n",
    "a.json": json.dumps({"model": "m", "port": 9000, "max_model_len": "4k", "enforce_eager": True, "api_key": ["a", "b"],
                          "swap_space": 4, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}}),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_file_says_what_flags_say(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = settings(tmp_path / name, FILES[name])
    (tmp_path / name).chmod(0o600)
    monkeypatch.setenv("INGLE_MAX_MODEL_LEN", "2k")
    config = parse(ServeConfig, ["--config", path, "--port", "1"], command="serve")
    assert dict(flat(config)) == {
        "model": "m", "port": 1, "max_model_len": 2000, "enforce_eager": True, "api_key": ("a", "b"),
        "rope_scaling": '{"rope_type": "yarn", "factor": 2.0}',
    }  # fmt: skip
    notice, origins = capsys.readouterr().err.splitlines()
    assert notice.startswith(f"notice: {path}: --swap-space changes nothing here: ")
    assert (
        "max-model-len 2000 by INGLE_MAX_MODEL_LEN" in origins and "api-key set, " in origins and "port" not in origins
    )
    assert parse(Chat, ["--config", path], command="chat", hide=HIDDEN).engine.enforce_eager
    assert "notice: --port" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text", "error"),
    [
        ("a.yaml", "prot: 1", "{}: unknown key prot; did you mean port? (see `ingle serve --help`)"),
        ("a.yaml", "port: http", "{}: port=http: 'http' is not a whole number; 4k (4000) and 4K (4096) are fine"),
        ("a.yaml", "port: 99999", "--port 99999 is not a port: give 1 to 65535, or 0 for any free one (set by {})"),
        ("a.yaml", "pipeline-layers: two", "--pipeline-layers 'two' is no list of numbers such as 13,14,13 (set by {})"),
        ("a.yaml", "- a", "--config {}: not a list of names and values, such as port: 8000"),
        ("a.json", "{", "--config {}: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        ("a.ini", "port=1", "--config {}: its name ends neither in .toml nor in .yaml, .yml or .json, so its format is not "
         "known"),
        ("nowhere/a.toml", "", "--config {}: No such file or directory"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_file(ingle: Run, tmp_path: Path, name: str, text: str, error: str) -> None:
    if "/" not in name:
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError) as raised:
        parse(ServeConfig, ["m", "--config", str(tmp_path / name)], command="serve")
    assert str(raised.value) == error.format(tmp_path / name)


def test_a_file_with_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from ingle.cli.serve import _config

    file = tmp_path / "keys"
    file.write_text("# mine\n one \n\ntwo\n")
    file.chmod(0o600)
    given = _config(["m", "--api-key-file", str(file), "--api-key", "zero"]).server.access.all_keys()
    assert [key.key for key in given] == ["zero", "one", "two"]
    assert capsys.readouterr().err == ""
    file.chmod(0o644)
    _config(["m", "--api-key-file", str(file)])
    assert capsys.readouterr().err == f"notice: others on this machine can read {file}: `chmod 600 {file}` keeps its " \
        "keys to you\n"  # fmt: skip
    file.write_text("# none\n")
    with pytest.raises(ConfigError, match=f"--api-key-file {file}: no key in it"):
        _config(["m", "--api-key-file", str(file)])
    with pytest.raises(ConfigError, match="--api-key-file nowhere: No such file"):
        _config(["m", "--api-key-file", "nowhere"])


def test_help_says_where_a_default_comes_from(ingle: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("INGLE_PORT", "9000")
    monkeypatch.setenv("INGLE_API_KEY", "secret")
    out = " ".join(ingle("help", "serve").out.replace("│", " ").split())
    assert "(default: 9000, by INGLE_PORT)" in out and "(default: set, by INGLE_API_KEY)" in out
    assert "secret" not in out
    assert "`ingle help flags`" in out


def test_the_table_is_shown(ingle: Run) -> None:
    out = ingle("help", "flags").out
    words = out.split()
    assert all(name in words for name in habits())
    assert all(len(line) <= 100 for line in out.splitlines())


def test_variables_have_the_names_of_flags() -> None:
    known = {flag.field for each in cli_flags.CONFIGURATION for flag in flags_of(each, {})}
    assert {"model", "host", "port", "api_key", "api_key_file", "max_model_len", "chat_template", "dtype"} <= known
    for variable in variables.VARIABLES.values():
        for name in re.findall(r"INGLE_([A-Z_]+)", variable.says):
            assert name.lower() in known or f"INGLE_{name}" in variables.OURS
