"""What nvidia-smi says, and what is found in it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ingle.doctor import gpus, software
from ingle.doctor.children import Children, ProbeError, TookTooLong
from ingle.doctor.finding import Finding
from ingle.doctor.nvidia import Seen, look
from tests.doctor import fakes
from tests.doctor.fakes import FakeHere, findings

HEALTHY = fakes.gpu("NVIDIA H200", fakes.memory(143771, 4, 143156))
TORCH = {
    "version": "2.13.0+cu130", "cuda": "13.0", "available": True, "error": None,
    "built_for": ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"], "gpus": [["NVIDIA H200", 9, 0]],
}  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, xml: str, *more: str, code: int = 0) -> None:
    folder = fakes.nvidia_smi(tmp_path / "bin", xml, *more, code=code)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}/bin")


def seen(xml: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *more: str, code: int = 0) -> Seen:
    use(monkeypatch, tmp_path, xml, *more, code=code)
    return look(Children(), 5.0, tmp_path)


def found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, xml: str, *more: str, code: int = 0) -> list[Finding]:
    use(monkeypatch, tmp_path, xml, *more, code=code)
    return findings(gpus.check_gpus, FakeHere(root=tmp_path))


def test_a_healthy_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [line] = found(tmp_path, monkeypatch, fakes.log(HEALTHY), "0, 9.0\n")
    assert line.state == "ok"
    assert line.text == (
        "GPU 0, NVIDIA H200: 139.80 GiB of 140.40 GiB free, compute capability 9.0, ingle's Triton kernels"
    )


FAULTY = [
    (
        {"faults": "<ecc_errors><volatile><double_bit><device_memory>3</device_memory><total>3</total></double_bit>"
         "</volatile></ecc_errors>"},
        "fail", "3 uncorrectable memory errors (ECC) since",
    ),
    (
        {"faults": "<ecc_errors><aggregate><sram_uncorrectable_parity>1</sram_uncorrectable_parity>"
         "<dram_uncorrectable>4</dram_uncorrectable></aggregate></ecc_errors>"},
        "warn", "5 uncorrectable memory errors (ECC) in its life",
    ),
    (
        {"faults": "<ecc_errors><aggregate><sram_threshold_exceeded>Yes</sram_threshold_exceeded></aggregate>"
         "</ecc_errors>"},
        "fail", "more often than NVIDIA allows",
    ),
    (
        {"faults": "<remapped_rows><remapped_row_pending>Yes</remapped_row_pending></remapped_rows>"},
        "fail", "wait to be replaced",
    ),
    (
        {"faults": "<remapped_rows><remapped_row_failure>Yes</remapped_row_failure></remapped_rows>"},
        "fail", "cannot be replaced any more",
    ),
    (
        {"faults": "<retired_pages><pending_retirement>Yes</pending_retirement></retired_pages>"},
        "fail", "wait to be replaced",
    ),
    ({"more": "<gpu_recovery_action>Reset</gpu_recovery_action>"}, "fail", "asks for this: Reset"),
    ({"more": "<fabric><state>In Progress</state></fabric>"}, "fail", "nvidia-fabricmanager"),
    (
        {"more": "<clocks_event_reasons><clocks_event_reason_hw_thermal_slowdown>Active"
         "</clocks_event_reason_hw_thermal_slowdown></clocks_event_reasons>"},
        "warn", "runs slower: hw thermal slowdown",
    ),
    (
        {"more": "<clocks_throttle_reasons><clocks_throttle_reason_sw_thermal_slowdown>Active"
         "</clocks_throttle_reason_sw_thermal_slowdown></clocks_throttle_reasons>"},
        "warn", "runs slower: sw thermal slowdown",
    ),
    ({"mode": "Prohibited"}, "fail", "lets nobody compute"),
]  # fmt: skip


@pytest.mark.parametrize(("fault", "state", "words"), FAULTY)
def test_a_faulty_gpu(
    fault: dict[str, str], state: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    xml = fakes.log(fakes.gpu("NVIDIA A100-SXM4-80GB", fakes.memory(81920, 3, 81200), **fault))
    first, line = found(tmp_path, monkeypatch, xml, "0, 8.0\n")
    assert first.state == state and words in first.text and first.advice
    assert line.state == "ok"


def test_the_largest_holders_of_memory_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processes = "".join(
        (
            fakes.process(835, "/usr/lib/xorg/Xorg", "140 MiB", "G"),
            fakes.process(7, "/usr/bin/a & b <c>", "10 MiB", "C+G"),
            fakes.process(900, "python3", "9000 MiB"),
            fakes.process(901, "ollama", "2000 MiB"),
        )
    )
    [line] = found(
        tmp_path, monkeypatch,
        fakes.log(fakes.gpu("NVIDIA GeForce RTX 3080", fakes.memory(10240, 9400, 500), processes=processes)),
    )  # fmt: skip
    assert line.state == "warn"
    assert "python3 (pid 900) holds 8.79 GiB, ollama (pid 901) holds 1.95 GiB, Xorg (pid 835)" in line.text
    assert "and 1 more" in line.text
    assert line.advice is not None and "`kill 900 901`" in line.advice, "not what draws the desktop"


def test_a_holder_that_is_not_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [line] = found(tmp_path, monkeypatch, fakes.log(fakes.gpu("Tesla T4", fakes.memory(15360, 14000, 1000))))
    assert line.state == "warn"
    assert "13.67 GiB are held by a process that is not seen from here" in line.text
    assert "compute capability 7.5" in line.text, "by its name: its driver does not tell"


PIECE = "<mig_device><index>0</index>" + fakes.memory(19968, 12, 19955) + "</mig_device>"


def test_a_gpu_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mig = f"<mig_mode><current_mig>Enabled</current_mig></mig_mode><mig_devices>{2 * PIECE}</mig_devices>"
    card = fakes.gpu("NVIDIA A100-SXM4-80GB", fakes.memory(81920, "N/A", "N/A"), mig=mig)
    [line] = found(tmp_path, monkeypatch, fakes.log(card), "0, 8.0\n")
    assert line.state == "warn"
    assert "in 2 parts (MIG), and a program gets one: 19.49 GiB of 19.50 GiB free" in line.text


def test_a_gpu_that_is_to_be_parted_and_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mig = "<mig_mode><current_mig>Enabled</current_mig></mig_mode><mig_devices>\n</mig_devices>"
    card = fakes.gpu("NVIDIA A100-SXM4-80GB", fakes.memory(81920, 0, 81920), mig=mig)
    [line] = found(tmp_path, monkeypatch, fakes.log(card))
    assert line.state == "fail" and "nothing runs on it" in line.text


SAID = [
    (
        "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that the latest "
        "NVIDIA driver is installed and running.\n",
        9, "dkms status",
    ),
    ("Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 550.120\n", 18, "reboot"),
    ("Failed to initialize NVML: Unknown Error\n", 255, "start the container anew"),
    ("Failed to initialize NVML: Insufficient Permissions\n", 4, "usermod -aG video"),
    ("Failed to initialize NVML: GPU access blocked by the operating system\n", 17, "wsl --update"),
    ("No devices were found\n", 6, "--gpus all"),
    (
        "Unable to determine the device handle for GPU0000:41:00.0: GPU is lost.  Reboot the system to recover this "
        "GPU\n",
        15, "fell off the bus",
    ),
    (
        "NVIDIA-SMI couldn't find libnvidia-ml.so library in your system. Please make sure that the NVIDIA Display "
        "Driver is properly installed\n",
        12, "NVIDIA Container Toolkit",
    ),
    ("something new\n", 1, "look at `nvidia-smi`"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "code", "advice"), SAID)
def test_a_driver_that_does_not_answer(
    text: str, code: int, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)  # else PyTorch is asked
    [line] = found(tmp_path, monkeypatch, text, code=code)
    assert line.state == "fail"
    assert " ".join(text.split()) in line.text
    assert line.advice is not None and advice in line.advice


def test_what_is_no_xml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no XML" in (seen("<nvidia_smi_log><gpu>", tmp_path, monkeypatch).fault or "")
    assert seen(fakes.log(), tmp_path, monkeypatch).fault == "the driver sees no card"


def test_a_driver_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexec /bin/sleep 60\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert look(Children(), 0.2, tmp_path).fault == "nvidia-smi: no answer within 0.2 s"


def test_cards_without_a_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for index, (vendor, kind) in enumerate((("0x10de", "0x030000"), ("0x1002", "0x030000"), ("0x10de", "0x040300"))):
        device = tmp_path / f"sys/bus/pci/devices/0000:0{index}:00.0"
        device.mkdir(parents=True)
        (device / "vendor").write_text(f"{vendor}\n")
        (device / "class").write_text(f"{kind}\n")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    other, line = findings(gpus.check_gpus, FakeHere(root=tmp_path))
    assert other.state == "ok" and "AMD" in other.text
    assert line.state == "fail" and line.text == "1 NVIDIA card on the bus and no driver"
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidiactl").touch()
    assert "no nvidia-smi" in findings(gpus.check_gpus, FakeHere(root=tmp_path))[-1].text


@pytest.mark.parametrize(
    ("visible", "state", "words"),
    [
        ("", "warn", "hides all GPUs"),
        ("-1", "warn", "hides all GPUs"),
        ("1", "fail", "no GPU 1"),
        ("0", "ok", "others"),
    ],
)
def test_cuda_visible_devices(
    visible: str, state: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    _, line = found(tmp_path, monkeypatch, fakes.log(HEALTHY), "0, 9.0\n")
    assert line.state == state and words in line.text


# ---- what is tried


def here_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_gpus: int, **answers: object) -> FakeHere:
    capabilities = "".join(f"{index}, 9.0\n" for index in range(num_gpus))
    use(monkeypatch, tmp_path, fakes.log(*num_gpus * [HEALTHY]), capabilities, "\tGPU0\tGPU1\nGPU0\t X \tNV18\n")
    return FakeHere({"torch": TORCH, **answers}, root=tmp_path)


def test_triton(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(answer: object) -> Finding:
        [line] = findings(gpus.check_triton, here_with(tmp_path, monkeypatch, 1, triton=answer))
        return line

    assert check({"right": True, "version": "3.7.1", "seconds": 0.8}).text == (
        "3.7.1 compiles and runs a kernel, in 0.8 s"
    )
    assert check({"right": False, "version": "3.7.1", "seconds": 0.8}).state == "fail"
    broken = check(ProbeError("RuntimeError: Failed to find C compiler. Please specify via CC environment variable"))
    assert broken.state == "fail" and "Failed to find C compiler" in broken.text
    assert broken.advice is not None and "apt-get install gcc" in broken.advice
    assert check(TookTooLong("no answer within 20 s")).advice is not None
    assert check(ProbeError("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 MiB")).state == "warn"


def test_nccl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(answer: object, num_gpus: int = 2) -> list[Finding]:
        return findings(gpus.check_nccl, here_with(tmp_path, monkeypatch, num_gpus, nccl=answer))

    assert check({}, num_gpus=1) == []
    [line] = check({"num_ranks": 2, "seconds": {"8192": 3e-5, "67108864": 4e-4}})
    assert line.state == "ok" and line.text == "all-reduce over 2 GPUs: 8 KiB in 30 us, 64 MiB at 167.8 GB/s"
    [slow] = check({"num_ranks": 2, "seconds": {"8192": 4e-3, "67108864": 0.1}})
    assert slow.state == "warn"
    [broken] = check(TookTooLong("no answer within 60 s"))
    assert broken.state == "fail" and broken.advice is not None and "NCCL_P2P_DISABLE=1" in broken.advice
    [link] = findings(gpus.check_links, here_with(tmp_path, monkeypatch, 2))
    assert link.text == "GPU0-GPU1 NV18"


def test_pytorch_beside_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(**torch: object) -> Finding:
        here = here_with(tmp_path, monkeypatch, 1, torch={**TORCH, **torch})
        return findings(software.check_torch, here)[-1]

    assert check().text == "2.13.0+cu130, for CUDA 13.0, driver 580.95.05 knows CUDA 13.0; it sees 1 GPU"
    assert "built for a CPU alone" in check(cuda=None, version="2.13.0+cpu", available=False).text
    assert check(version="2.13.0+cpu", cuda=None, available=False).state == "fail"
    old = check(gpus=[["Tesla P40", 6, 1]])
    assert old.state == "fail" and "Tesla P40" in old.text and "6.1" in old.text
    dark = check(available=False, error="CUDA unknown error - this may be due to an incorrectly set up environment")
    assert dark.state == "fail" and dark.advice is not None and "nvidia-uvm" in dark.advice
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert check(available=False, gpus=[]).state == "ok", "as the user wants it"
