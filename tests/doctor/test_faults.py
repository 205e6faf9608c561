"""`ingle doctor --json` on machines on which something is broken."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import pytest

from tests.doctor import fakes

COMMAND = [sys.executable, "-m", "ingle", "doctor", "--json"]
QUICK = {"HF_HUB_OFFLINE": "1"}


class Doctor(NamedTuple):
    code: int
    findings: list[dict[str, Any]]
    seconds: float

    def of(self, check: str, state: str | None = None) -> list[str]:
        """What was found, with the advice."""
        return [
            " -> ".join(filter(None, (each["text"], each["advice"])))
            for each in self.findings
            if each["check"] == check and state in (None, each["state"])
        ]

    def says(self, check: str, state: str, *words: str) -> bool:
        return any(all(word in text for word in words) for text in self.of(check, state))


def doctor(
    *flags: str,
    before: Sequence[str] = (),
    start: Callable[[], None] | None = None,
    path: Path | None = None,
    **environment: str,
) -> Doctor:
    """In this environment, but for what is named; `path` stands before what is imported."""
    places = [*([] if path is None else [str(path)]), *filter(None, [os.environ.get("PYTHONPATH")])]
    whole = {**os.environ, "PYTHONPATH": os.pathsep.join(places), **environment}
    started = time.monotonic()
    done = subprocess.run(
        [*before, *COMMAND, *flags], env=whole, preexec_fn=start, capture_output=True, text=True, timeout=60
    )
    assert all(line.startswith("notice: ") for line in done.stderr.splitlines()) and done.returncode in (0, 1), done
    told = json.loads(done.stdout)
    fails = [each for each in told["findings"] if each["state"] == "fail"]
    assert told["ok"] == (not fails) == (done.returncode == 0), "the exit code is 1 exactly where something fails"
    return Doctor(done.returncode, told["findings"], time.monotonic() - started)


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Doctor:
    """PyTorch does not import, there is no compiler, the port is taken, few files may be open, hubs are not reached."""
    folder = tmp_path_factory.mktemp("broken")
    torch = fakes.package(
        folder / "packages", "torch",
        "raise ImportError('libcudart.so.13: cannot open shared object file: No such file or directory')",
    )  # fmt: skip
    (folder / "bin").mkdir()
    closed = f"http://127.0.0.1:{fakes.closed_port()}"
    with fakes.taken_port() as port:
        return doctor(
            "smollm:135m", "--port", str(port),
            start=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128)),
            path=torch, PATH=str(folder / "bin"), INGLE_HOME=str(folder / "home"), CXX="", HF_HUB_OFFLINE="",
            HF_ENDPOINT=closed, MODELSCOPE_ENDPOINT="https://modelscope.test", MODELSCOPE_DOMAIN="",
            https_proxy=closed.replace("//", "//me:secret@"), all_proxy="", no_proxy="127.0.0.1",
        )  # fmt: skip


def test_a_pytorch_that_does_not_import_is_named_with_its_file_and_its_cure(broken: Doctor) -> None:
    assert broken.says("PyTorch", "fail", "libcudart.so.13", "pip install", "packages/torch")
    assert broken.code == 1


def test_a_taken_port_is_named_with_who_has_it(broken: Doctor) -> None:
    assert broken.says("port", "fail", "is taken by pid", str(os.getpid()), "--port")


def test_no_compiler_is_named_with_its_cure(broken: Doctor) -> None:
    [(text)] = broken.of("compiler")
    assert "there is no C++ compiler" in text or "the kernels came compiled" in text
    if "no C++ compiler" in text:
        assert broken.says("compiler", "warn", "apt-get install g++")


def test_few_open_files_are_named_with_their_cure(broken: Doctor) -> None:
    assert broken.says("limits", "fail", "128 open files", "ulimit -n 65536", "LimitNOFILE")


def test_hubs_that_are_not_reached_are_named_with_the_variable_to_correct(broken: Doctor) -> None:
    assert broken.says("hubs", "warn", "Hugging Face", "by HF_ENDPOINT", "refused", "correct or unset HF_ENDPOINT")
    assert broken.says("hubs", "warn", "ModelScope", "through the proxy", "MODELSCOPE_ENDPOINT and https_proxy")
    assert "secret" not in str(broken.findings)


def test_a_model_that_is_not_there_is_named_with_near_ones(broken: Doctor) -> None:
    assert broken.says("model", "fail", "smollm:135m", "did you mean smollm2:135m")


def test_it_is_quick(broken: Doctor) -> None:
    assert broken.seconds < 15, "on a busy machine; some 1.5 s on an idle one"


@pytest.fixture(scope="module")
def sick_gpus(tmp_path_factory: pytest.TempPathFactory) -> Doctor:
    """Three GPUs with faults, and a driver that is older than PyTorch's CUDA; a clock that is behind."""
    folder = tmp_path_factory.mktemp("gpus")
    xml = fakes.log(
        fakes.gpu(
            "NVIDIA GeForce RTX 3090", fakes.memory(24576, 21000, 3276),
            processes=fakes.process(4711, "/opt/conda/bin/python train.py", "20800 MiB"),
        ),
        fakes.gpu(
            "NVIDIA A100-SXM4-80GB", fakes.memory(81920, 3, 81200),
            faults="<ecc_errors><volatile><sram_uncorrectable>0</sram_uncorrectable><dram_correctable>9"
            "</dram_correctable><dram_uncorrectable>2</dram_uncorrectable></volatile></ecc_errors>",
        ),
        fakes.gpu("Tesla P40", fakes.memory(23040, 0, 22900)),
        driver="550.54.15", cuda="12.4",
    )  # fmt: skip
    rows = (
        "\tGPU0\tGPU1\tGPU2\tCPU Affinity",
        "GPU0\t X \tNV4\tSYS\t0-31",
        "GPU1\tNV4\t X \tSYS\t0-31",
        "GPU2\tSYS\tSYS\t X \t0-31",
    )
    smi = fakes.nvidia_smi(folder / "bin", xml, "0, 8.6\n1, 8.0\n2, 6.1\n", "\n".join(rows))
    with hub(formatdate(time.time() + 2 * 86400, usegmt=True)) as endpoint:
        return doctor(
            "--port", "0", path=fakes.package(folder / "packages", "torch", fakes.OLD_DRIVER),
            PATH=f"{smi}{os.pathsep}{os.environ['PATH']}", CUDA_VISIBLE_DEVICES="0,1,2,7",
            INGLE_HOME=str(folder / "home"),
            HF_HUB_OFFLINE="", HF_ENDPOINT=endpoint, MODELSCOPE_ENDPOINT=endpoint, no_proxy="127.0.0.1",
        )  # fmt: skip


@contextmanager
def hub(date: str) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response_only(200)
            self.send_header("Date", date)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def test_a_driver_older_than_pytorchs_cuda_is_named_with_both_ways_out(sick_gpus: Doctor) -> None:
    said = ("built for CUDA 13.0", "driver 550.54.15 knows CUDA 12.4", "580 or newer", "whl/cu126")
    assert sick_gpus.says("PyTorch", "fail", *said)


def test_who_holds_a_gpus_memory_is_named(sick_gpus: Doctor) -> None:
    assert sick_gpus.says("GPUs", "warn", "GPU 0", "3.20 GiB of 24.00 GiB free", "python (pid 4711)", "`kill 4711`")


def test_memory_errors_fail(sick_gpus: Doctor) -> None:
    assert sick_gpus.says("GPUs", "fail", "GPU 1", "2 uncorrectable memory errors (ECC)", "reboot")


def test_an_old_gpu_runs_pytorchs_operators(sick_gpus: Doctor) -> None:
    assert sick_gpus.says("GPUs", "warn", "Tesla P40", "compute capability 6.1", "PyTorch's operators")


def test_a_gpu_that_is_not_there_is_named_in_cuda_visible_devices(sick_gpus: Doctor) -> None:
    assert sick_gpus.says("GPUs", "fail", "CUDA_VISIBLE_DEVICES=0,1,2,7", "no GPU 7", "from 0 to 2")


def test_links_are_told_and_what_needs_pytorch_is_not_tried(sick_gpus: Doctor) -> None:
    assert sick_gpus.says("links", "ok", "SYS (between processors) × 2", "NV4 (NVLink) × 1")
    assert sick_gpus.says("Triton", "warn", "not tried") and sick_gpus.says("NCCL", "warn", "not tried")


def test_a_clock_two_days_behind_fails(sick_gpus: Doctor) -> None:
    assert sick_gpus.says("clock", "fail", " s behind ", "timedatectl set-ntp true")
    assert sick_gpus.says("hubs", "ok", "Hugging Face", "answers in")


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    """A real one, in a file system of 64 KiB that this process alone sees."""
    shell = shutil.which("unshare")
    mount = f'mount -t tmpfs -o size=64k full {tmp_path} && mkdir {tmp_path}/home && exec "$@"'
    before = [shell or "unshare", "-Urm", "sh", "-c", mount, "sh"]
    if shell is None or subprocess.run([*before, "true"], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    broken = fakes.package(tmp_path.parent / f"{tmp_path.name}-packages", "torch", "raise OSError('libcudart.so.12')")
    found = doctor("--port", "0", before=before, path=broken, INGLE_HOME=str(tmp_path / "home"), **QUICK)
    assert found.says("disk", "fail", f"{tmp_path}/home", "the disk is full", "point INGLE_HOME and HF_HOME to another")
    assert found.says("PyTorch", "fail", "OSError: libcudart.so.12")
    assert found.code == 1


def test_a_whole_machine_and_a_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}')
    found = doctor(str(tmp_path), "--port", "0", **QUICK)
    assert found.says("model", "fail", f"{tmp_path}: no tokenizer", "tokenizer.json")
    assert [each["check"] for each in found.findings if each["state"] == "fail"] == ["model"] * len(found.of("model"))
    assert {"Python", "packages", "PyTorch", "GPUs", "memory", "disk", "port"} <= {e["check"] for e in found.findings}
