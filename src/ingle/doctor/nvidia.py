"""NVIDIA's GPUs as nvidia-smi tells of them, and what it says instead when something is wrong."""

from __future__ import annotations

import html
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from ingle.doctor.children import Children, ProbeError, last_word

_VENDOR = "0x10de"
_DISPLAY_CLASSES = ("0x0300", "0x0302")
_NO_CARD = "`dmesg | grep -i nvrm` says why; a container needs --gpus all"
_PLACES = ("usr/local/nvidia/bin", "usr/lib/wsl/lib")
"""Where nvidia-smi is that is not on the path: in containers of some clouds, and in Windows' Linux."""
_FAULTS = (
    ("version mismatch", "the driver was updated while it was loaded: reboot"),
    ("couldn't communicate", "the driver is not loaded: install it, or look at `dkms status` and Secure Boot; reboot"),
    ("is lost", "the card fell off the bus: reboot; if it comes again, look at its power and its seat, and `dmesg`"),
    ("Unable to determine", "the card does not answer: reboot; `dmesg | grep -i -e xid -e nvrm` says more"),
    ("No devices were found", _NO_CARD),
    ("NVML: Unknown Error", "a container loses its GPUs when its host reloads systemd: start the container anew"),
    ("Insufficient Permissions", "this user may not open /dev/nvidia*: `ls -l /dev/nvidia*`; `usermod -aG video USER`"),
    ("GPU access blocked", "Windows keeps its Linux from the GPU: update NVIDIA's driver there, then `wsl --update`"),
    ("libnvidia-ml", "a container needs --gpus all and the NVIDIA Container Toolkit"),
)
"""What nvidia-smi says, and what helps."""
_MAX_CHARS = 300
_PROCESS_NAME = re.compile(r"(<process_name>)(.*?)(</process_name>)", re.DOTALL)
_SLOWED = ("hw_slowdown", "hw_thermal_slowdown", "sw_thermal_slowdown", "hw_power_brake_slowdown")


@dataclass(frozen=True)
class Holder:
    """A process that holds memory of a GPU."""

    pid: int
    name: str
    num_bytes: int | None
    computes: bool = True
    """Otherwise it draws, as a desktop does."""


@dataclass(frozen=True)
class Card:
    index: int
    name: str
    total_bytes: int | None
    """None where nvidia-smi does not say, as for a card in pieces (MIG)."""
    free_bytes: int | None
    used_bytes: int | None = None
    """The driver itself reserves more."""
    capability: tuple[int, int] | None = None
    holders: tuple[Holder, ...] = ()
    memory_errors: int = 0
    """Uncorrectable ones by ECC since the driver was loaded."""
    old_memory_errors: int = 0
    """In the card's life."""
    repair: str | None = None
    """What is broken until it is reset, or for good."""
    in_pieces: bool = False
    """Parted by MIG."""
    pieces: tuple[tuple[int | None, int | None], ...] = ()
    """Of each: bytes free, and in all."""
    slowed_by: tuple[str, ...] = ()
    compute_mode: str = "Default"


@dataclass(frozen=True)
class Seen:
    cards: tuple[Card, ...] = ()
    driver: str | None = None
    cuda: tuple[int, int] | None = None
    """The newest that the driver knows."""
    fault: str | None = None
    """Why there are no cards, where there should be some."""
    advice: str | None = None
    links: tuple[str, ...] = ()
    """Between each two GPUs, such as `GPU0-GPU1 NV18`."""
    others: tuple[str, ...] = field(default=())
    """Graphics cards of makers whose GPUs are not used."""


def look(children: Children, timeout_s: float, root: Path) -> Seen:
    """Never raises for what is wrong with a GPU."""
    on_bus = _on_bus(root)
    places = (str(root / place) for place in _PLACES)
    program = shutil.which("nvidia-smi") or shutil.which("nvidia-smi", path=os.pathsep.join(places))
    if program is None:
        return _without_program(on_bus, root)
    try:
        said = children.run([program, "-q", "-x"], timeout_s)
    except ProbeError as error:
        return Seen(fault=f"nvidia-smi: {error}", advice="the driver hangs: `dmesg | grep -i -e xid -e nvrm`; reboot")
    if said.code != 0 or "<nvidia_smi_log" not in said.stdout:
        whole = " ".join(f"{said.stdout} {said.stderr}".split())
        words = last_word(said) if said.code < 0 or not whole else whole[:_MAX_CHARS]
        advice = next((advice for text, advice in _FAULTS if text in whole), "look at `nvidia-smi` and `dmesg`")
        return Seen(fault=f"nvidia-smi fails: {words}", advice=advice)
    try:
        log = ElementTree.fromstring(_PROCESS_NAME.sub(_escaped, said.stdout))
    except ElementTree.ParseError as error:
        return Seen(fault=f"nvidia-smi -q -x prints no XML: {error}", advice="look at `nvidia-smi -q -x`")
    capabilities = _capabilities(children, program, timeout_s)
    cards = tuple(_card(index, gpu, capabilities.get(index)) for index, gpu in enumerate(log.iter("gpu")))
    cuda = re.fullmatch(r"(\d+)\.(\d+)", _text(log, "cuda_version"))
    seen = Seen(
        cards,
        _text(log, "driver_version") or None,
        None if cuda is None else (int(cuda[1]), int(cuda[2])),
        links=_links(children, program, timeout_s) if len(cards) > 1 else (),
        others=on_bus.others,
    )
    if not cards:
        return Seen(driver=seen.driver, cuda=seen.cuda, fault="the driver sees no card", advice=_NO_CARD)
    return seen


def all_hidden(environment: Mapping[str, str]) -> bool:
    """Whether the user keeps programs from every GPU."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    return visible is not None and visible.split(",")[0].strip() in ("", "-1")


def _escaped(match: re.Match[str]) -> str:
    """nvidia-smi prints names of processes as they are."""
    return f"{match[1]}{html.escape(html.unescape(match[2]))}{match[3]}"


def _without_program(bus: _Bus, root: Path) -> Seen:
    if (root / "dev/nvidiactl").exists():
        return Seen(
            fault="there is a driver (/dev/nvidiactl) and no nvidia-smi on the path, so its GPUs cannot be looked at",
            advice="a container needs NVIDIA_DRIVER_CAPABILITIES=compute,utility; else install nvidia-utils",
            others=bus.others,
        )
    if bus.num_nvidia:
        return Seen(
            fault=f"{bus.num_nvidia} NVIDIA card{'s' * (bus.num_nvidia > 1)} on the bus and no driver",
            advice="install NVIDIA's driver (Ubuntu: `ubuntu-drivers install`), reboot; a container needs --gpus all",
            others=bus.others,
        )
    return Seen(others=bus.others)


@dataclass(frozen=True)
class _Bus:
    num_nvidia: int
    others: tuple[str, ...]


def _on_bus(root: Path) -> _Bus:
    vendors = []
    for device in sorted((root / "sys/bus/pci/devices").glob("*")):
        try:
            if (device / "class").read_text().startswith(_DISPLAY_CLASSES):
                vendors.append((device / "vendor").read_text().strip())
        except OSError:  # gone meanwhile
            continue
    makers = {"0x1002": "AMD", "0x8086": "Intel"}
    return _Bus(vendors.count(_VENDOR), tuple(makers[vendor] for vendor in vendors if vendor in makers))


def _capabilities(children: Children, program: str, timeout_s: float) -> dict[int, tuple[int, int]]:
    """Of drivers that tell them."""
    try:
        said = children.run([program, "--query-gpu=index,compute_cap", "--format=csv,noheader"], timeout_s)
    except ProbeError:
        return {}
    found = re.findall(r"^(\d+), (\d+)\.(\d+)$", said.stdout, re.MULTILINE)
    return {int(index): (int(major), int(minor)) for index, major, minor in found}


def _card(index: int, gpu: Element, capability: tuple[int, int] | None) -> Card:
    name = _text(gpu, "product_name") or "a GPU without a name"
    volatile, aggregate = gpu.find("ecc_errors/volatile"), gpu.find("ecc_errors/aggregate")
    return Card(
        index,
        name,
        _bytes(_text(gpu, "fb_memory_usage/total")),
        _bytes(_text(gpu, "fb_memory_usage/free")),
        _bytes(_text(gpu, "fb_memory_usage/used")),
        capability or _known_capability(name),
        _holders(gpu),
        _uncorrectable(volatile),
        _uncorrectable(aggregate),
        _repair(gpu),
        _text(gpu, "mig_mode/current_mig") == "Enabled",
        tuple(
            (_bytes(_text(piece, "fb_memory_usage/free")), _bytes(_text(piece, "fb_memory_usage/total")))
            for piece in gpu.iterfind("mig_devices/mig_device")
        ),
        tuple(each.replace("_", " ") for each in _SLOWED if _is_slowed(gpu, each)),
        _text(gpu, "compute_mode") or "Default",
    )


def _known_capability(name: str) -> tuple[int, int] | None:
    from ingle.plan.gpus import find_gpu

    known = find_gpu(name)
    return None if known is None else known.capability


def _text(element: Element, path: str) -> str:
    return (element.findtext(path) or "").strip()


def _bytes(text: str) -> int | None:
    """Such as 24576 MiB."""
    match = re.fullmatch(r"(\d+) MiB", text)
    return None if match is None else int(match[1]) << 20


def _holders(gpu: Element) -> tuple[Holder, ...]:
    """The largest first."""
    found = [_holder(process) for process in gpu.iterfind("processes/process_info")]
    return tuple(sorted(found, key=lambda holder: -(holder.num_bytes or 0)))


def _holder(process: Element) -> Holder:
    pid, name = _text(process, "pid"), _text(process, "process_name")
    return Holder(
        int(pid) if pid.isdecimal() else 0,
        name.split(" ")[0].rpartition("/")[2],
        _bytes(_text(process, "used_memory")),
        "C" in (_text(process, "type") or "C"),
    )


def _uncorrectable(errors: Element | None) -> int:
    """Newer drivers tell them by memory, older ones as double-bit errors with a total."""
    if errors is None:
        return 0
    counts = [_text(errors, "double_bit/total"), *(each.text or "" for each in errors if "uncorrectable" in each.tag)]
    return sum(int(count) for count in counts if count.strip().isdecimal())


def _repair(gpu: Element) -> str | None:
    if _text(gpu, "remapped_rows/remapped_row_failure") == "Yes":
        return "rows of its memory cannot be replaced any more"
    if _text(gpu, "ecc_errors/aggregate/sram_threshold_exceeded") == "Yes":
        return "its on-chip memory has failed more often than NVIDIA allows"
    pending = (
        "remapped_rows/remapped_row_pending",
        "retired_pages/pending_retirement",
        "retired_pages/pending_blacklist",
        "ecc_errors/channel_repair_pending",
        "ecc_errors/tpc_repair_pending",
    )
    if any(_text(gpu, path) == "Yes" for path in pending):
        return "bad parts of its memory wait to be replaced"
    if (action := _text(gpu, "gpu_recovery_action")) not in ("", "None", "N/A"):
        return f"its driver asks for this: {action}"
    if _text(gpu, "fabric/state") in ("In Progress", "Not Started"):
        return "the switch between the GPUs is not set up (`systemctl start nvidia-fabricmanager`)"
    return None


def _is_slowed(gpu: Element, reason: str) -> bool:
    """The group got another name with driver 535."""
    return "Active" in (
        _text(gpu, f"clocks_event_reasons/clocks_event_reason_{reason}"),
        _text(gpu, f"clocks_throttle_reasons/clocks_throttle_reason_{reason}"),
    )


def _links(children: Children, program: str, timeout_s: float) -> tuple[str, ...]:
    try:
        said = children.run([program, "topo", "-m"], timeout_s)
    except ProbeError:
        return ()
    rows = [line.split() for line in re.sub(r"\x1b\[[0-9;]*m", "", said.stdout).splitlines()]
    header = next((row for row in rows if row[:1] == ["GPU0"] and row[1:2] == ["GPU1"]), [])
    names = [word for word in header if re.fullmatch(r"GPU\d+", word)]
    found = []
    for row in rows:
        if row and row[0] in names and row is not header:
            first = names.index(row[0])
            found += [f"{row[0]}-{names[i]} {row[1 + i]}" for i in range(first + 1, len(names)) if len(row) > 1 + i]
    return tuple(found)
