"""Sums over ranks by kernels that write into each other's memory, with the residual addition and the norm behind them.

Every rank's GPU has an inbox that the kernels of all ranks write to. What a rank has to say it leaves in the inboxes
of the others, and looks into its own until all have spoken: a sum takes one way between two GPUs, not a meeting before
and one behind it. Numbers are their own signal, as in NVIDIA's kernels named after Lamport: what is not there yet is
`-0`, which nobody sends (`inboxes.sendable`), and whoever takes a number puts `-0` back. An inbox has two halves, which
sums take in turn: a sum ends only when all have begun it, and have ended the one before; so whoever begins the next
finds the half empty that it writes to. Which half it is stands in memory (`_begun`), as a CUDA graph is replayed.

In one shot each rank gets all rows of every other. In two, each adds up the rows whose number, divided by the number
of ranks, leaves its place, and tells the others: 2 / size of the bytes, in two ways between GPUs. Either adds up in
float32 in the order of places, and rounds once, so that all ranks have the same to the bit.

Programs wait for those of other GPUs, so all of them have to run at once: of short rows, among few ranks, there are at
most two for each SM, else one. With many rows each sends some before it looks for the first, and another with each that
it takes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ingle.kernels.flow import Norm
from ingle.kernels.gpu import vector
from ingle.kernels.gpu.device import await_previous, barrier, num_sms, pdl
from ingle.kernels.gpu.elementwise import normed
from ingle.kernels.gpu.inboxes import NOTHING_16, NOTHING_32, half_of, inbox_of, sendable
from ingle.kernels.group import Peers

_TYPES = (torch.bfloat16, torch.float16, torch.float32)
_ALIGNMENT = 16
"""Bytes that a thread writes at once."""
_MIN_BLOCK, _MAX_BLOCK = 256, 16384
"""Numbers of a program's row: each thread has its own."""
_PIECE = 2048
"""Numbers of a program's row, where there are none."""
_SHORT, _FEW_RANKS = 8192, 4
"""Bytes of a row whose program leaves room for another in an SM, among so many ranks at most: it needs no more than 64
registers of 512 threads; of eight ranks it has up to 128."""
_ROWS_AHEAD = tl.constexpr(2)
"""That a program has sent when it looks for one: what is on its way between two GPUs is some MiB then."""
_TRIES = tl.constexpr(4096)
"""Looks between two questions whether there is still someone to wait for: some milliseconds."""


@triton.jit
def _begun(state_ptr, half, COMPILED: tl.constexpr):
    """The last program that has begun leaves the other half for the next sum.

    Nothing else is told by it, so no program waits until its numbers are with the others.
    """
    barrier(COMPILED)  # all threads of the program know theirs
    last = True
    if tl.num_programs(0) > 1:
        last = tl.atomic_add(state_ptr + 1, 1, sem="relaxed") == tl.num_programs(0) - 1
    if last:
        tl.store(state_ptr + 1, 0)
        tl.store(state_ptr, (1 - half).to(tl.int64))


@triton.jit
def _leave(inboxes, slots, offsets, bits, mask, slot_size, PEER: tl.constexpr, PLACE: tl.constexpr):
    """In the slot that a peer has for this rank: one for each other, in the order of places."""
    WIDE: tl.constexpr = bits.dtype.primitive_bitwidth == 32
    SLOT: tl.constexpr = PLACE if PLACE < PEER else PLACE - 1
    tl.store(inbox_of(inboxes, PEER, WIDE) + slots + SLOT * slot_size + offsets, bits, mask=mask)


@triton.jit
def _look(slots_ptr, offsets, mask, slot_size, COUNT: tl.constexpr):
    seen = ()
    for index in tl.static_range(COUNT):
        seen += (tl.load(slots_ptr + index * slot_size + offsets, mask=mask, other=0, volatile=True),)
    return seen


@triton.jit
def _num_missing(seen, NOTHING: tl.constexpr, COUNT: tl.constexpr):
    missing = (seen[0] == NOTHING).to(tl.int32)
    for index in tl.static_range(1, COUNT):
        missing += (seen[index] == NOTHING).to(tl.int32)
    return tl.sum(missing, 0)


@triton.jit
def _take(slots_ptr, offsets, mask, slot_size, state_ptr, COUNT: tl.constexpr):
    """What stands in COUNT slots of the own inbox, as soon as all of it is there; then there is nothing any more.

    Offsets are as many as the program's threads, or more: each is one thread's.
    """
    NOTHING: tl.constexpr = NOTHING_32 if slots_ptr.dtype.element_ty.primitive_bitwidth == 32 else NOTHING_16
    seen = _look(slots_ptr, offsets, mask, slot_size, COUNT)
    tries = 0
    lost = False
    while (_num_missing(seen, NOTHING, COUNT) > 0) & (lost == False):  # noqa: E712
        seen = _look(slots_ptr, offsets, mask, slot_size, COUNT)
        tries += 1
        if tries == _TRIES:  # one thread asks, for all have to go on or not
            tries = 0
            lost = tl.atomic_add(state_ptr + 2, 0, sem="relaxed") != 0
    if lost:
        tl.store(state_ptr + 3, 1)
    for index in tl.static_range(COUNT):
        nothing = tl.full(offsets.shape, NOTHING, slots_ptr.dtype.element_ty)
        tl.store(slots_ptr + index * slot_size + offsets, nothing, mask=mask)
    return seen


@triton.jit
def _added(own, seen, dtype: tl.constexpr, PLACE: tl.constexpr, RANKS: tl.constexpr):
    """In the order of places, rounded once."""
    total = tl.zeros(own.shape, tl.float32)
    for rank in tl.static_range(RANKS):
        if rank == PLACE:
            total += own.to(dtype, bitcast=True).to(tl.float32)
        elif rank < PLACE:
            total += seen[rank].to(dtype, bitcast=True).to(tl.float32)
        else:
            total += seen[rank - 1].to(dtype, bitcast=True).to(tl.float32)
    return total.to(dtype)


@triton.jit
def _weights(weight_ptr, post_weight_ptr, columns, SIZE: tl.constexpr, NORM: tl.constexpr, POST: tl.constexpr):
    weight, post_weight = 0, 0
    if NORM:
        weight = tl.load(weight_ptr + columns, mask=columns < SIZE, other=0.0)
    if POST:
        post_weight = tl.load(post_weight_ptr + columns, mask=columns < SIZE, other=0.0)
    return weight, post_weight


@triton.jit
def _held(residual_ptr, offsets, mask, NORM: tl.constexpr):
    """The residual, asked for before others are waited for."""
    held = 0.0
    if NORM:
        held = tl.load(residual_ptr + offsets, mask=mask, other=0.0)
    return held


@triton.jit
def _finish(
    total, held, offsets, mask, weight, post_weight, residual_ptr, out_ptr, eps,
    SIZE: tl.constexpr, NORM: tl.constexpr, POST: tl.constexpr,
):  # fmt: skip
    """A row's sum, or with the residual, and the norm of that."""
    if NORM:
        if POST:
            total = normed(total, post_weight, eps, SIZE)
        total = (total + held).to(out_ptr.dtype.element_ty)
        tl.store(residual_ptr + offsets, total, mask=mask)
        total = normed(total, weight, eps, SIZE)
    tl.store(out_ptr + offsets, total, mask=mask)


@triton.jit
def _place(row, columns, numel, SIZE: tl.constexpr):
    offsets = row * SIZE + columns
    return offsets, (columns < SIZE) & (offsets < numel)


@triton.jit
def _send(
    x_ptr, inboxes, begin, row, columns, numel,
    SIZE: tl.constexpr, PLACE: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """A row to all others, where there is such a row."""
    offsets, mask = _place(row, columns, numel, SIZE)
    own = sendable(tl.load(x_ptr + offsets, mask=mask, other=0.0))
    for step in tl.static_range(1, RANKS):
        _leave(inboxes, begin, offsets, own, mask, numel, (PLACE + step) % RANKS, PLACE)


@triton.jit(do_not_specialize=["num_rows"])
def _one_shot_kernel(
    x_ptr, residual_ptr, weight_ptr, post_weight_ptr, out_ptr, inboxes, state_ptr, num_rows, numel, half_size, eps,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, PLACE: tl.constexpr, RANKS: tl.constexpr, NORM: tl.constexpr,
    POST: tl.constexpr, PDL: tl.constexpr, COMPILED: tl.constexpr,
):  # fmt: skip
    """A half has a slot of `numel` for each other rank."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    WIDE: tl.constexpr = dtype.primitive_bitwidth == 32
    columns = tl.arange(0, BLOCK)
    weight, post_weight = _weights(weight_ptr, post_weight_ptr, columns, SIZE, NORM, POST)
    if PDL:
        await_previous()
    half = half_of(state_ptr)
    begin = half * half_size
    ahead = _ROWS_AHEAD * tl.num_programs(0)
    for row in range(tl.program_id(0), min(num_rows, ahead), tl.num_programs(0)):
        _send(x_ptr, inboxes, begin, row, columns, numel, SIZE, PLACE, RANKS)
    _begun(state_ptr, half, COMPILED)
    for row in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        _send(x_ptr, inboxes, begin, row + ahead, columns, numel, SIZE, PLACE, RANKS)
        offsets, mask = _place(row, columns, numel, SIZE)
        own = sendable(tl.load(x_ptr + offsets, mask=mask, other=0.0))
        held = _held(residual_ptr, offsets, mask, NORM)
        seen = _take(inbox_of(inboxes, PLACE, WIDE) + begin, offsets, mask, numel, state_ptr, RANKS - 1)
        total = _added(own, seen, dtype, PLACE, RANKS)
        _finish(total, held, offsets, mask, weight, post_weight, residual_ptr, out_ptr, eps, SIZE, NORM, POST)


@triton.jit(do_not_specialize=["num_rows"])
def _two_shot_kernel(
    x_ptr, residual_ptr, weight_ptr, post_weight_ptr, out_ptr, inboxes, state_ptr, num_rows, numel, half_size, eps,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, PLACE: tl.constexpr, RANKS: tl.constexpr, NORM: tl.constexpr,
    POST: tl.constexpr, PDL: tl.constexpr, COMPILED: tl.constexpr,
):  # fmt: skip
    """A half has room for all sums, and behind them a slot for each other rank, of as many rows as this one adds up.

    A block of rows has one of each rank; the last may have fewer.
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    WIDE: tl.constexpr = dtype.primitive_bitwidth == 32
    columns = tl.arange(0, BLOCK)
    weight, post_weight = _weights(weight_ptr, post_weight_ptr, columns, SIZE, NORM, POST)
    if PDL:
        await_previous()
    half = half_of(state_ptr)
    begin = half * half_size
    num_blocks = tl.cdiv(num_rows, RANKS)
    slot_size = num_blocks * SIZE
    slots = begin + num_blocks * RANKS * SIZE
    inbox = inbox_of(inboxes, PLACE, WIDE)
    for block in range(tl.program_id(0), num_blocks, tl.num_programs(0)):
        within = block * SIZE + columns
        for step in tl.static_range(1, RANKS):
            offsets, mask = _place(block * RANKS + (PLACE + step) % RANKS, columns, numel, SIZE)
            own = sendable(tl.load(x_ptr + offsets, mask=mask, other=0.0))
            _leave(inboxes, slots, within, own, mask, slot_size, (PLACE + step) % RANKS, PLACE)
    _begun(state_ptr, half, COMPILED)
    for block in range(tl.program_id(0), num_blocks, tl.num_programs(0)):
        within = block * SIZE + columns
        offsets, mask = _place(block * RANKS + PLACE, columns, numel, SIZE)
        own = sendable(tl.load(x_ptr + offsets, mask=mask, other=0.0))
        held = _held(residual_ptr, offsets, mask, NORM)
        seen = _take(inbox + slots, within, mask, slot_size, state_ptr, RANKS - 1)
        bits = sendable(_added(own, seen, dtype, PLACE, RANKS))
        for step in tl.static_range(1, RANKS):
            _leave(inboxes, begin, offsets, bits, mask, 0, (PLACE + step) % RANKS, PLACE)
        total = bits.to(dtype, bitcast=True)
        _finish(total, held, offsets, mask, weight, post_weight, residual_ptr, out_ptr, eps, SIZE, NORM, POST)
    for block in range(tl.program_id(0), num_blocks, tl.num_programs(0)):
        for step in tl.static_range(1, RANKS):
            offsets, mask = _place(block * RANKS + (PLACE + step) % RANKS, columns, numel, SIZE)
            held = _held(residual_ptr, offsets, mask, NORM)
            total = _take(inbox + begin, offsets, mask, 0, state_ptr, 1)[0].to(dtype, bitcast=True)
            _finish(total, held, offsets, mask, weight, post_weight, residual_ptr, out_ptr, eps, SIZE, NORM, POST)


@triton.jit
def _sent_kernel(
    residual_ptr, weight_ptr, post_weight_ptr, out_ptr, inboxes, state_ptr, numel, half_size, eps,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, PLACE: tl.constexpr, RANKS: tl.constexpr, POST: tl.constexpr,
    PDL: tl.constexpr, COMPILED: tl.constexpr,
):  # fmt: skip
    """A row for each program, of what the products of all ranks have left: a half has a slot of `numel` for each.

    Nothing but the numbers tells that a product is done, so this rank's is not waited for but at the end, where it has
    ended long since, and the kernel behind may ask for its weights. So nothing is written here that a product reads.
    What is read was written by kernels before the product, which waited for them to end. But only who waits is told to
    forget what an SM's own cache still has of that memory, so it is read past that cache (`volatile`).
    """
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    columns = tl.arange(0, BLOCK)
    weight, post_weight = _weights(weight_ptr, post_weight_ptr, columns, SIZE, True, POST)
    half = tl.load(state_ptr, volatile=True).to(tl.int32)
    if PDL:
        gdc_launch_dependents()
    offsets, mask = _place(tl.program_id(0), columns, numel, SIZE)
    held = tl.load(residual_ptr + offsets, mask=mask, other=0.0, volatile=True)
    slots = inbox_of(inboxes, PLACE, dtype.primitive_bitwidth == 32) + half * half_size
    seen = _take(slots, offsets, mask, numel, state_ptr, RANKS)
    total = _added(seen[0], seen, dtype, RANKS, RANKS)
    _finish(total, held, offsets, mask, weight, post_weight, residual_ptr, out_ptr, eps, SIZE, True, POST)
    _begun(state_ptr, half, COMPILED)  # whose numbers came, they have all read the state
    if PDL:
        gdc_wait()


def suits(x: torch.Tensor, peers: Peers) -> bool:
    """Whether these kernels may, and should, add up x over the ranks."""
    num_bytes = x.numel() * x.itemsize
    return x.dtype in _TYPES and x.is_contiguous() and num_bytes % _ALIGNMENT == 0 and peers.takes(num_bytes)


def suits_rows(x: torch.Tensor, peers: Peers) -> bool:
    """`suits`, with a norm behind: x [T, E]."""
    return suits(x, peers) and x.shape[1] <= _MAX_BLOCK and x.shape[1] * x.itemsize % _ALIGNMENT == 0


def sends(x: torch.Tensor, weight: vector.Matrix, residual: torch.Tensor, peers: Peers) -> bool:
    """Whether the product of x and such a weight, to be added to `residual`, may and should send its result itself."""
    return vector.suits(x, weight) and suits_rows(residual, peers) and residual.dtype == x.dtype


def all_reduce(x: torch.Tensor, peers: Peers) -> torch.Tensor:
    """x, overwritten by its sum over the ranks."""
    _run(x, x, peers, _PIECE)
    return x


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, norm: Norm, post_norm: Norm | None, peers: Peers
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `ingle.kernels.reference.add_rms_norm`, of the sum of x [T, E] over the ranks."""
    out = torch.empty_like(x)
    _run(x, out, peers, x.shape[-1], norm, post_norm, residual)
    return out, residual


def multiply_add_rms_norm(
    x: torch.Tensor,
    weight: vector.Matrix,
    bias: torch.Tensor | None,
    residual: torch.Tensor,
    norm: Norm,
    post_norm: Norm | None,
    peers: Peers,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`add_rms_norm` of x @ weight.T + bias, which the product sends, for residual [T, E]: where it `sends`."""
    out = torch.empty_like(residual)  # before the product, so that it is not where x was
    vector.send(x, weight, bias, peers)
    (num_rows, size), early = residual.shape, pdl(residual.device)
    block = max(triton.next_power_of_2(size), _MIN_BLOCK)
    _sent_kernel[(num_rows,)](
        residual, norm.weight, residual if post_norm is None else post_norm.weight, out, peers.inboxes, peers.state,
        residual.numel(), peers.half_bytes // residual.itemsize, norm.eps,
        SIZE=size, BLOCK=block, PLACE=peers.place, RANKS=len(peers.inboxes), POST=post_norm is not None,
        PDL=early, COMPILED=residual.is_cuda, num_warps=_num_warps(block, residual.itemsize), launch_pdl=early,
    )  # fmt: skip
    return out, residual


def _num_warps(block: int, itemsize: int) -> int:
    return min(block * itemsize // (32 * _ALIGNMENT), 16)


def _run(
    x: torch.Tensor,
    out: torch.Tensor,
    peers: Peers,
    size: int,
    norm: Norm | None = None,
    post_norm: Norm | None = None,
    residual: torch.Tensor | None = None,
) -> None:
    """By rows of `size` numbers, and as many at once as the inboxes hold."""
    numel, early, ranks = x.numel(), pdl(x.device), len(peers.inboxes)
    one_shot = peers.in_one_shot(numel * x.itemsize)
    half_size, num_rows = peers.half_bytes // x.itemsize, triton.cdiv(numel, size)
    most = half_size // size // (ranks - 1) if one_shot else half_size // size // (2 * ranks - 1) * ranks
    block = max(triton.next_power_of_2(size), _MIN_BLOCK)
    kernel, rows_of_program = (_one_shot_kernel, 1) if one_shot else (_two_shot_kernel, ranks)
    two_fit = one_shot and ranks <= _FEW_RANKS and block * x.itemsize <= _SHORT
    most_programs = num_sms(x.device) * (2 if two_fit else 1)
    flat, flat_out = x.view(-1), out.view(-1)
    for start in range(0, num_rows, most):
        rows, begin = min(most, num_rows - start), start * size
        kernel[(min(triton.cdiv(rows, rows_of_program), most_programs),)](
            flat[begin:], x if residual is None else residual.view(-1)[begin:], x if norm is None else norm.weight,
            x if post_norm is None else post_norm.weight, flat_out[begin:], peers.inboxes, peers.state,
            rows, min(rows * size, numel - begin), half_size, 0.0 if norm is None else norm.eps,
            SIZE=size, BLOCK=block, PLACE=peers.place, RANKS=ranks, NORM=norm is not None, POST=post_norm is not None,
            PDL=early, COMPILED=x.is_cuda, num_warps=_num_warps(block, x.itemsize), launch_pdl=early,
        )  # fmt: skip
