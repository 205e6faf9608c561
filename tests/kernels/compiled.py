"""Compiles what a model takes on a GPU that is not here: python -m tests.kernels.compiled 90 bfloat16 FOLDER…

CPU tensors go the way of CUDA's, and a kernel is compiled in place of being run, down to the machine code: what Triton
or its assembler refuses for a card shows on any machine. Numbers are not computed: those are other tests'.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

os.environ.pop("TRITON_INTERPRET", None)

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from ingle import kernels
from ingle.kernels import gpu, reference_sampling
from ingle.request import EngineRequest, SamplingParams
from tests.support import engine_for, random_prompt, restrict, run

_KIB_OF_SM = {70: 96, 75: 64, 80: 164, 86: 100, 89: 100, 90: 228, 100: 228, 120: 100}
_KIB_OF_PROGRAM = {70: 96, 75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""Shared memory that there is (CUDA C++ Programming Guide, technical specifications per compute capability)."""


class _Driver:
    """As Triton asks one for the card."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextmanager
def compiling(capability: int) -> Iterator[list[str]]:
    """Inside, kernels are compiled for a card of that capability. Gives the names of those that were."""
    done: list[str] = []
    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = launch(self, *args, grid=grid, warmup=True, **options)
        compiled.n_regs = 64  # which only a driver tells
        done.append(self.fn.__name__)
        assert compiled.metadata.shared <= _KIB_OF_PROGRAM[capability] << 10, (
            f"{self.fn.__name__} takes too much shared memory"
        )
        return compiled

    card: dict[str, Callable[[torch.device], object]] = {
        "pdl": lambda device: 90 <= capability < 120,
        "scales_blocks": lambda device: capability == 90,
        "has_warpgroups": lambda device: capability == 90,
        "multiplies_fp8": lambda device: capability >= 89,
        "num_sms": lambda device: 132,
        "shared_memory": lambda device: _KIB_OF_SM[capability] << 10,
    }
    driver.set_active(_Driver(capability))
    JITFunction.run = compile_only
    torch.Tensor.is_cuda = property(lambda self: True)  # type: ignore[assignment, misc]
    for module in pkgutil.iter_modules(gpu.__path__):
        rooms = importlib.import_module(f"ingle.kernels.gpu.{module.name}")
        for name, of_card in card.items():
            if hasattr(rooms, name):
                setattr(rooms, name, of_card)
    torch.empty, torch.empty_like = torch.zeros, torch.zeros_like  # what no kernel writes is used as an index
    torch.Tensor.new_empty = torch.Tensor.new_zeros  # type: ignore[method-assign]
    torch.cuda.is_current_stream_capturing = lambda: False
    sample = gpu.sample

    def drawn(*args: Any, **options: Any) -> Any:
        """Tokens that sequences go on with."""
        sample(*args, **options)
        return reference_sampling.sample(*args, **options)

    gpu.sample = drawn
    kernels.of = lambda x: gpu  # type: ignore[assignment]
    yield done  # for the rest of this process


def _not_at_all(error: Exception) -> NoReturn:
    """In place of failing the request alone."""
    raise error


def main() -> None:
    capability, dtype, *folders = sys.argv[1:]
    engines = [engine_for(Path(folder), dtype=dtype, cpu_kernels="torch", block_size=16) for folder in folders]
    params = SamplingParams(temperature=0.6, max_tokens=3, ignore_eos=True)
    with compiling(int(capability)) as done:
        for engine in engines:
            for num_requests in (1, 8, 20):
                requests = [
                    EngineRequest(str(index), random_prompt(index, 70), params) for index in range(num_requests)
                ]
                limited = restrict(engine, num_pages=200, max_num_batched_tokens=2048, max_num_seqs=32)
                limited._recover = _not_at_all  # type: ignore[method-assign]
                run(limited, requests)
    print(*sorted(set(done)))


if __name__ == "__main__":
    main()
