"""Limits of control groups, on written-down file trees, and on a group of this machine where one can be made."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ingle.cgroup import free_memory_bytes, num_cpus

MIB = 1 << 20
V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate"
V1_MEMORY = "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime shared:12 - cgroup cgroup rw,memory"
V1_CPU = "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct"
NO_LIMIT_V1 = "9223372036854771712"

Files = dict[str, str]


def machine(root: Path, mounts: str, groups: str, files: Files) -> Path:
    """`files` by their path below /sys/fs/cgroup."""
    tree = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    for name, text in {"proc/self/mountinfo": mounts, "proc/self/cgroup": groups, **tree}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


def v2(maximum: object, current: int, files: int = 0, high: object = "max") -> Files:
    stat = f"anon {current - files}\nfile {files}\ninactive_file {files // 2}\nactive_file {files - files // 2}"
    return {
        "memory.max": str(maximum),
        "memory.high": str(high),
        "memory.current": str(current),
        "memory.stat": stat,
    }


def at(folder: str, files: Files) -> Files:
    return {f"{folder}/{name}": text for name, text in files.items()}


MEMORY: dict[str, tuple[str, str, Files, int | None]] = {
    "no groups": ("20 1 8:1 / / rw - ext4 /dev/sda1 rw", "", {}, None),
    "v2 in a container": (V2, "0::/", v2(512 * MIB, 100 * MIB), 412 * MIB),
    "v2 without a limit": (V2, "0::/", v2("max", 100 * MIB), None),
    "v2, memory.high is lower": (V2, "0::/", v2(512 * MIB, 100 * MIB, high=300 * MIB), 200 * MIB),
    "v2, files in memory give way": (V2, "0::/", v2(512 * MIB, 500 * MIB, files=400 * MIB), 412 * MIB),
    "v2, all is used": (V2, "0::/", v2(512 * MIB, 600 * MIB), 0),
    "v2, a group above has the least": (
        V2,
        "0::/system.slice/ingle.service",
        {
            **at("system.slice/ingle.service", v2(512 * MIB, 10 * MIB)),
            **at("system.slice", v2(900 * MIB, 800 * MIB)),
        },
        100 * MIB,
    ),
    "v2, another's group is none of ours": (
        V2,
        "0::/a",
        {**at("a", v2("max", 10 * MIB)), **at("b", v2(64 * MIB, 10 * MIB))},
        None,
    ),
    "v2, above the container's namespace": (V2, "0::/../../x", v2(512 * MIB, 112 * MIB), 400 * MIB),
    "v1": (
        V1_MEMORY,
        "9:name=systemd:/\n4:memory:/docker/7f\n0::/",
        {
            **at("memory/docker/7f", {"memory.limit_in_bytes": str(512 * MIB), "memory.usage_in_bytes": str(80 * MIB),
                                      "memory.stat": f"active_file 1\ntotal_active_file {20 * MIB}\n"
                                                     f"total_inactive_file {10 * MIB}"}),
            **at("memory", {"memory.limit_in_bytes": NO_LIMIT_V1, "memory.usage_in_bytes": "0"}),
        },
        462 * MIB,
    ),
    "v1, the group itself is mounted, as Docker does": (
        V1_MEMORY.replace(" / /sys", " /docker/7f /sys"),
        "4:memory:/docker/7f",
        at("memory", {"memory.limit_in_bytes": str(512 * MIB), "memory.usage_in_bytes": str(12 * MIB)}),
        500 * MIB,
    ),
    "v1, the path is that of the host": (
        V1_MEMORY,
        "4:memory:/kubepods/pod1/c1",
        at("memory", {"memory.limit_in_bytes": str(512 * MIB), "memory.usage_in_bytes": str(12 * MIB)}),
        500 * MIB,
    ),
    "v2 beside v1, as in hybrid systems": (
        V1_MEMORY + "\n" + V2.replace("/sys/fs/cgroup ", "/sys/fs/cgroup/unified "),
        "4:memory:/a\n0::/a",
        {
            **at("memory/a", {"memory.limit_in_bytes": str(300 * MIB), "memory.usage_in_bytes": "0"}),
            **at("unified/a", {"memory.pressure": "some"}),
        },
        300 * MIB,
    ),
    "nonsense": (V2 + "\nx\n - cgroup2", "0\n::\n0::/a", at("a", v2("a lot", 5)), None),
}  # fmt: skip


@pytest.mark.parametrize("name", MEMORY)
def test_free_memory_is_the_least_that_any_group_leaves(name: str, tmp_path: Path) -> None:
    mounts, groups, files, free = MEMORY[name]
    assert free_memory_bytes(machine(tmp_path, mounts, groups, files)) == free


CPUS: dict[str, tuple[str, str, Files, float | None]] = {
    "v2": (V2, "0::/", {"cpu.max": "150000 100000"}, 1.5),
    "v2 without a limit": (V2, "0::/", {"cpu.max": "max 100000"}, None),
    "v2, a group above has the least": (
        V2,
        "0::/a/b",
        {"a/b/cpu.max": "400000 100000", "a/cpu.max": "50000 100000"},
        0.5,
    ),
    "v1": (
        V1_CPU,
        "3:cpu,cpuacct:/docker/7f",
        at("cpu,cpuacct/docker/7f", {"cpu.cfs_quota_us": "200000", "cpu.cfs_period_us": "100000"}),
        2.0,
    ),
    "v1 without a limit": (
        V1_CPU,
        "3:cpu,cpuacct:/",
        at("cpu,cpuacct", {"cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000"}),
        None,
    ),
    "nonsense": (V2, "0::/", {"cpu.max": "1 0"}, None),
}


@pytest.mark.parametrize("name", CPUS)
def test_processors_are_the_least_that_any_group_grants(name: str, tmp_path: Path) -> None:
    mounts, groups, files, granted = CPUS[name]
    assert num_cpus(machine(tmp_path, mounts, groups, files)) == granted


# ---- on this machine

ASK = """
from ingle.engine.memory import free_host_bytes
from ingle.kernels.cpu.threads import default_count
print(free_host_bytes(), default_count())
"""


@contextlib.contextmanager
def group(hierarchy: str, **limits: str) -> Iterator[Path]:
    """A control group with these limits. Skips the test where none can be made."""
    folder = Path("/sys/fs/cgroup") / hierarchy / f"ingle-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"needs the right to make a control group: {error}")
    try:
        for name, value in limits.items():
            try:
                (folder / name.replace("__", ".")).write_text(value)
            except OSError as error:
                pytest.skip(f"the group takes no limits: {error}")
        yield folder
    finally:
        folder.rmdir()


def hierarchy_of(controller: str) -> str:
    return controller if (Path("/sys/fs/cgroup") / controller).is_dir() else ""


def within(folder: Path, code: str) -> list[str]:
    """What a Python process says that is in the group."""
    join = f"import pathlib; pathlib.Path({str(folder / 'cgroup.procs')!r}).write_text('0')\n"
    done = subprocess.run([sys.executable, "-c", join + code], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_a_process_in_a_group_sees_its_memory() -> None:
    version_1 = hierarchy_of("memory") != ""
    limit = {"memory__limit_in_bytes" if version_1 else "memory__max": str(200 * MIB)}
    with group(hierarchy_of("memory"), **limit) as folder:
        free, _ = within(folder, ASK)
    assert 0 < int(free) < 200 * MIB


def test_a_process_in_a_group_sees_its_processors() -> None:
    limits = {"cpu__cfs_quota_us": "100000"} if hierarchy_of("cpu") else {"cpu__max": "100000 100000"}
    with group(hierarchy_of("cpu"), **limits) as folder:
        _, threads = within(folder, ASK)
    assert int(threads) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("limit", ["v", "d"])
def test_limits_of_the_process_itself_count(limit: str) -> None:
    command = f'ulimit -{limit} 4000000; exec "$0" -c "$1"'
    done = subprocess.run(["sh", "-c", command, sys.executable, ASK], capture_output=True, text=True, check=True)
    assert 0 < int(done.stdout.split()[0]) < 4_000_000 * 1024
