"""Python, the packages, PyTorch, Triton, the C++ compiler and the CPU's kernels."""

from __future__ import annotations

import importlib.util
import platform
import sys
from importlib import metadata

from ingle.doctor.finding import Question, Reporter
from ingle.doctor.gpus import driver_cuda
from ingle.doctor.probe import ProbeError, ask
from ingle.kernels.cpu import compile, targets
from ingle.plan.machine import gpus_here

_TORCH_TIMEOUT_S, _TRITON_TIMEOUT_S, _KERNELS_TIMEOUT_S, _NCCL_TIMEOUT_S = 30.0, 60.0, 30.0, 60.0
_LEAST_PYTHON = (3, 10)
_REINSTALL = "install it anew: pip install --force-reinstall torch"
_SLOW_REDUCE_S = 0.001
_SMALL, _LARGE = 8 << 10, 64 << 20


def check_python(question: Question, report: Reporter) -> None:
    version, where = platform.python_version(), sys.prefix
    if sys.version_info[:2] < _LEAST_PYTHON:
        report.fail(f"{version} is too old", "ingle needs Python 3.10 or newer")
    elif sys.maxsize < 1 << 32:
        report.fail(f"{version} is a 32-bit program", "install a 64-bit Python")
    else:
        inside = "" if sys.prefix != sys.base_prefix else ", not a virtual environment"
        report.ok(f"{version} in {where}{inside}")


def check_packages(question: Question, report: Reporter) -> None:
    """What ingle requires is there, in versions that will do."""
    try:
        required = metadata.requires("ingle") or []
    except metadata.PackageNotFoundError:
        report.warn("ingle runs from its source tree, so what it requires is not known", "install it: pip install -e .")
        return
    missing, extras = [], set()
    for line in required:
        name, needs, extra = _requirement(line)
        installed = _installed(name)
        if extra:
            if installed is None:
                extras.add(extra)
        elif needs is not None and (installed is None or not needs(installed)):
            missing.append(line.partition(";")[0].strip() + (f" (there is {installed})" if installed else ""))
    if missing:
        report.fail(f"missing or too old: {', '.join(missing)}", "install them: pip install --upgrade ingle")
    else:
        report.ok("all required ones are there")
    there = sorted({each for each in metadata.metadata("ingle").get_all("Provides-Extra") or [] if each not in extras})
    absent = ", ".join(sorted(extras - {"dev"}))
    more = f"; without {absent}: pip install 'ingle[{absent.split(', ')[0]}]'" if absent else ""
    report.ok(f"optional extras: {', '.join(there) or 'none'}{more}")


def _requirement(line: str):  # type: ignore[no-untyped-def]
    """Name, test of a version, and extra of a requirement; no test for one that is not for this machine."""
    from packaging.requirements import Requirement

    requirement = Requirement(line)
    marker = requirement.marker
    extra = None
    if marker is not None and "extra" in str(marker):
        extra = str(marker).rpartition("extra ==")[2].strip(" '\"")
    applies = marker is None or extra is not None or marker.evaluate()
    test = (lambda version: requirement.specifier.contains(version, prereleases=True)) if applies else None
    return requirement.name, test, extra


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def check_torch(question: Question, report: Reporter) -> None:
    """In a process of its own: what is broken may crash, or never come back."""
    if importlib.util.find_spec("torch") is None:
        report.fail("is not installed", "pip install torch (for a CPU alone: with --index-url .../whl/cpu)")
        return
    try:
        found = ask("torch", _TORCH_TIMEOUT_S)
    except ProbeError as error:
        report.fail(f"cannot be imported: {error}", _REINSTALL)
        return
    gpus, version, cuda = gpus_here(), found["version"], found["cuda"]
    if not gpus:
        report.ok(f"{version}{f', for CUDA {cuda}' if cuda else ', for a CPU alone'}")
        return
    if cuda is None:
        report.fail(
            f"{version} is built for a CPU alone, and there is a GPU: {gpus[0].name}", "install PyTorch with CUDA"
        )
        return
    driver = driver_cuda()
    if driver is not None and driver[0] < int(cuda.partition(".")[0]):
        report.fail(
            f"{version} is built for CUDA {cuda}, the driver knows CUDA {driver[0]}.{driver[1]} at most",
            "update the driver, or install PyTorch for an older CUDA",
        )
        return
    if not found["available"] or found["error"]:
        report.fail(
            f"{version} for CUDA {cuda} sees no GPU: {found['error'] or 'no reason given'}",
            "look at nvidia-smi and at CUDA_VISIBLE_DEVICES",
        )
        return
    built = found["built_for"]
    for major, minor in {tuple(each) for each in found["gpus"]}:
        if not _built_for(major, minor, built):
            report.fail(
                f"{version} has no code for compute capability {major}.{minor}, only {', '.join(built)}",
                "install PyTorch's build for CUDA 12.6 (cu126), which has old cards",
            )
            return
    known = "" if driver is None else f", the driver knows {driver[0]}.{driver[1]}"
    report.ok(f"{version} for CUDA {cuda}{known}; it sees {len(found['gpus'])} GPU{'s' * (len(found['gpus']) > 1)}")


def _built_for(major: int, minor: int, built: list[str]) -> bool:
    """Code runs on later cards of its generation; PTX of any later one."""
    for name in built:
        kind, _, digits = name.partition("_")
        number = "".join(filter(str.isdigit, digits))
        if len(number) < 2:
            continue
        its = int(number[:-1]), int(number[-1])
        if (kind == "sm" and its[0] == major and its[1] <= minor) or (kind == "compute" and its <= (major, minor)):
            return True
    return False


def check_triton(question: Question, report: Reporter) -> None:
    gpus = gpus_here()
    if not gpus:
        report.ok("not needed: there is no GPU")
        return
    try:
        found = ask("triton", _TRITON_TIMEOUT_S)
    except ProbeError as error:
        report.fail(f"does not compile a kernel: {error}", "ingle's GPU kernels need it: pip install triton, and gcc")
        return
    if found["right"]:
        report.ok(f"{found['version']} compiles and runs a kernel, in {found['seconds']:.1f} s")
    else:
        report.fail(f"{found['version']}: a kernel gave wrong numbers", "update driver and Triton; the card may be bad")


def check_nccl(question: Question, report: Reporter) -> None:
    count = len(gpus_here())
    if count < 2:
        report.ok("not needed: there are not several GPUs")
        return
    try:
        found = ask("nccl", _NCCL_TIMEOUT_S)
    except ProbeError as error:
        report.fail(
            f"GPUs cannot sum up among them: {error}",
            "try NCCL_P2P_DISABLE=1 or NCCL_SHM_DISABLE=1; a container needs --ipc=host; NCCL_DEBUG=INFO says more",
        )
        return
    small, large = found["seconds"][str(_SMALL)], found["seconds"][str(_LARGE)]
    text = f"all-reduce over {count} GPUs: 8 KiB in {small * 1e6:.0f} us, 64 MiB at {_LARGE / large / 1e9:.1f} GB/s"
    if small > _SLOW_REDUCE_S:
        report.warn(text, "tensor parallelism will be slow: look at the links, and at NCCL_DEBUG=INFO")
    else:
        report.ok(text)


def check_compiler(question: Question, report: Reporter) -> None:
    features = targets.suitable(targets.features())
    best = features[0].name if features else f"{targets.machine()} without what kernels need"
    try:
        report.ok(f"{compile.find_compiler()}; the processor executes {best}")
    except compile.CompileError as error:
        if any(compile.prebuilt_file(target).is_file() for target in features):
            report.ok(f"none, and none is needed: the kernels came compiled for {best}")
        else:
            report.warn(f"{error}", "install one (apt-get install g++): without it PyTorch's slower operators run")


def check_kernels(question: Question, report: Reporter) -> None:
    try:
        found = ask("kernels", _KERNELS_TIMEOUT_S)
    except ProbeError as error:
        report.fail(f"cannot be loaded: {error}", "run with --cpu-kernels torch, or remove `kernels` in ingle's home")
        return
    if found["failure"]:
        report.warn(f"not there: {found['failure']}", "PyTorch's operators run in their place")
    elif not found["ready"]:
        report.warn("not compiled yet", "the first start on a CPU compiles them, which takes a minute or two")
    else:
        report.ok(f"load, for {found['instructions']}")
