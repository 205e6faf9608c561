"""Which kernels a processor gets, by what Linux says of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from ingle.kernels.cpu import targets

_HASWELL = "ssse3 fma cx16 sse4_1 sse4_2 movbe popcnt aes xsave avx f16c rdrand lahf_lm abm bmi1 avx2 bmi2 erms"
_SKYLAKE_SP = f"{_HASWELL} avx512f avx512dq rdseed adx clflushopt clwb avx512cd avx512bw avx512vl xsaveopt pku"
_ICE_LAKE_SP = f"{_SKYLAKE_SP} avx512ifma avx512vbmi avx512_vbmi2 gfni vaes avx512_vnni avx512_bitalg avx512_vpopcntdq"
_ZEN_3 = f"{_HASWELL} sse4a misalignsse rdseed adx sha_ni clzero vaes vpclmulqdq"
_ZEN_4 = f"{_ZEN_3} avx512f avx512dq avx512ifma avx512cd avx512bw avx512vl avx512_bf16 avx512vbmi avx512_vnni"
_N1 = "fp asimd evtstrm aes pmull crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp ssbs"
_V1 = f"{_N1} jscvt fcma sha3 sve asimdfhm dit uscat ilrcpc flagm paca pacg dcpodp svei8mm svebf16 i8mm bf16 dgh rng"
_APPLE_M1 = f"{_N1} jscvt fcma sha3 sha512 asimdfhm dit uscat ilrcpc flagm sb paca pacg dcpodp flagm2 frint"

PROCESSORS = {
    "Nehalem": ("ssse3 cx16 sse4_1 sse4_2 popcnt lahf_lm", None),
    "Ivy Bridge": ("ssse3 cx16 sse4_1 sse4_2 popcnt aes xsave avx f16c rdrand lahf_lm erms", None),
    "Haswell": (_HASWELL, "x86-64-v3"),
    "Alder Lake": (f"{_HASWELL} rdseed adx gfni vaes vpclmulqdq avx_vnni serialize", "x86-64-v3+avxvnni"),
    "Zen 3": (_ZEN_3, "x86-64-v3"),
    "Zen 4": (_ZEN_4, "x86-64-v4+vnni+bf16"),
    "Zen 5": (f"{_ZEN_4} avx_vnni avx512_vp2intersect", "x86-64-v4+vnni+bf16"),
    "Skylake-SP": (_SKYLAKE_SP, "x86-64-v4"),
    "Cascade Lake": (f"{_SKYLAKE_SP} avx512_vnni", "x86-64-v4+vnni"),
    "Ice Lake-SP": (_ICE_LAKE_SP, "x86-64-v4+vnni"),
    "Sapphire Rapids": (f"{_ICE_LAKE_SP} avx_vnni avx512_bf16 amx_bf16 avx512_fp16 amx_tile", "x86-64-v4+vnni+bf16"),
    "Knights Landing": (f"{_HASWELL} avx512f avx512pf avx512er avx512cd", "x86-64-v3"),
    "Cortex-A72": ("fp asimd evtstrm crc32 cpuid", "armv8-a"),
    "Neoverse N1": (_N1, "armv8.2-a+dotprod"),
    "Apple M1": (_APPLE_M1, "armv8.2-a+dotprod"),
    "Apple M2": (f"{_APPLE_M1} i8mm bf16", "armv8.2-a+dotprod+i8mm"),
    "Graviton 3": (_V1, "armv8.2-a+dotprod+i8mm"),
}


@pytest.mark.parametrize("processor", PROCESSORS)
def test_what_a_processor_gets(processor: str, tmp_path: Path) -> None:
    features, best = PROCESSORS[processor]
    arm = "asimd" in features
    cpuinfo = tmp_path / "cpuinfo"
    line = f"Features\t: {features}" if arm else f"flags\t\t: {features}\nvmx flags\t: vnmi ept\nbugs\t\t: spectre_v1"
    cpuinfo.write_text(f"processor\t: 0\n{line}\n\nprocessor\t: 1\n{line}\n")
    suitable = [target.name for target in targets.suitable(targets.features(cpuinfo))]
    assert (suitable[0] if suitable else None) == best
    assert all(targets.TARGETS[name].machine == ("aarch64" if arm else "x86_64") for name in suitable)


def test_a_system_that_lists_no_features(tmp_path: Path) -> None:
    assert targets.suitable(targets.features(tmp_path / "none")) == []


def test_this_processor_itself() -> None:
    assert targets.native().flags[0] in ("-march=native", "-mcpu=native")
    assert targets.native().machine == targets.machine()
