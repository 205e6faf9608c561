"""llama.cpp, as `cpu_vs_llamacpp.py` drives it: the libraries that `peer.py` built, by llama-cpp-python's bindings."""

from __future__ import annotations

import json
import sys
import time


def describe(path: str, threads: int) -> dict[str, object]:
    import llama_cpp

    return {"version": f"llama-cpp-python {llama_cpp.__version__}",
            "kernels": llama_cpp.llama_print_system_info().decode().strip(" |")}  # fmt: skip


def offline(path: str, threads: int, prompts: list[list[int]], num_out: int, clock: str) -> list[dict[str, float]]:
    """Seconds to read each prompt to its first token, and for each token after it."""
    from llama_cpp import Llama

    model = Llama(path, n_ctx=2048, n_batch=512, n_ubatch=512, n_threads=threads, n_threads_batch=threads,
                  swa_full=False, verbose=False)  # fmt: skip
    results, now = [], getattr(time, clock)
    for prompt in prompts:
        model.reset()
        started = now()
        model.eval(prompt)
        token = model.sample(temp=0.0)
        first = now()
        for _ in range(num_out - 1):
            model.eval([token])
            token = model.sample(temp=0.0)
        results.append({"first_s": first - started, "next_s": (now() - first) / (num_out - 1)})
    return results[1:]  # the first warms up


def logits(path: str, threads: int, windows: list[list[int]], output: str) -> None:
    """float32 [windows, tokens, vocab]: what follows each token."""
    import numpy as np
    from llama_cpp import Llama

    model = Llama(path, n_ctx=1024, n_threads=threads, n_threads_batch=threads, logits_all=True, verbose=False)
    found = np.lib.format.open_memmap(output, "w+", np.float32, (len(windows), len(windows[0]), model.n_vocab()))
    for index, window in enumerate(windows):
        model.reset()
        model.eval(window)
        found[index] = model.scores[: len(window)]


if __name__ == "__main__":
    command, arguments = sys.argv[1], json.loads(sys.argv[2])
    print(json.dumps(globals()[command](**arguments)))
