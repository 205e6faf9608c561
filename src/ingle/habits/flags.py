"""The flags of vLLM, llama.cpp, llama-cpp-python, Ollama, TGI, SGLang, FastChat and TigerBot, in a command that loads a
model.

How a flag stands in these tables: `--swap-space=` takes a value, `--fit?` may take a truth value (true, off, 1 …),
`--sizes#` takes numbers, and one without a mark takes nothing. A flag of ingle's own is looked for before them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from functools import lru_cache
from typing import Literal, NamedTuple

from ingle.habits.turned import TURNED
from ingle.limits import LimitsConfig, flag_of

SAME: Mapping[str, str] = {
    "--model": "-m --model-path --model-id --model-name-or-path --model-tag -hf -hfr --hf-repo -mu --model-url",
    "PROMPT": "-p --prompt",
    "--max-model-len": "--context-length --max-seq-len --max-sequence-length --max-total-tokens --num-ctx",
    "--max-num-seqs": "--max-running-requests --max-batch-size --max-concurrency",
    "--max-num-batched-tokens": "--chunked-prefill-size --max-prefill-tokens --max-batch-prefill-tokens",
    "--seed": "--random-seed",
    "--block-size": "--page-size",
    "--enforce-eager": "--disable-cuda-graph --disable-cuda-graphs",
    "--overlap=true": "--async-scheduling",
    "--overlap=false": "--no-async-scheduling --disable-overlap-schedule",
    "--enable-prefix-caching": "--cache-prompt",
    "--no-enable-prefix-caching": "--disable-radix-cache --no-cache-prompt --disable-prefix-caching",
    "--gpu-memory-utilization": "--cuda-memory-fraction --gpu-memory-fraction",
    "--kv-cache-memory": "--kv-cache-memory-bytes",
    "--num-gpu-blocks-override": "--num-kv-blocks-override",
    "--pipeline-parallel-size": "-pp --pp-size",
    "--data-parallel-size": "-dp --dp --dp-size",
    "--tensor-parallel-size": "-tp --tp --tp-size --num-shard --num-gpus --tensor-parallel-degree",
    "--quantization": "--quantize --quant",
    "--quantization=int8": "--load-8bit --load-in-8bit",
    "--quantization=int4": "--load-4bit --load-in-4bit",
    "--rope-theta": "--rope-freq-base",
    "--rope-factor": "--rope-scaling-factor",
    "--threads": "--num-threads",
    "--trust-remote-code": "--allow-remote-code",
    "--chat-template": "--chat-template-file",
    "--host": "--hostname --listen-host",
    "--port": "--listen-port",
    "--api-key": "--api-keys",
    "--ssl-keyfile": "--ssl-key-file",
    "--ssl-certfile": "--ssl-cert-file",
    "--root-path": "--api-prefix",
    "--trusted-proxies": "--forwarded-allow-ips",
    "--served-model-name": "--model-name --served-name",
    "--disable-access-log": "--disable-uvicorn-access-log",
    "--no-page": "--no-webui --no-ui --disable-fastapi-docs",
    "--log-level": "--uvicorn-log-level",
    "--log-format=json": "--json-output",
    "--log-requests": "--enable-log-requests",
    "--otlp-traces-endpoint": "--otlp-endpoint",
    "--timeout-keep-alive": "--http-keep-alive",
    "--max-num-queued-reqs": "--max-queued-requests --max-queue-size",
    "--max-header-bytes": "--h11-max-incomplete-event-size",
    "--max-header-count": "--h11-max-header-count",
    "--max-body-bytes": "--payload-limit --max-request-size --max-payload-size",
    "--max-texts": "--max-client-batch-size",
    "--max-stop-strings": "--max-stop-sequences",
    "--temperature": "--temp",
    "--max-tokens": "--max-generate-length --max-new-tokens --num-predict --max-gen-toks --max-output-tokens",
    "--repetition-penalty": "--repeat-penalty --repeat-penality",
    "--stop": "-r --reverse-prompt",
    "--system": "-sys --system-prompt --system-message",
}
"""Ours, and what others call it."""

VALUES: Mapping[str, Mapping[str, str]] = {
    "--device": {"gpu": "cuda", "cuda:0": "cuda", "cuda0": "cuda", "none": "cpu", "nvidia": "cuda"},
    "--dtype": {
        **{"fp16": "float16", "f16": "float16", "torch.float16": "float16", "float16_t": "float16"},
        **{"bf16": "bfloat16", "torch.bfloat16": "bfloat16"},
        **{"fp32": "float32", "f32": "float32", "torch.float32": "float32"},
    },
    "--load-format": {"hf": "auto", "bin": "pt", "pytorch": "pt", "npcache": "pt"},
    "--pooling": {"none": "auto", "unspecified": "auto", "lasttoken": "last"},
    "--ssl-cert-reqs": {"0": "none", "1": "optional", "2": "required"},
    "--log-level": {"critical": "error", "warn": "warning", "trace": "debug"},
}
"""Of our own flags: values as others write them."""

IDLE: tuple[tuple[str, str], ...] = (
    # ---- vLLM's engine
    ("--swap-space=", "requests that find no room wait; --host-cache keeps prefixes that the KV cache has no room for"),
    ("--preemption-mode=", "a request that lost its room is always computed again"),
    (
        "--disable-log-requests --no-enable-log-requests --no-disable-log-requests --disable-log-requests-content",
        "what requests say is logged only where --log-requests asks for that",
    ),
    (
        "--enable-log-outputs --aggregate-engine-logging --log-error-stack --log-requests-level= "
        "--decode-log-interval= --show-time-cost",
        "each request gets one line, with its tokens and times, and answers are never logged",
    ),
    (
        "--enable-chunked-prefill? --no-enable-chunked-prefill --max-num-partial-prefills= "
        "--max-long-partial-prefills= --long-prefill-token-threshold= --enable-mixed-chunk --disable-chunked-prefill",
        "prompts are always read in chunks, of --max-num-batched-tokens at most",
    ),
    (
        "--max-paddings= --use-v2-block-manager --num-lookahead-slots= --num-scheduler-steps= "
        "--multi-step-stream-outputs? --scheduler-delay-factor= --scheduling-policy= --schedule-policy= "
        "--schedule-conservativeness= --scheduler-cls= --disable-async-output-proc "
        "--waiting-served-ratio= --max-waiting-tokens= --num-continuous-decode-steps= --max-batch-total-tokens= "
        "--scheduler-reserve-full-isl --disable-hybrid-kv-cache-manager --kv-sharing-fast-prefill",
        "the scheduler has no such choice",
    ),
    (
        "--worker-use-ray --engine-use-ray --ray-workers-use-nsight --worker-cls= "
        "--worker-extension-cls= --max-parallel-loading-workers= --nccl-port= --disable-custom-all-reduce "
        "--enable-p2p-check --master-addr= --master-port= --node-rank= --dist-init-addr= --dist-timeout= "
        "--enable-expert-parallel --data-parallel-backend= --disable-frontend-multiprocessing --api-server-count= "
        "-asc= --headless --tokenizer-pool-size= --tokenizer-pool-type= --tokenizer-pool-extra-config= "
        "--tokenizer-worker-num= --load-balance-method= --sharded= --main-gpu= -mg= --split-mode= -sm= "
        "--enable-dp-attention --moe-backend= --all2all-backend= --enable-eplb --numa-bind",
        "one engine runs the model, and starts and joins its ranks by itself",
    ),
    (
        "--max-seq-len-to-capture= --max-context-len-to-capture= --compilation-config= -O= -O0 -O1 -O2 -O3 "
        "--optimization-level= --cudagraph-capture-sizes# --max-cudagraph-capture-size= --cuda-graph-max-bs= "
        "--cuda-graph-bs# --cuda-graphs= --disable-cuda-graph-padding --enable-torch-compile "
        "--torch-compile-max-bs= --performance-mode= --warmup --no-warmup --skip-server-warmup --warmups=",
        "CUDA graphs are made as they are needed, and nothing is compiled by torch.compile",
    ),
    (
        "--attention-backend= --sampling-backend= --grammar-backend= --attention-config= --kernel-config= "
        "--disable-cascade-attn --enable-flashinfer-autotune --triton-attention-num-kv-splits= "
        "--prefill-attention-backend= --decode-attention-backend= --disable-flashinfer "
        "--disable-flashinfer-sampling --mamba-backend= "
        "--flash-attn? -fa? --flash-attention? --no-flash-attn --mul-mat-q= --no-mul-mat-q --attn-implementation=",
        "ingle picks its kernels by itself",
    ),
    ("--model-impl=", "a model runs by ingle's own code, or by transformers' where that has none"),
    ("--tokenizer-mode= --use-fast-tokenizer --slow-tokenizer", "there is one kind of tokenizer"),
    (
        "--config-format= --ignore-patterns= --use-tqdm-on-load --no-use-tqdm-on-load --pt-load-map-location= "
        "--safetensors-load-strategy= --model-loader-extra-config= --weight-loader-disable-mmap",
        "files are read in one way",
    ),
    ("--code-revision= --tokenizer-revision=", "a model's files are all of one revision"),
    ("--logprobs-mode=", "log probabilities are those before temperature and penalties"),
    ("--disable-sliding-window", "windows are computed as the model has them"),
    ("--calculate-kv-scales --quantization-param-path=", "keys and values are not quantized"),
    ("--additional-config= --show-hidden-metrics-for-version= --fail-on-environ-validation", "there is no such thing"),
    (
        "--collect-detailed-traces= --enable-layerwise-nvtx-tracing --profiler-config= "
        "--kv-cache-metrics --kv-cache-metrics-sample= --cudagraph-metrics --enable-mfu-metrics "
        "--enable-server-load-tracking --enable-metrics --metrics --no-metrics --enable-cache-report "
        "--otlp-service-name= --prometheus-port= --perf --no-perf",
        "there are no traces and no /metrics yet",
    ),
    ("--enable-sleep-mode", "a server does not sleep"),
    (
        "--speculative-config= --speculative-model= --num-speculative-tokens= --speculative-max-model-len= "
        "--speculative-disable-by-batch-size= --ngram-prompt-lookup-max= --ngram-prompt-lookup-min= "
        "--spec-decoding-acceptance-method= --speculative-draft-tensor-parallel-size= -spec-draft-tp= "
        "--speculative-disable-mqa-scorer --speculative-model-quantization= --speculative-algorithm= "
        "--speculative-draft-model-path= --speculative-num-steps= --speculative-eagle-topk= "
        "--speculative-num-draft-tokens= --speculate= --model-draft= -md= --draft-max= --draft-min= --draft= "
        "--draft-p-min= --gpu-layers-draft= -ngld= --draft-model= --draft-model-num-pred-tokens= "
        "--lookup-cache-static= -lcs= --lookup-cache-dynamic= -lcd= --disable-logprobs-during-spec-decoding?",
        "nothing is guessed ahead yet: the text is the same, at the speed of one token a step",
    ),
    # ---- what is said of requests
    (
        "--enable-auto-tool-choice --exclude-tools-when-tool-choice-none",
        "it is always so: calls of tools are read in the format that the chat template shows",
    ),
    (
        "--tool-parser-plugin= --reasoning-parser-plugin= --tool-server=",
        "formats of calls and thoughts are built in",
    ),
    ("--enable-reasoning --reasoning-format=", "thoughts are told apart wherever the chat template shows their format"),
    (
        "--reasoning-budget= --reasoning-config= --think? --hidethinking --reasoning-effort=",
        "requests say how much is thought: reasoning_effort, or chat_template_kwargs with enable_thinking",
    ),
    (
        "--guided-decoding-backend= --structured-outputs-config= --disable-grammar-support "
        "--constrained-json-whitespace-pattern= --logits-processor-pattern=",
        "JSON schemas and grammars are not built yet, and requests that bring some are refused",
    ),
    ("--response-role=", "answers are those of the assistant"),
    ("--chat-template-content-format=", "a template gets the content of messages in the form that it renders"),
    ("--jinja --no-jinja --trust-request-chat-template", "chat templates are Jinja, the model's or --chat-template"),
    (
        "--limit-mm-per-prompt= --mm-processor-kwargs= --disable-mm-preprocessor-cache --mm-processor-cache-gb= "
        "--allowed-local-media-path= --allowed-media-domains= --interleave-mm-strings --language-model-only "
        "--skip-mm-profiling --mmproj-auto --no-mmproj --enable-mm-embeds --media-io-kwargs= --media-path=",
        "the text part of a model is served, without images",
    ),
    ("--return-tokens-as-token-ids --enable-tokenizer-info-endpoint --tokens-only", "answers have no such form"),
    ("--enable-prompt-tokens-details --enable-request-id-headers --enable-per-request-metrics", "it is always so"),
    ("--enable-force-include-usage", "a stream reports its usage where the request asks for it"),
    # ---- their servers
    ("--path=", "the pages are those that come with ingle, at / and /docs"),
    (
        "--allowed-methods= --allowed-headers= --allow-credentials --cors-allow-credentials",
        "pages of the sites of --cors-origin may send any header, a key among them, and there are no cookies",
    ),
    ("--enable-ssl-refresh", "certificates are read again whenever they change"),
    ("--ssl", "--ssl-certfile turns TLS on"),
    ("--enable-offline-docs", "/docs loads nothing from elsewhere"),
    (
        "--log-config-file= --log-colors= --log-file= --log-prefix --log-timestamps --no-log-prefix "
        "--log-disable --logger-level= --log-level-http= --verbosity= -lv=",
        "the log goes to stderr, as much of it as --log-level says",
    ),
    ("--threads-http= --validation-workers= --workers=", "one process speaks HTTP"),
    ("--timeout= -to=", "--request-timeout is what a request may take"),
    ("--webui --ui", "the page at / is there unless --no-page says otherwise"),
    ("--slots --no-slots --props --slot-save-path=", "there is no such page"),
    ("--is-embedding --embedding --embeddings", "any model answers /v1/embeddings"),
    ("--rerank --reranking", "a reranker is told by its card, or by --rerank-template, and answers /v1/rerank"),
    (
        "--embeddings-normalize= --embd-normalize= --embd-output-format= --embd-separator=",
        "vectors have length 1, unless the model's files or a request's normalize say otherwise",
    ),
    ("--interrupt-requests= --disable-ping-events= --sse-ping-interval=", "a request never ends another"),
    (
        "--controller= --controller-address= --worker= --worker-address= --no-register --limit-worker-concurrency= "
        "--register-with= --gateway=",
        "there is no controller and no worker to register: clients speak to the server itself",
    ),
    # ---- llama.cpp's engine
    (
        "--mlock --no-mmap --mmap --use-mlock? --use-mmap? --direct-io --no-host --load-mode= -lm= --numa= --prio= "
        "--prio-batch= --poll= --poll-batch= --cpu-mask= -C= --cpu-range= -Cr= --cpu-strict= --cpu-mask-batch= -Cb= "
        "--cpu-range-batch= --cpu-strict-batch= --check-tensors --repack --no-repack -nr --vocab-only= --logits-all= "
        "--offload-kqv= --kv-offload -kvo --op-offload --no-op-offload",
        "how files are mapped and threads are placed is ingle's business",
    ),
    ("--threads-batch= -tb= --n-threads-batch=", "prompts are read by as many threads as --threads"),
    ("--ubatch-size= -ub= --n-ubatch=", "a step is not cut further: --max-num-batched-tokens is its size"),
    ("--cont-batching -cb --kv-unified -kvu --no-kv-unified -no-kvu", "all requests share one batch and one cache"),
    (
        "--cache-reuse= --ctx-checkpoints= -ctxcp= --swa-checkpoints= --swa-full "
        "--defrag-thold= -dt= --cache= --cache-type= --cache-size= --cache-idle-slots --keep= "
        "--enable-hierarchical-cache "
        "--hicache-ratio= --prefix-caching-hash-algo= --kv-offloading-backend= "
        "--radix-eviction-policy=",
        "the prefix cache has no such choice",
    ),
    ("--context-shift --no-context-shift", "a context that is full ends the answer"),
    ("--fit= -fit= --fit-target= -fitt= --fit-ctx= -fitc=", "the context is always cut to the memory that there is"),
    ("--special -sp", "special tokens are left out unless a request says skip_special_tokens false"),
    (
        "--conversation -cnv --interactive -i --interactive-first --color --multiline-input -mli --simple-io "
        "--single-turn -st --no-display-prompt --display-prompt --escape -e --no-escape --style= --multiline",
        "the terminal has no such mode",
    ),
    ("--repeat-last-n= --last-n-tokens-size= --penalize-newline", "penalties look at the whole prompt and answer"),
    # ---- Ollama, TigerBot
    ("--keepalive= --keep-alive=", "a model stays loaded until its server is stopped"),
    ("--nowordwrap --insecure --experimental", "there is no such mode"),
    ("--streaming? --stream?", "answers are shown as they come; over HTTP the request says `stream`"),
    (
        "--max-input-length= --max-input-tokens=",
        "a prompt is never cut: one that --max-model-len, prompt and answer together, does not hold is refused",
    ),
    ("--use-cache? --use-cache-quantization? --low-cpu-mem-usage?", "that is always so where it helps"),
    ("--device-map=", "the model lies where --device says"),
)
"""Accepted, though they change nothing here, and why."""

REFUSED: tuple[tuple[str, str, str], ...] = (
    (
        "--expert-parallel-size= --ep-size= -ep= --nnodes= --prefill-context-parallel-size= "
        "--decode-context-parallel-size= -dcp= --ep=",
        "1",
        "a model is divided by --tensor-parallel-size and --pipeline-parallel-size, and served several times by "
        "--data-parallel-size: leave the flag out",
    ),
    (
        "--data-parallel-size-local= -dpl= --data-parallel-rank= -dpn= --data-parallel-start-rank= -dpr= "
        "--data-parallel-address= -dpa= --data-parallel-rpc-port= -dpp= --data-parallel-hybrid-lb -dph "
        "--data-parallel-external-lb -dpe",
        "",
        "one server starts all replicas, and hands requests to them itself: give it --data-parallel-size alone",
    ),
    (
        "--tensor-split= -ts=",
        "0 1",
        "GPUs share a model equally, by --tensor-parallel-size: leave the flag out, and choose them by "
        "CUDA_VISIBLE_DEVICES",
    ),
    (
        "--wbit= --wbits= --gptq-ckpt= --gptq-wbits= --awq-ckpt= "
        "--awq-wbits= --quantization-config= --torchao-config=",
        "",
        "give --quantization int8 or int4, which rounds a folder's weights while they are loaded; a quantized folder "
        "or .gguf file is read as it is",
    ),
    (
        "--cpu-offload-gb= --cpu-offloading --offload-folder= --override-tensor= -ot= --cpu-moe -cmoe --n-cpu-moe= "
        "-ncmoe= --max-gpu-memory=",
        "0",
        "a model is not split between GPU and memory: take a smaller or a quantized .gguf file, or --device cpu",
    ),
    (
        "--enable-lora --lora-modules= --lora= --lora-scaled= --lora-path= --lora-paths= --lora-base= --lora-adapters= "
        "--max-loras= --max-lora-rank= --max-cpu-loras= --lora-dtype= --lora-extra-vocab-size= --fully-sharded-loras "
        "--enable-prompt-adapter --qlora-adapter-name-or-path= --control-vector= --peft-path=",
        "",
        "adapters are not applied: merge it into the model (peft's merge_and_unload) and give the result",
    ),
    ("--middleware= --io-processor-plugin= --logits-processors= --generation-hook=", "", "no code of others is loaded"),
    (
        "--conv-template= --chat-format=",
        "none",
        "a conversation is rendered by a Jinja template, the model's own or --chat-template FILE: leave the flag out "
        "if the model has one, which `ingle show MODEL` says",
    ),
    ("--skip-tokenizer-init", "false", "the server reads and writes text: it needs the tokenizer"),
    (
        "--generation-config=",
        "auto",
        "the model's own sampling defaults hold where a request says nothing: leave the flag out, and send "
        "temperature, top_p and top_k with each request",
    ),
    (
        "--override-generation-config= --preferred-sampling-params=",
        "{}",
        "the server has no sampling defaults of its own: send temperature, top_p and top_k with each request",
    ),
    (
        "--default-chat-template-kwargs= --chat-template-kwargs=",
        "{}",
        "send it with each request, as chat_template_kwargs",
    ),
    (
        "--kv-transfer-config= --kv-events-config= --disaggregation-mode= --ec-transfer-config= "
        "--weight-transfer-config=",
        "none null",
        "one server reads prompts and writes answers: leave the flag out",
    ),
    (
        "--yarn-orig-ctx=",
        "0",
        'write it into the scaling: --rope-scaling \'{"rope_type":"yarn","factor":4.0,'
        '"original_max_position_embeddings":32768}\'',
    ),
    (
        "--yarn-ext-factor= --yarn-attn-factor= --yarn-beta-slow= --yarn-beta-fast=",
        "-1 -1.0 -1.00",
        'write it into the scaling, as beta_slow, beta_fast or attention_factor: --rope-scaling \'{"rope_type":"yarn",'
        '"factor":4.0,"beta_fast":32}\'',
    ),
    (
        "--mirostat= --mirostat-lr= --mirostat-ent= --typical= --typical-p= --tfs= --tfs-z= --top-nsigma= "
        "--top-n-sigma= --xtc-probability= --xtc-threshold= --dry-multiplier= --dry-base= --dry-allowed-length= "
        "--dry-penalty-last-n= --dynatemp-range= --dynatemp-exp= --samplers= --sampler-seq= --sampling-seq= "
        "--num-beams=",
        "0 0.0 1 1.0 -1 0.00 1.00",
        "there is no such sampler: use --temperature, --top-k, --top-p and --min-p",
    ),
    (
        "--grammar= --grammar-file= --json-schema= -j= --json-schema-file= -jf= --format=",
        "",
        "answers cannot be bound to a grammar or a schema yet: leave the flag out",
    ),
    ("--logit-bias= -l=", "", "send it with a request, as logit_bias"),
    ("--in-prefix= --in-suffix= --in-prefix-bos", "", "the chat template writes what stands around a message"),
    ("-f= --file= -bf= --binary-file=", "", 'give the text itself: ingle generate MODEL "$(cat FILE)"'),
    ("--prompt-cache= --session=", "", "prompts are cached in memory only, by --enable-prefix-caching"),
    ("--mmproj= -mm= --mmproj-url= -mmu= --clip-model-path= --image= --audio=", "", "images are not read"),
    ("--rpc= --rpc-servers=", "", "a model runs on one machine: leave the flag out"),
    ("--override-kv= --kv-overrides=", "", "a file's metadata is taken as it is; --rope-scaling and --rope-theta alone "
     "replace it"),
    ("-hff= --hf-file=", "", "name the file's quantization with the repository, ORG/NAME:Q4_K_M, or give its URL, "
     "https://huggingface.co/ORG/NAME/resolve/main/FILE.gguf"),
    ("--hf-model-repo-id=", "", "name the quantization with the repository: ORG/NAME:Q4_K_M"),
    ("--docker-repo= -dr=", "", "models come from Hugging Face, ModelScope, a URL or a folder"),
    ("--models-dir= --models-preset= --models-max= --models-config= --model-config= --config-file=", "",
     "a server has one model: start one for each, with its own --port"),
    ("--gpus= --gpu-id= --base-gpu-id= --gpu-ids=", "0", "choose the GPU by CUDA_VISIBLE_DEVICES=0 ingle …"),
    ("--tools=", "", "the server runs no tools"),
)  # fmt: skip
"""Not built, or meant otherwise: the values with which they ask for nothing, and the answer to others."""

_LIMITS = " ".join(f"{flag_of(field.name)}=" for field in fields(LimitsConfig))
ELSEWHERE: tuple[tuple[str, str], ...] = (
    (_LIMITS, "only `ingle serve` has clients to bound"),
    (
        "--host= --port= --served-model-name=+ --api-key=+ --api-key-file= --admin-api-key=+ --allow-open "
        "--allowed-hosts=+ --cors-origin=+ --uds= --uds-mode= --ssl-keyfile= --ssl-certfile= --ssl-keyfile-password= "
        "--ssl-ca-certs= --ssl-cert-reqs= --root-path= --trusted-proxies=+ --log-level= "
        "--disable-access-log --page --no-page --strict-fields --show-paths "
        "--stream-interval= --files-dir= --max-files-size= "
        "--response-store= --response-store-hours= --log-format= --log-requests --max-log-len= --disable-log-stats "
        "--otlp-traces-endpoint= --watchdog --watchdog-timeout= --max-engine-restarts= --engine-restart-window= "
        "--shutdown-timeout=",
        "only `ingle serve` listens",
    ),
    (
        "--data-parallel-size= -dp=",
        "one engine computes; `ingle serve`, `ingle batch` and `ingle bench throughput` have several",
    ),
    (
        "--temperature= --top-p= --top-k= --min-p= --max-tokens= --repetition-penalty= --presence-penalty= "
        "--frequency-penalty= --stop=+ --ignore-eos",
        "each request brings its own sampling; `ingle chat` and `ingle generate` have it as flags",
    ),
    ("--lines --drop-oldest", "only `ingle chat` converses"),
    ("--chat-template= --merge-system --tool-call-parser= --reasoning-parser=", "no conversation is rendered here"),
    ("--pooling= --rerank-template=", "no text is embedded or ranked here"),
    (
        "--gpu-memory-utilization= --kv-cache-memory= --num-gpu-blocks-override=",
        "the command chooses its memory by itself",
    ),
    ("--enable-prefix-caching --no-enable-prefix-caching", "the prefix cache is off, so that repeated runs compute"),
    ("--seed= --load-format=", "the command needs the checkpoint as it is, and has no draws of the engine's"),
)
"""Ours, in a command that has no use for them: accepted, as those of others that change nothing."""

REFUSED_HERE: tuple[tuple[str, str], ...] = (
    ("--system=", 'a system message is part of a request: {"role": "system", "content": …} first in its messages'),
    (
        "--prompts-file= PROMPT",
        "prompts come over HTTP; `ingle generate` takes them from the command line and from files",
    ),
    ("--rope-scaling= --rope-theta= --rope-factor=", "the checkpoint is compared as it is: leave the flag out"),
)
"""Ours, in a command where leaving them out would do something else than asked."""

SECRETS = {"--api-key", "--api-keys", "--admin-api-key", "--ssl-keyfile-password", "--hf-token", "-hft", "--token"}
"""Whose values are not shown."""

Kind = Literal["same", "turned", "idle", "refused", "elsewhere", "refused here"]
Takes = Literal["", "=", "?", "#", "=+"]


class Habit(NamedTuple):
    """One spelling, and what becomes of it."""

    name: str
    kind: Kind
    says: str
    """Our flag where it is the same; why it changes nothing; or the answer."""
    takes: Takes = ""
    """What follows it; our own flag decides that where it is the same."""
    harmless: frozenset[str] = frozenset()
    """Values with which a refused flag asks for nothing, in lower case."""


@lru_cache(maxsize=1)
def habits() -> dict[str, Habit]:
    """All spellings of the tables, with `-` for `_`."""
    found: dict[str, Habit] = {}
    for habit in _rows():
        assert habit.name not in found, f"{habit.name} stands in two rows"
        found[habit.name] = habit
    return found


def _rows() -> Iterator[Habit]:
    for ours, theirs in SAME.items():
        yield from (Habit(name, "same", ours) for name in theirs.split())
    for name, (takes, turn) in TURNED.items():
        yield Habit(name, "turned", turn.__doc__ or "", "?" if takes == "?" else "=")
    for names, why in IDLE:
        yield from (Habit(*_marked(word, "idle", why)) for word in names.split())
    for names, harmless, answer in REFUSED:
        asks_nothing = frozenset(harmless.split())
        yield from (Habit(*_marked(word, "refused", answer), asks_nothing) for word in names.split())


def elsewhere() -> dict[str, Habit]:
    """Our own flags as they are answered in a command that does not have them."""
    rows: list[tuple[str, str, Kind]] = [(names, why, "elsewhere") for names, why in ELSEWHERE]
    rows += [(names, why, "refused here") for names, why in REFUSED_HERE]
    found = (Habit(*_marked(word, kind, why)) for names, why, kind in rows for word in names.split())
    return {habit.name: habit for habit in found}


def _marked(word: str, kind: Kind, says: str) -> tuple[str, Kind, str, Takes]:
    marks: tuple[Takes, ...] = ("=+", "=", "?", "#")
    takes: Takes = next((mark for mark in marks if word.endswith(mark)), "")
    return word.removesuffix(takes), kind, says, takes


def refusal(name: str, value: object) -> str | None:
    """Why this value of a flag cannot be had; None where it asks for nothing, or nobody refuses it."""
    habit = habits().get(name)
    if habit is None or habit.kind != "refused" or str(value).lower() in habit.harmless:
        return None
    return habit.says
