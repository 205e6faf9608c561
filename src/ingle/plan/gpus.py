"""Common GPUs, and GPUs as people write them: `8x24GiB`, `3090:8`, `2xV100-32GB`, `h100`.

Bandwidth and rate are those of the vendor's datasheet or architecture paper: dense products of 16-bit floats, summed in
float32 where tensor cores do that. Memory is what nvidia-smi shows of a card as shipped, so without what ECC takes.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace

from ingle.config import parse_bytes
from ingle.errors import ConfigError
from ingle.facts import size

MAX_GPUS = 1024


@dataclass(frozen=True)
class Gpu:
    name: str
    memory_bytes: int
    bytes_per_s: float | None = None
    """Of its memory; None where nobody knows."""
    flops_per_s: float | None = None
    capability: tuple[int, int] | None = None
    """Compute capability; bfloat16 from 8.0 on."""
    source: str | None = None
    """Where the figures are from."""
    free_bytes: int | None = None
    """What is free of it now; None for a card that is not here."""

    @property
    def computes_bfloat16(self) -> bool:
        """A card of which only the memory is known is taken for a new one."""
        return self.capability is None or self.capability >= (8, 0)


def _gpu(
    name: str, mib: int, gb_per_s: float, tflops: float, capability: tuple[int, int], source: str, *aliases: str
) -> tuple[Gpu, tuple[str, ...]]:
    return Gpu(name, mib << 20, gb_per_s * 1e9, tflops * 1e12, capability, source), aliases


_VOLTA, _TURING, _AMPERE = "V100 datasheet", "Turing architecture paper", "GA102 architecture paper"
_GEFORCE, _ADA, _BLACKWELL = "GeForce product page", "Ada architecture paper", "RTX Blackwell architecture paper"
_ROWS = (
    # name, as nvidia-smi shows memory in MiB, GB/s, dense 16-bit TFLOP/s, compute capability, source; other names
    _gpu("Tesla P40", 23040, 346, 12, (6, 1), "P40 datasheet (float32: float16 is slower)"),
    _gpu("Tesla P100 16GB", 16384, 732, 18.7, (6, 0), "P100 datasheet", "p100"),
    _gpu("Tesla V100 16GB", 16384, 900, 112, (7, 0), _VOLTA, "v100", "v100sxm216gb", "v100pcie16gb"),
    _gpu("Tesla V100 32GB", 32768, 900, 112, (7, 0), _VOLTA, "v100sxm232gb", "v100sxm332gb", "v100pcie32gb", "v10032"),
    _gpu("Tesla V100S 32GB", 32768, 1134, 130, (7, 0), _VOLTA, "v100s", "v100spcie32gb"),
    _gpu("Tesla T4", 15360, 320, 65, (7, 5), "T4 datasheet"),
    _gpu("Quadro RTX 6000", 24576, 672, 130.5, (7, 5), _TURING, "rtx6000"),
    _gpu("TITAN RTX", 24576, 672, 130.5, (7, 5), _TURING),
    _gpu("Quadro RTX 8000", 49152, 672, 130.5, (7, 5), _TURING, "rtx8000"),
    _gpu("RTX 2060", 6144, 336, 25.8, (7, 5), _TURING),
    _gpu("RTX 2070", 8192, 448, 29.9, (7, 5), _TURING),
    _gpu("RTX 2080", 8192, 448, 40.3, (7, 5), _TURING),
    _gpu("RTX 2080 Ti", 11264, 616, 53.8, (7, 5), _TURING),
    _gpu("RTX 3060", 12288, 360, 25.5, (8, 6), _GEFORCE, "rtx306012gb"),
    _gpu("RTX 3060 Ti", 8192, 448, 32.4, (8, 6), _GEFORCE),
    _gpu("RTX 3070", 8192, 448, 40.6, (8, 6), _AMPERE),
    _gpu("RTX 3080", 10240, 760, 59.5, (8, 6), _AMPERE, "rtx308010gb"),
    _gpu("RTX 3080 12GB", 12288, 912, 61.3, (8, 6), _GEFORCE),
    _gpu("RTX 3080 Ti", 12288, 912, 68.2, (8, 6), _AMPERE),
    _gpu("RTX 3090", 24576, 936, 71, (8, 6), _AMPERE),
    _gpu("RTX 3090 Ti", 24564, 1008, 80, (8, 6), _AMPERE),
    _gpu("RTX 4060", 8188, 272, 30.2, (8, 9), _GEFORCE),
    _gpu("RTX 4060 Ti 8GB", 8188, 288, 44.1, (8, 9), _GEFORCE, "rtx4060ti"),
    _gpu("RTX 4060 Ti 16GB", 16380, 288, 44.1, (8, 9), _GEFORCE),
    _gpu("RTX 4070", 12282, 504, 58.3, (8, 9), _GEFORCE),
    _gpu("RTX 4070 Super", 12282, 504, 71, (8, 9), _GEFORCE),
    _gpu("RTX 4070 Ti", 12282, 504, 80.2, (8, 9), _ADA),
    _gpu("RTX 4070 Ti Super", 16376, 672, 88.2, (8, 9), _GEFORCE),
    _gpu("RTX 4080", 16376, 717, 97.5, (8, 9), _ADA),
    _gpu("RTX 4080 Super", 16376, 736, 104.4, (8, 9), _GEFORCE),
    _gpu("RTX 4090", 24564, 1008, 165.2, (8, 9), _ADA),
    _gpu("RTX 4090 D", 24564, 1008, 147, (8, 9), _GEFORCE),
    _gpu("RTX 5060 Ti 16GB", 16311, 448, 47.4, (12, 0), _BLACKWELL, "rtx5060ti"),
    _gpu("RTX 5070", 12227, 672, 61.7, (12, 0), _BLACKWELL),
    _gpu("RTX 5070 Ti", 16303, 896, 87.9, (12, 0), _BLACKWELL),
    _gpu("RTX 5080", 16303, 960, 112.6, (12, 0), _BLACKWELL),
    _gpu("RTX 5090", 32607, 1792, 209.5, (12, 0), _BLACKWELL),
    _gpu("A2", 15356, 200, 18, (8, 6), "A2 datasheet"),
    _gpu("A10", 23028, 600, 125, (8, 6), "A10 datasheet"),
    _gpu("A10G", 23028, 600, 70, (8, 6), "A10G datasheet"),
    _gpu("A16", 15356, 200, 18, (8, 6), "A16 datasheet"),
    _gpu("A30", 24576, 933, 165, (8, 0), "A30 datasheet"),
    _gpu("A40", 46068, 696, 149.7, (8, 6), "A40 datasheet"),
    _gpu("A100 40GB", 40960, 1555, 312, (8, 0), "A100 datasheet", "a100sxm440gb", "a100pcie40gb", "a10040"),
    _gpu("A100 80GB", 81920, 1935, 312, (8, 0), "A100 datasheet (PCIe; SXM has 2,039 GB/s)", "a100", "a100pcie80gb",
         "a10080gbpcie", "a10080", "a800", "a80080gb", "a80080gbpcie"),
    _gpu("A100 SXM 80GB", 81920, 2039, 312, (8, 0), "A100 datasheet", "a100sxm", "a100sxm480gb", "a800sxm480gb"),
    _gpu("RTX A4000", 16376, 448, 76.7, (8, 6), "RTX A4000 datasheet", "a4000"),
    _gpu("RTX A5000", 24564, 768, 111.1, (8, 6), "RTX A5000 datasheet", "a5000"),
    _gpu("RTX A6000", 49140, 768, 154.8, (8, 6), "RTX A6000 datasheet", "a6000"),
    _gpu("L4", 23034, 300, 121, (8, 9), "L4 datasheet"),
    _gpu("L20", 46068, 864, 119.5, (8, 9), "L20 datasheet"),
    _gpu("L40", 46068, 864, 181, (8, 9), "L40 datasheet"),
    _gpu("L40S", 46068, 864, 362, (8, 9), "L40S datasheet"),
    _gpu("RTX 4000 Ada", 20475, 360, 81.9, (8, 9), "RTX 4000 Ada datasheet"),
    _gpu("RTX 5000 Ada", 32760, 576, 261, (8, 9), "RTX 5000 Ada datasheet"),
    _gpu("RTX 6000 Ada", 49140, 960, 364, (8, 9), "RTX 6000 Ada datasheet", "6000ada"),
    _gpu("RTX PRO 6000", 97887, 1792, 503, (12, 0), "RTX PRO 6000 Blackwell datasheet", "rtxpro6000blackwell"),
    _gpu("H20", 97871, 4000, 148, (9, 0), "H20 datasheet"),
    _gpu("H100 PCIe", 81559, 2039, 756, (9, 0), "H100 datasheet", "h100pcie80gb", "h800pcie"),
    _gpu("H100 SXM", 81559, 3352, 989, (9, 0), "H100 datasheet", "h100", "h10080gbhbm3", "h100sxm5", "h800"),
    _gpu("H100 NVL", 95830, 3938, 835, (9, 0), "H100 NVL datasheet"),
    _gpu("GH200", 97871, 4000, 989, (9, 0), "GH200 datasheet", "gh200480gb"),
    _gpu("H200", 143771, 4800, 989, (9, 0), "H200 datasheet", "h200sxm", "h200nvl"),
    _gpu("B200", 183359, 8000, 2250, (10, 0), "HGX B200 datasheet"),
    _gpu("B300", 275040, 8000, 2250, (10, 3), "HGX B300 datasheet"),
    _gpu("DGX Spark", 122880, 273, 62, (12, 1), "DGX Spark datasheet (memory is shared with the CPU)", "gb10"),
)  # fmt: skip

_DECORATION = re.compile(r"nvidia|geforce|tesla|quadro|graphics|generation|edition|server|workstation|laptopgpu|gpu")
_COUNT_FIRST = re.compile(r"(\d{1,3})\s*[x*×]\s*(.+)", re.IGNORECASE)
_COUNT_LAST = re.compile(r"(.+?)\s*[:×*x]\s*(\d{1,4})", re.IGNORECASE)
_AS_SOLD = 0.15
"""By how much a card's memory may differ from that in its name."""
_SIZE = re.compile(r"\d+(?:\.\d+)?\s*[gm]i?b?", re.IGNORECASE)


def _key(name: str) -> str:
    """Letters and digits, without words that vendors put around a name."""
    plain = _DECORATION.sub("", re.sub(r"[^a-z0-9]", "", name.lower()))
    return re.sub(r"(\d)gi?b?$", r"\1gb", plain)


def _keys_of(gpu: Gpu, aliases: tuple[str, ...]) -> list[str]:
    own = _key(gpu.name)
    return [own, own.removeprefix("rtx"), *aliases, *(alias.removeprefix("rtx") for alias in aliases)]


GPUS: dict[str, Gpu] = {}
"""By every name that they go by, in letters and digits."""
for _row, _aliases in _ROWS:
    for _name in _keys_of(_row, _aliases):
        GPUS.setdefault(_name, _row)


def find_gpu(name: str) -> Gpu | None:
    """The card of that name, as people or nvidia-smi write it."""
    key = _key(name)
    if (gpu := GPUS.get(key)) is not None:
        return gpu
    memory = re.search(r"(\d{1,3})gb$", key)
    gpu = None if memory is None else GPUS.get(key[: memory.start()])
    return gpu if memory and gpu and abs(gpu.memory_bytes / (int(memory[1]) << 30) - 1) < _AS_SOLD else None


def all_gpus() -> list[Gpu]:
    return [gpu for gpu, _ in _ROWS]


def parse_gpus(text: str) -> tuple[Gpu, ...]:
    """GPUs as `--gpus` gives them: a count and a name or a size of memory, several kinds with commas between.

    Raises `ConfigError` that shows how to write it.
    """
    found: list[Gpu] = []
    for part in text.split(","):
        count, what = _counted(part.strip())
        if not 1 <= count <= MAX_GPUS:
            raise ConfigError(f"--gpus {text!r:.100}: {count} GPUs are no number of GPUs: give 1 to {MAX_GPUS}")
        found += [_one(text, what)] * count
    if len(found) > MAX_GPUS:
        raise ConfigError(f"--gpus {text!r:.100}: more than {MAX_GPUS} GPUs")
    return tuple(found)


def _counted(part: str) -> tuple[int, str]:
    if find_gpu(part) is None and not _SIZE.fullmatch(part):
        if match := _COUNT_FIRST.fullmatch(part):
            return int(match[1]), match[2]
        if match := _COUNT_LAST.fullmatch(part):
            return int(match[2]), match[1]
    return 1, part


def _one(text: str, what: str) -> Gpu:
    if (gpu := find_gpu(what)) is not None:
        return gpu
    if _SIZE.fullmatch(what.strip()):
        memory = parse_bytes("--gpus", what)
        return Gpu(f"GPU of {size(memory)}", memory)
    near = difflib.get_close_matches(_key(what), GPUS, 3, cutoff=0.6)
    names = ", ".join(dict.fromkeys(GPUS[key].name for key in near))
    raise ConfigError(
        f"--gpus {text!r:.100}: {what!r:.60} is not in ingle's table of GPUs{f'; there is {names}' if names else ''}; "
        "write a name and a number, such as 3090:8 or 2xV100-32GB, or memory, such as 8x24GiB"
    )


def least_of(gpus: tuple[Gpu, ...]) -> Gpu:
    """What all of them have: of a mixed set, each figure of the one that has least."""
    first = gpus[0]
    if all(replace(gpu, free_bytes=first.free_bytes) == first for gpu in gpus):
        free = [gpu.free_bytes for gpu in gpus if gpu.free_bytes is not None]
        return replace(first, free_bytes=min(free, default=None))
    rates = [gpu.bytes_per_s for gpu in gpus], [gpu.flops_per_s for gpu in gpus]
    bandwidth, rate = (None if None in each else min(filter(None, each)) for each in rates)
    capabilities = [gpu.capability for gpu in gpus if gpu.capability is not None]
    free = [gpu.memory_bytes if gpu.free_bytes is None else gpu.free_bytes for gpu in gpus]
    names = " and ".join(dict.fromkeys(gpu.name for gpu in gpus))
    memory = min(gpu.memory_bytes for gpu in gpus)
    return Gpu(f"the least of {names}", memory, bandwidth, rate, min(capabilities, default=None), None, min(free))
