"""Compiles the sums over ranks for a card that is not here: python -m tests.kernels.compiled_sums 90 RANKS…"""

from __future__ import annotations

import re
import sys
from typing import Any

from tests.kernels.compiled import compiling  # isort: skip  which unsets TRITON_INTERPRET

import torch
from triton.runtime.jit import JITFunction

from ingle.kernels.gpu import sampling_shares, sums
from ingle.kernels.group import LogitsShare, Peers
from ingle.kernels.sampling import SamplingTables
from ingle.model.layers import RMSNorm
from tests.kernels.places import Place


def main() -> None:
    capability, *sizes = map(int, sys.argv[1:])
    with compiling(capability) as done:
        compile_only = JITFunction.run

        def looked_at(self: Any, *args: Any, **options: Any) -> Any:
            """What is shared with others is read and written 16 bytes at a time; the state is none of that."""
            compiled = compile_only(self, *args, **options)
            if self.fn.__module__ != sums.__name__:
                return compiled
            accesses = re.findall(
                r"ld\.volatile\.global\.(?!b64)\S*|st\.global\.[^b]\S*|st\.global\.b(?:8|16|32)", compiled.asm["ptx"]
            )
            assert accesses and all(".v4.b32" in access for access in accesses), set(accesses)
            return compiled

        JITFunction.run = looked_at
        for size in sizes:
            compile_for(size)
    print(*sorted(set(done)))


def compile_for(num_ranks: int) -> None:
    addresses = tuple(0x7F0000000000 + place * (1 << 26) for place in range(num_ranks))
    state = torch.zeros(4, dtype=torch.int64)
    for one_shot_bytes in (0, 1 << 30):
        peers = Peers(num_ranks - 1, addresses, 16 << 20, state, 1 << 30, one_shot_bytes, None)
        for dtype in (torch.bfloat16, torch.float32):
            x = torch.zeros(64, 3584, dtype=dtype)
            norm = RMSNorm(torch.zeros(3584, dtype=dtype), 1e-6)
            sums.add_rms_norm(x, x.clone(), norm, norm, peers)
        sums.all_reduce(x, peers)
    x, weight = torch.zeros(2, 1792, dtype=torch.bfloat16), torch.zeros(3584, 1792, dtype=torch.bfloat16)
    sums.multiply_add_rms_norm(x, weight, None, torch.zeros(2, 3584, dtype=x.dtype), norm, None, peers)
    slots = torch.zeros(2, dtype=torch.int64)
    share = LogitsShare(x, Place(num_ranks - 1, num_ranks), num_ranks * x.shape[1])
    tables = SamplingTables.allocate(2, share.vocab_size, x.device)
    stats = sampling_shares._survey(share, x, slots, slots, tables)
    sampling_shares._draw(share, x, stats, slots, slots, tables)


if __name__ == "__main__":
    main()
