"""The GPUs: their memory, faults and kernels, the links between them, and what is tried on them."""

from __future__ import annotations

import importlib.util
import os
from collections import Counter

from ingle.doctor.children import ProbeError, TookTooLong
from ingle.doctor.finding import Reporter
from ingle.doctor.here import Here
from ingle.doctor.nvidia import Card, Holder, all_hidden
from ingle.engine import gpu_card
from ingle.facts import size

_MUCH_HELD = 0.1
"""Of a GPU's memory: the default of --gpu-memory-utilization leaves so much."""
_SLOW_REDUCE_S = 0.001
_SMALL, _LARGE = 8 << 10, 64 << 20
_FAR = {
    "SYS": "between processors",
    "NODE": "between PCIe hosts",
    "PHB": "by the processor's PCIe",
    "PXB": "by PCIe switches",
    "PIX": "by one PCIe switch",
}
TRITON_PATIENCE, NCCL_PATIENCE = 2, 3
"""How many times as long as an import these may take."""


def check_gpus(here: Here, report: Reporter) -> None:
    seen, cards = here.gpus(), cards_of(here)
    for maker in dict.fromkeys(seen.others) if not cards else ():
        report.ok(f"an {maker} GPU is here and is not used: ingle runs on NVIDIA's GPUs and on CPUs")
    if seen.fault is not None:
        (report.warn if cards else report.fail)(seen.fault, seen.advice)
    elif not cards:
        report.ok("none of NVIDIA's: models run on the CPU")
    for card in cards:
        _report_card(card, report)
    if seen.cards:
        _report_visible(len(cards), report)


def cards_of(here: Here) -> tuple[Card, ...]:
    """As nvidia-smi tells of them; where it does not, and there should be some, as PyTorch does."""
    seen = here.gpus()
    if seen.cards or seen.fault is None or importlib.util.find_spec("torch") is None:
        return seen.cards
    try:
        found = here.torch()["gpus"]
    except ProbeError:
        return ()
    return tuple(Card(index, gpu[0], None, None, capability=(gpu[1], gpu[2])) for index, gpu in enumerate(found))


def _report_card(card: Card, report: Reporter) -> None:
    name = f"GPU {card.index}, {card.name}"
    if card.memory_errors:
        report.fail(
            f"{name}: {card.memory_errors} uncorrectable memory errors (ECC) since its driver was loaded",
            "reboot; if they come again, the card is failing: `nvidia-smi -q -d ECC,ROW_REMAPPER`",
        )
    elif card.old_memory_errors:
        report.warn(
            f"{name}: {card.old_memory_errors} uncorrectable memory errors (ECC) in its life, none since the start",
            "watch it: `nvidia-smi -q -d ECC`",
        )
    if card.repair is not None:
        report.fail(f"{name}: {card.repair}", "reboot; if it stays so, have the card replaced")
    if card.slowed_by:
        report.warn(f"{name} runs slower: {', '.join(card.slowed_by)}", "look at its cooling and its power")
    if card.compute_mode == "Prohibited":
        report.fail(f"{name} lets nobody compute (compute mode Prohibited)", f"nvidia-smi -i {card.index} -c DEFAULT")
    if card.in_pieces:
        _report_pieces(name, card, report)
        return
    old = None if card.capability is None else gpu_card.triton_notice(gpu_card.Card(card.name, card.capability))
    line = f"{name}: {_memory(card.free_bytes, card.total_bytes)}, {_kernels(card, old)}"
    if card.total_bytes and card.used_bytes and card.used_bytes > _MUCH_HELD * card.total_bytes:
        report.warn(f"{line}; {_held(card.holders, card.used_bytes)}", _to_free(card))
    elif old:
        report.warn(line, "--gpu-kernels triton tries Triton's all the same; docs/install.md has a table of cards")
    else:
        report.ok(line)


def _report_pieces(name: str, card: Card, report: Reporter) -> None:
    if not card.pieces:
        report.fail(
            f"{name} is to be parted (MIG) and has no parts: nothing runs on it",
            f"make some (`nvidia-smi mig -cgi`), or `sudo nvidia-smi -i {card.index} -mig 0`",
        )
        return
    parts = ", ".join(_memory(*piece) for piece in card.pieces)
    report.warn(
        f"{name} is in {len(card.pieces)} part{'s' * (len(card.pieces) > 1)} (MIG), and a program gets one: {parts}",
        "`nvidia-smi -L` lists them, for CUDA_VISIBLE_DEVICES",
    )


def _memory(free: int | None, total: int | None) -> str:
    return "memory not told" if free is None or total is None else f"{size(free)} of {size(total)} free"


def _kernels(card: Card, old: str | None) -> str:
    if card.capability is None:
        return "compute capability not told"
    kernels = "PyTorch's operators, slower than ingle's Triton kernels" if old else "ingle's Triton kernels"
    return f"compute capability {card.capability[0]}.{card.capability[1]}, {kernels}"


def _held(holders: tuple[Holder, ...], held: int) -> str:
    if not holders:
        return f"{size(held)} are held by a process that is not seen from here (another container's or user's, or dead)"
    by = [f"{each.name or 'a process'} (pid {each.pid}) holds {size(each.num_bytes or 0)}" for each in holders]
    more = len(by) - 3
    return ", ".join(by[:3]) + (f" and {more} more" if more > 0 else "")


def _to_free(card: Card) -> str:
    pids = " ".join(str(each.pid) for each in card.holders[:3] if each.computes)
    end = f"end it (`kill {pids}`; `ingle ps` lists servers of ingle)" if pids else "`sudo fuser -v /dev/nvidia*` tells"
    return f"{end}, take another GPU by CUDA_VISIBLE_DEVICES, or give less by --gpu-memory-utilization"


def _report_visible(count: int, report: Reporter) -> None:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return
    words = [word.strip() for word in visible.split(",")]
    outside = [word for word in words if word.isdecimal() and int(word) >= count]
    if all_hidden(os.environ):
        report.warn(f"CUDA_VISIBLE_DEVICES={visible!r} hides all GPUs", "unset it: without a GPU models run on the CPU")
    elif outside:
        report.fail(
            f"CUDA_VISIBLE_DEVICES={visible}: there is no GPU {outside[0]}, and what follows it is hidden",
            f"name GPUs from 0 to {count - 1}, or unset it",
        )
    else:
        report.ok(f"CUDA_VISIBLE_DEVICES={visible}: the others are not used")


def check_triton(here: Here, report: Reporter) -> None:
    cards = cards_of(here)
    if not cards:
        return
    if all(card.capability is not None and card.capability < gpu_card.TRITON_SINCE for card in cards):
        report.ok("not used: PyTorch's operators run on GPUs as old as these")
        return
    try:
        found = here.children.ask("triton", TRITON_PATIENCE * here.question.timeout_s)
    except ProbeError as error:
        if _torch_fails(here):
            report.warn("not tried: PyTorch does not find a GPU")
        elif isinstance(error, TookTooLong):
            report.fail(f"compiling a kernel: {error}", "a busy machine takes longer: `ingle doctor --timeout 60`")
        elif "out of memory" in str(error):
            report.warn("not tried: the GPU has no memory left", "free some, as said above, and ask again")
        else:
            needs = "needs a C compiler (`apt-get install gcc`) and a folder to write to (~/.triton, TRITON_CACHE_DIR)"
            report.fail(
                f"does not compile and run a kernel: {error}",
                f"Triton {needs}; --gpu-kernels torch does without Triton",
            )
        return
    if found["right"]:
        report.ok(f"{found['version']} compiles and runs a kernel, in {found['seconds']:.1f} s")
    else:
        report.fail(f"{found['version']}: a kernel gave wrong numbers", "update driver and Triton; the card may be bad")


def check_links(here: Here, report: Reporter) -> None:
    seen = here.gpus()
    if len(seen.cards) < 2:
        return
    if not seen.links:
        report.warn("`nvidia-smi topo -m` does not tell how GPUs are linked")
        return
    kinds = Counter(link.rpartition(" ")[2] for link in seen.links)
    said = [f"{kind} ({_kind(kind)}) × {count}" for kind, count in kinds.most_common()]
    report.ok(f"{seen.links[0]}" if len(seen.links) == 1 else f"between {len(seen.cards)} GPUs: {', '.join(said)}")


def _kind(kind: str) -> str:
    return "NVLink" if kind.startswith("NV") else _FAR.get(kind, "of a kind not known")


def check_nccl(here: Here, report: Reporter) -> None:
    count = len(cards_of(here))
    if count < 2:
        return
    try:
        found = here.children.ask("nccl", NCCL_PATIENCE * here.question.timeout_s)
    except ProbeError as error:
        if _torch_fails(here):
            report.warn("not tried: PyTorch does not find a GPU")
        else:
            report.fail(
                f"GPUs cannot sum up among them: {error}",
                "try NCCL_P2P_DISABLE=1, NCCL_NVLS_ENABLE=0 or NCCL_SHM_DISABLE=1, one at a time; a container needs "
                "--ipc=host; NCCL_DEBUG=INFO says more",
            )
        return
    if found["num_ranks"] < 2:
        report.ok("not tried: PyTorch is shown one GPU alone")
        return
    small, large = found["seconds"][str(_SMALL)], found["seconds"][str(_LARGE)]
    text = (
        f"all-reduce over {found['num_ranks']} GPUs: 8 KiB in {small * 1e6:.0f} us, 64 MiB at "
        f"{_LARGE / large / 1e9:.1f} GB/s"
    )
    if small > _SLOW_REDUCE_S:
        report.warn(text, "several GPUs on one model will be slow: look at the links, and at NCCL_DEBUG=INFO")
    else:
        report.ok(text)


def _torch_fails(here: Here) -> bool:
    try:
        return not here.torch()["available"]
    except ProbeError:
        return True
