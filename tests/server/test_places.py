"""What each of several engines on one machine gets of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ingle.channel import LENGTH, Share, Start, ToEngine, start_frame
from ingle.config import EngineConfig
from ingle.engine import memory, process
from ingle.errors import ConfigError
from ingle.request import decode_token_ids
from ingle.server.places import places, visible_gpus

TP = "tensor_parallel_size"


def machine(root: Path, gpus: int = 0, nodes: tuple[str, ...] = ()) -> Path:
    (root / "dev").mkdir()
    for number in range(gpus):
        (root / "dev" / f"nvidia{number}").touch()
    for number, cpus in enumerate(nodes):
        folder = root / "sys/devices/system/node" / f"node{number}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(cpus + "\n")
    return root


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")


def gpus_of(root: Path, **options: Any) -> list[str | None]:
    return [share.gpus for _, share in places(EngineConfig.of("m", **options), root)]


def test_one_engine_has_all_of_it(tmp_path: Path) -> None:
    config = EngineConfig.of("m")
    assert places(config, machine(tmp_path, gpus=4)) == [(config, Share())]


def test_each_has_gpus_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = machine(tmp_path, gpus=8)
    assert gpus_of(root, data_parallel_size=2) == ["0", "1"]
    assert gpus_of(root, data_parallel_size=2, **{TP: 2}) == ["0,1", "2,3"]
    assert gpus_of(root, data_parallel_size=2, pipeline_parallel_size=2, **{TP: 2}) == ["0,1,2,3", "4,5,6,7"]
    assert gpus_of(root, data_parallel_size=3, **{TP: "auto"}) == ["0,1", "2,3", "4,5"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5, GPU-ab12,3,1")
    assert gpus_of(root, data_parallel_size=2, **{TP: 2}) == ["5,GPU-ab12", "3,1"]
    ((config, _), _) = places(EngineConfig.of("m", data_parallel_size=2), root)
    assert config.parallel.data_parallel_size == 1 and config.parallel.device == "cuda"


def test_what_cuda_does_not_see_is_not_given(tmp_path: Path) -> None:
    for named, seen in (("", []), ("-1", []), ("1,-1,2", ["1"]), ("2,0", ["2", "0"]), ("0,0", ["0"])):
        assert visible_gpus({"CUDA_VISIBLE_DEVICES": named}, tmp_path) == seen


def test_gpus_without_files_are_counted_by_the_drivers_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'GPU 0: A (UUID: x)'\necho 'GPU 1: A (UUID: y)'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert visible_gpus({}, tmp_path) == ["0", "1"]


@pytest.mark.parametrize(
    ("gpus", "visible", "options", "words"),
    [
        (
            3,
            None,
            {"data_parallel_size": 2, TP: 2},
            "--data-parallel-size 2 --tensor-parallel-size 2: 4 GPUs are needed, and there are 3 here; "
            "leave out --data-parallel-size",
        ),
        (
            4,
            "0,1,2",
            {"data_parallel_size": 4},
            "--data-parallel-size 4: 4 GPUs are needed, and there are 3 here (CUDA_VISIBLE_DEVICES=0,1,2); "
            "--data-parallel-size 3",
        ),
        (
            1,
            None,
            {"data_parallel_size": 2, TP: "auto"},
            "--data-parallel-size 2 --tensor-parallel-size auto: 2 GPUs are needed, and there is 1 here; "
            "leave out --data-parallel-size",
        ),
        (
            0,
            None,
            {"data_parallel_size": 2},
            "--data-parallel-size 2: there is no GPU here; --device cpu has engines side by side on the CPU",
        ),
    ],
)
def test_too_few_gpus_are_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    gpus: int,
    visible: str | None,
    options: dict[str, Any],
    words: str,
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(ConfigError) as error:
        places(EngineConfig.of("m", **options), machine(tmp_path, gpus))
    assert str(error.value) == words


def test_on_a_cpu_threads_and_memory_are_divided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ingle.kernels.cpu.threads.default_count", lambda: 9)
    monkeypatch.setattr("ingle.engine.memory.free_host_bytes", lambda: 1000)
    root = machine(tmp_path)

    def found(**options: Any) -> list[tuple[int | None, int | None]]:
        config = EngineConfig.of("m", device="cpu", **options)
        return [(each.parallel.threads, share.host_bytes) for each, share in places(config, root)]

    assert found(data_parallel_size=2) == [(4, 500)] * 2
    assert found(data_parallel_size=2, **{TP: 2}) == [(2, 500)] * 2
    assert found(data_parallel_size=10) == [(1, 100)] * 10
    assert found(data_parallel_size=2, threads=3) == [(3, 500)] * 2, "of each"


def test_on_a_cpu_each_stays_near_its_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {*range(8)})
    root = machine(tmp_path, nodes=("0-1,4-5", "2-3,6-9"))

    def cpus(count: int) -> list[tuple[int, ...] | None]:
        config = EngineConfig.of("m", device="cpu", data_parallel_size=count)
        return [share.cpus for _, share in places(config, root)]

    assert cpus(2) == [(0, 1, 4, 5), (2, 3, 6, 7)]
    assert cpus(4) == [(0, 1, 4, 5)] * 2 + [(2, 3, 6, 7)] * 2
    assert cpus(3) == [None] * 3


def test_a_host_cache_is_divided_and_a_disks_folder_shared(tmp_path: Path) -> None:
    config = EngineConfig.of("m", device="cpu", data_parallel_size=4, host_cache="8GiB", disk_cache="/d")
    for each, _ in places(config, machine(tmp_path)):
        assert each.cache.host_cache == str(2 << 30) and each.cache.disk_cache == "/d"


def test_an_engine_keeps_to_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[tuple[int, ...]] = []
    monkeypatch.setattr(os, "environ", {"CUDA_VISIBLE_DEVICES": "0,1,2,3"})
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cpus: pinned.append(cpus))
    monkeypatch.setattr(memory, "_shares", [])
    frame = start_frame(EngineConfig.of("m"), Path("m"), Share("2,3", 3 << 30, (4, 5)))
    decoder = msgspec.msgpack.Decoder(ToEngine, dec_hook=decode_token_ids)
    start = decoder.decode(frame[LENGTH.size :])
    assert isinstance(start, Start)
    process._keep_to(Share())
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1,2,3" and not pinned and not memory._shares
    process._keep_to(start.share)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2,3" and pinned == [(4, 5)]
    free = memory.free_host_bytes()
    assert free is None or free < 3 << 30, "this process has some of it already"
