"""What a machine with GPUs says, in the words of nvidia-smi, and a PyTorch that is broken in some way."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ingle.doctor.children import Children
from ingle.doctor.finding import Finding, Reporter
from ingle.doctor.here import Here, Question

NO_ECC = """
    <ecc_errors>
      <volatile><sram_correctable>N/A</sram_correctable><sram_uncorrectable_parity>N/A</sram_uncorrectable_parity>
        <dram_correctable>N/A</dram_correctable><dram_uncorrectable>N/A</dram_uncorrectable></volatile>
      <aggregate><sram_correctable>N/A</sram_correctable><dram_uncorrectable>N/A</dram_uncorrectable>
        <sram_threshold_exceeded>N/A</sram_threshold_exceeded></aggregate>
    </ecc_errors>
    <retired_pages><pending_blacklist>N/A</pending_blacklist><pending_retirement>N/A</pending_retirement></retired_pages>
    <remapped_rows>N/A</remapped_rows>"""
MIG_OFF = """
    <mig_mode><current_mig>N/A</current_mig><pending_mig>N/A</pending_mig></mig_mode>
    <mig_devices>None</mig_devices>"""


def memory(total: int | str, used: int | str, free: int | str) -> str:
    rows = {"total": total, "reserved": 300, "used": used, "free": free}
    inner = "".join(
        f"<{name}>{value} MiB</{name}>" if isinstance(value, int) else f"<{name}>{value}</{name}>"
        for name, value in rows.items()
    )
    return f"<fb_memory_usage>{inner}</fb_memory_usage>"


def process(pid: int, name: str, used: str, kind: str = "C") -> str:
    return (
        "<process_info><gpu_instance_id>N/A</gpu_instance_id><compute_instance_id>N/A</compute_instance_id>"
        f"<pid>{pid}</pid><type>{kind}</type><process_name>{name}</process_name><used_memory>{used}</used_memory>"
        "</process_info>"
    )


def gpu(
    name: str,
    fb: str,
    *,
    processes: str = "",
    faults: str = NO_ECC,
    mig: str = MIG_OFF,
    more: str = "",
    mode: str = "Default",
) -> str:
    """In the order in which drivers since 2023 write it, without what nobody reads."""
    return f"""
  <gpu id="00000000:01:00.0">
    <product_name>{name}</product_name>
    <product_brand>NVIDIA</product_brand>{mig}
    <uuid>GPU-513536b6-7d19-9063-b049-1e69664bb298</uuid>
    {more}
    {fb}
    <bar1_memory_usage><total>256 MiB</total><used>2 MiB</used><free>254 MiB</free></bar1_memory_usage>
    <compute_mode>{mode}</compute_mode>{faults}
    <processes>{processes}</processes>
    <accounted_processes>
    </accounted_processes>
  </gpu>"""


def log(*gpus: str, driver: str = "580.95.05", cuda: str = "13.0") -> str:
    return f"""<?xml version="1.0" ?>
<!DOCTYPE nvidia_smi_log SYSTEM "nvsmi_device_v12.dtd">
<nvidia_smi_log>
  <timestamp>Sun Nov 29 08:19:57 2026</timestamp>
  <driver_version>{driver}</driver_version>
  <cuda_version>{cuda}</cuda_version>
  <attached_gpus>{len(gpus)}</attached_gpus>{"".join(gpus)}

</nvidia_smi_log>
"""


def nvidia_smi(folder: Path, xml: str, capabilities: str = "", topology: str = "", code: int = 0) -> Path:
    """Writes a program that prints these; returns the folder for the path."""
    folder.mkdir(exist_ok=True)
    for name, text in (("q", xml), ("capabilities", capabilities), ("topology", topology)):
        (folder / name).write_text(text, encoding="utf-8")
    program = folder / "nvidia-smi"
    program.write_text(
        f"""#!/bin/sh
case "$*" in
  "-q -x") /bin/cat '{folder}/q'; exit {code};;
  --query-gpu=index,compute_cap*) /bin/cat '{folder}/capabilities';;
  "topo -m") /bin/cat '{folder}/topology';;
  *) echo "ERROR: Option $1 is not recognized."; exit 2;;
esac
"""
    )
    program.chmod(0o755)
    return folder


OLD_DRIVER = """
class version:
    cuda = "13.0"
__version__ = "2.13.0+cu130"
class cuda:
    is_available = staticmethod(lambda: False)
    def init():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 12040). Please update your GPU "
                           "driver by downloading and installing a new version")
"""


def package(folder: Path, name: str, source: str) -> Path:
    """A package that stands before the installed one; returns the folder for PYTHONPATH."""
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(source)
    return folder


@contextmanager
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()[1]


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port: int = listening.getsockname()[1]
    return port


class FakeHere(Here):
    """This machine, where a probe answers what a test wants: a dict, or the exception that it raises."""

    def __init__(self, answers: dict[str, object] | None = None, **question: object) -> None:
        super().__init__(Question(**{"timeout_s": 10.0, **question}))  # type: ignore[arg-type]
        self.children = _Answering(answers or {})


class _Answering(Children):
    def __init__(self, answers: dict[str, object]) -> None:
        super().__init__()
        self._answers = answers

    def ask(self, name: str, timeout_s: float, *words: str) -> dict[str, object]:
        answer = self._answers[name]
        if isinstance(answer, Exception):
            raise answer
        assert isinstance(answer, dict)
        return answer


def findings(check: object, here: Here) -> list[Finding]:
    report = Reporter("check")
    check(here, report)  # type: ignore[operator]
    return report.findings
