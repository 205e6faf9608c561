"""Whether ingle's kernels or PyTorch's operators are faster on this machine, measured on a model's own products.

Once for a machine, kernels, PyTorch and shapes: the answer is kept in ingle's home. It is measured by a process of its
own, `python -m ingle.device.kernel_choice`, since the engine does without PyTorch wherever it can.
"""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from ingle.home import home
from ingle.model.architecture import DecoderConfig
from ingle.weights.code_types import CodeType

_FEW, _MANY = 1, 64
"""Rows of a step that decodes, and of one that reads a prompt."""
_PROMPT, _ANSWER = 128, 64
"""Tokens of the request by which both are weighed."""
_MOST_ELEMENTS = 1 << 23
"""Of a matrix that is measured; of a larger one, this much of its rows."""
_LEAST_ELEMENTS = 1 << 24
"""A model of fewer numbers spends its time between products, and there PyTorch takes longer."""
_FLUSHED_BYTES = 64 << 20
"""Read between products, so that weights come from memory as they do in a step."""
_TIMEOUT_S = 120


@dataclass(frozen=True)
class Product:
    rows: int
    columns: int
    count: int
    """How often it is in a step of `_FEW` rows; of the head, which a prompt does not need, not in one of `_MANY`."""
    is_head: bool = False


@dataclass(frozen=True)
class Question:
    products: list[Product]
    code_type: CodeType
    library: str
    num_threads: int


@dataclass(frozen=True)
class Choice:
    ours: bool
    ratio: float | None = None
    """How many times as fast as PyTorch's operators ours are; None where it was not measured."""
    failure: str | None = None
    """Why it was not measured, where it should have been."""


def products(decoder: DecoderConfig) -> list[Product]:
    hidden, layers = decoder.hidden_size, decoder.num_layers
    inner, experts = decoder.intermediate_size, 1
    if decoder.moe is not None:
        inner, experts = decoder.moe.intermediate_size, decoder.moe.router.top_k
    inputs = [Product(decoder.q_size + 2 * decoder.kv_size, hidden, layers)]
    if (mla := decoder.mla) is not None:
        inputs = [
            Product(decoder.q_size, mla.q_lora_rank or hidden, layers),
            Product((mla.q_lora_rank or 0) + mla.kv_lora_rank + mla.qk_rope_head_dim, hidden, layers),
            Product(mla.kv_lora_rank, mla.qk_nope_head_dim, layers * decoder.num_heads),
            Product(mla.v_head_dim, mla.kv_lora_rank, layers * decoder.num_heads),
        ]
    return [
        *inputs,
        Product(hidden, decoder.attended_size, layers),
        Product(2 * inner, hidden, layers * experts),
        Product(hidden, inner, layers * experts),
        Product(decoder.vocab_size, hidden, 1, is_head=True),
    ]


def choose(decoder: DecoderConfig, code_type: CodeType, library: Path, num_threads: int) -> Choice:
    """`library`: ours, compiled; `code_type`: how most of the model's numbers are stored."""
    wanted = products(decoder)
    torch = importlib.util.find_spec("torch")
    if torch is None or sum(each.rows * each.columns * each.count for each in wanted) < _LEAST_ELEMENTS:
        return Choice(ours=True)
    installed = Path(torch.origin or "").stat().st_mtime_ns
    question = msgspec.json.encode(Question(wanted, code_type, str(library), num_threads))
    key = hashlib.blake2b(question + str(installed).encode(), digest_size=12).hexdigest()
    file = home() / "kernels" / f"choice-{key}"
    try:
        ratio = float(file.read_text())
    except (OSError, ValueError):  # not there yet, or damaged
        try:
            ratio = _ask(question)
        except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
            return Choice(ours=True, failure=_reason(error))
        _keep(file, ratio)
    return Choice(ours=ratio >= 1, ratio=ratio)


def _ask(question: bytes) -> float:
    command = [sys.executable, "-m", "ingle.device.kernel_choice"]
    done = subprocess.run(command, input=question, capture_output=True, timeout=_TIMEOUT_S, check=True)
    return float(done.stdout.split()[-1])


def _reason(error: Exception) -> str:
    said = (
        error.stderr.decode(errors="replace").splitlines() if isinstance(error, subprocess.CalledProcessError) else []
    )
    return said[-1] if said else f"{type(error).__name__}: {error}"


def _keep(file: Path, ratio: float) -> None:
    """A home that cannot be written to costs a measurement at each start, and no more."""
    part = file.with_suffix(".part")
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        part.write_text(str(ratio))
        part.replace(file)
    except OSError:
        return


# ---- in a process of its own


def _measure(question: Question) -> float:
    """Seconds of a request by PyTorch's operators, to seconds by ours."""
    import numpy as np
    import torch

    from ingle.kernels.cpu import library

    library._loaded = kernels = library.load(question.library)
    kernels.ingle_start(question.num_threads)
    torch.set_num_threads(question.num_threads)
    flushed = np.ones(_FLUSHED_BYTES // 4, np.float32)
    ours = theirs = 0.0
    for product in question.products:
        for num_rows in (_FEW,) if product.is_head else (_FEW, _MANY):
            times = product.count * (_ANSWER if num_rows == _FEW else _PROMPT / _MANY)
            by_us, by_pytorch = _seconds(product, question.code_type, num_rows, flushed.sum)
            ours, theirs = ours + times * by_us, theirs + times * by_pytorch
    return theirs / ours


def _seconds(
    product: Product, code_type: CodeType, num_rows: int, between: Callable[[], object]
) -> tuple[float, float]:
    """Of one product by our kernels, and by PyTorch's operator."""
    import torch

    from ingle.weights.packed_matrix import PackedMatrix, PackedPart

    rows = max(1, min(product.rows, _MOST_ELEMENTS // product.columns))
    part = PackedPart.empty(code_type, rows, product.columns)
    part.data.fill(17)  # any numbers, so that there is memory behind them
    matrix, x = PackedMatrix((part,), rows, product.columns), torch.randn(num_rows, product.columns)
    dtype = torch.bfloat16 if code_type.bits < 32 and multiplies_bfloat16() else torch.float32
    weight, like_weight = torch.ones(rows, product.columns, dtype=dtype), x.to(dtype)
    ours = _least(lambda: matrix.multiply(x.numpy()), between)
    theirs = _least(lambda: torch.nn.functional.linear(like_weight, weight), between)
    return ours * product.rows / rows, theirs * product.rows / rows


def multiplies_bfloat16() -> bool:
    """Whether PyTorch's products of bfloat16 are the processor's own."""
    import torch

    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "amx", "bf16"))


def _least(run: Callable[[], object], between: Callable[[], object], tries: int = 4) -> float:
    times = []
    for _ in range(tries):
        between()
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times)


if __name__ == "__main__":
    print(_measure(msgspec.json.decode(sys.stdin.buffer.read(), type=Question)))
