"""Layers as their formats store them become the numbers that they stand for."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
import torch

from ingle.errors import ModelError
from ingle.kernels.cpu import library
from ingle.kernels.reference_coded import multiply_coded
from ingle.weights.code_types import exact as exactly
from ingle.weights.coded_part import CodedPart
from ingle.weights.packed_matrix import PackedMatrix, pack_groups
from ingle.weights.quantized import layouts
from ingle.weights.quantized.groups import Groups
from ingle.weights.quantized.module import Module
from tests.weights.quantized.packers import (
    Written,
    awq,
    bitsandbytes,
    bitsandbytes_int8,
    fp8,
    gemv,
    gptq,
    modelopt_nvfp4,
)

Make = Callable[[int, int], Written]
Read = Callable[[Written], Groups]


def equal(ours: np.ndarray, exact: np.ndarray, atol: float = 2e-7) -> None:
    np.testing.assert_allclose(ours, exact, rtol=3e-7, atol=float(np.abs(exact).max()) * atol)


def test_decoded(case: Make, read: Read) -> None:
    written = case(64, 192)  # of some, three groups or one and a half
    equal(read(written).decoded(), written.exact)


CUTS = ((0, 64), (64, 192), (48, 96), (160, 192), (0, 192), (2, 10))


def test_slices(case: Make, read: Read) -> None:
    """As ranks take them: some outputs, some inputs, and some of both, whatever the columns' order is."""
    written = case(64, 192)
    groups = read(written)
    equal(groups.rows(16, 40).decoded(), written.exact[16:40])
    for start, stop in CUTS:
        of_inputs = groups.columns(start, stop)
        equal(of_inputs.decoded(), written.exact[:, start:stop])
        equal(of_inputs.rows(8, 24).decoded(), written.exact[8:24, start:stop])
        equal(of_inputs.columns(2, 8).decoded(), written.exact[:, start + 2 : start + 8])
    wide = groups.columns(160, 192).widened(90).decoded()
    equal(wide[:, :32], written.exact[:, 160:])
    assert wide.shape == (64, 90) and not wide[:, 32:].any()
    for wrong in ((0, 0), (-2, 8), (64, 200)):
        with pytest.raises(ValueError, match="are no range of 192"):
            groups.columns(*wrong)


def test_slices_with_pytorch(case: Make, read: Read) -> None:
    written = case(64, 192)
    groups = read(written)
    x = torch.randn(3, 192)
    whole = torch.zeros(3, 64)
    for start, stop in ((0, 64), (64, 192)):
        coded = CodedPart.of([groups.columns(start, stop)], torch.float32, torch.device("cpu")).coded
        product = multiply_coded(x[:, start:stop], coded)
        whole += product
    equal(whole.numpy(), x.double().numpy() @ written.exact.T, atol=1e-6)


@pytest.fixture
def kernels() -> None:
    failure = library.start(2)
    if failure is not None:
        pytest.skip(failure)


def all_rows(matrix: PackedMatrix) -> np.ndarray:
    return np.concatenate([part.rows(np.arange(part.num_rows)) for part in matrix.parts])


@pytest.mark.usefixtures("kernels")
def test_packed_for_the_cpu(case: Make, read: Read) -> None:
    """Without loss, but for NF4's numbers; and multiplied, with a number of rows on each side of what a tile holds."""
    written = case(96, 320)
    groups = read(written)
    matrix = pack_groups([groups], 320)
    as_stored = 4e-4 if groups.table == "nf4" else 2e-7
    equal(all_rows(matrix), written.exact, as_stored)
    plain = pack_groups([groups], 320, exactly)
    rng = np.random.default_rng(7)
    for num_rows in (1, 3, 16, 17):
        x = rng.standard_normal((num_rows, 320)).astype(np.float32)
        expected = x.astype(np.float64) @ written.exact.T
        scale = float(np.abs(expected).max())
        np.testing.assert_allclose(matrix.multiply(x), expected, rtol=0, atol=scale * 6e-3)
        np.testing.assert_allclose(plain.multiply(x), expected, rtol=0, atol=scale * 2e-6)
    for start, stop in ((0, 128), (128, 320)):
        part, some = (
            pack_groups([groups.columns(start, stop)], stop - start),
            np.ascontiguousarray(x[:, start:stop]),
        )
        equal(all_rows(part), written.exact[:, start:stop], as_stored)
        expected = some.astype(np.float64) @ written.exact[:, start:stop].T
        np.testing.assert_allclose(part.multiply(some), expected, rtol=0, atol=float(np.abs(expected).max()) * 6e-3)
    padded = sum(part.matrix.group_size * -(-320 // part.matrix.group_size) for part in matrix.parts)
    per_number = matrix.num_bytes * 8 / (96 * padded)
    assert per_number <= {"int4": 6.1, "int8": 10.1, "fp8": 9.1}[groups.kind]


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("make", [lambda: gptq(64, 384, group_size=128, symmetric=False, act_order=True),
                                  lambda: gptq(64, 384, group_size=128, bits=8), lambda: fp8(64, 384)])  # fmt: skip
def test_many_rows_on_the_cpu(read: Read, make: Callable[[], Written]) -> None:
    written = make()
    matrix = pack_groups([read(written)], 384)
    x = np.random.default_rng(8).standard_normal((1000, 384)).astype(np.float32)
    x[5] *= 1000  # every row has a scale of its own
    expected = x.astype(np.float64) @ written.exact.T
    for num_rows in (64, 128, 1000):
        ours = matrix.multiply(x[:num_rows])
        error = np.abs(ours - expected[:num_rows]).max(1) / np.abs(expected[:num_rows]).max(1)
        assert error.max() < 6e-3
    assert np.isnan(matrix.multiply(np.full((1, 384), np.inf, np.float32))).all()


@pytest.mark.usefixtures("kernels")
def test_large_codes_do_not_overflow(read: Read) -> None:
    """The largest activations and codes that there are, all of one sign."""
    written = gptq(32, 512, bits=8, group_size=128, symmetric=False)
    tensors = {**written.tensors, "qweight": torch.full_like(written.tensors["qweight"], -1)}
    tensors["qzeros"] = torch.full_like(written.tensors["qzeros"], -1)  # 255 and one more: zero
    groups = read(Written(tensors, written.exact, written.scheme))
    exact = np.repeat(255 * written.tensors["scales"].double().numpy().T, 128, 1)
    equal(groups.decoded(), exact)
    x = np.ones((3, 512), np.float32)
    np.testing.assert_allclose(pack_groups([groups], 512).multiply(x), x @ exact.T, rtol=1e-5)


@pytest.mark.usefixtures("kernels")
def test_layers_of_one_product(read: Read) -> None:
    """Those that are held alike share a part; another order of inputs is another part."""
    same = [read(gptq(32, 128, seed=seed)) for seed in (1, 2)]
    ordered = [gptq(32, 128, act_order=True, seed=seed) for seed in (3, 4)]
    stored = [*same, *(read(each) for each in ordered)]
    matrix = pack_groups(stored, 128)
    assert [part.num_rows for part in matrix.parts] == [64, 32, 32]
    equal(all_rows(matrix), np.concatenate([each.decoded() for each in stored]))


def test_what_is_wrong_names_the_tensor(module_of: Callable[..., Module]) -> None:
    good, packed = gptq(48, 192), awq(48, 192)
    flat, eight, nvidia, few = bitsandbytes(48, 192), bitsandbytes_int8(48, 192), modelopt_nvfp4(48, 192), gemv(48, 192)
    state = "weight.quant_state.bitsandbytes__nf4"

    def saying(**changes: object) -> torch.Tensor:
        said = json.loads(bytes(flat.tensors[state].tolist()))
        return torch.tensor(list(json.dumps({**said, **changes}).encode()), dtype=torch.uint8)

    floats = fp8(48, 192, scales="channel")
    index = good.tensors["g_idx"]
    for written, changes, says in (
        (good, {"scales": None}, r"model.safetensors: has no tensor m\.scales, which int4 in groups of 64 needs"),
        (good, {"qzeros": None}, r"has no tensor m\.qzeros"),
        (good, {"scales": good.tensors["scales"][:2]}, r"m\.scales has shape \(2, 48\), and .* asks for \(3, 48\)"),
        (good, {"scales": torch.tensor(1.0)}, r"m\.scales has shape \(\), and .* asks for \(3, 48\)"),
        (good, {"qweight": good.tensors["qweight"][:, :40]}, r"m\.qweight has shape \(24, 40\)"),
        (good, {"qweight": good.tensors["qweight"].float()}, r"m\.qweight is F32, and int4 in groups of 64 asks for"),
        (good, {"g_idx": index.roll(1)[index.argsort()] * 0}, r"m\.g_idx does not put 64 inputs into each group"),
        (good, {"g_idx": index * 100}, r"m\.g_idx does not put 64 inputs"),
        (good, {"scales": good.tensors["scales"] * float("nan")}, r"m\.scales has scales that are not finite"),
        (packed, {"qweight": packed.tensors["qweight"][:, :5]}, r"m\.qweight has shape \(192, 5\)"),
        (floats, {"weight": (torch.ones(48, 192) * float("nan")).to(torch.float8_e4m3fn)}, r"m\.weight has numbers"),
        (floats, {"weight_scale": None}, r"has no tensor m\.weight_scale, which FP8 needs beside m\.weight"),
        (floats, {"weight_scale": floats.tensors["weight_scale"][:7]}, r"m\.weight_scale has shape \(7, 1\)"),
        (flat, {"weight.absmax": None}, r"has no tensor m\.weight\.absmax, which NF4 needs beside m\.weight"),
        (flat, {"weight.nested_absmax": None}, r"has no tensor m\.weight\.nested_absmax"),
        (flat, {state: None}, r"has no tensor m\.weight\.quant_state\.bitsandbytes__nf4"),
        (flat, {state: flat.tensors[state][:30]}, r"bitsandbytes__nf4 is no JSON object"),
        (flat, {state: torch.zeros(1 << 17, dtype=torch.uint8)}, r"is U8 \(131072,\), not the bytes of a JSON object"),
        (flat, {state: saying(shape=[48])}, r"says shape \[48\], and a matrix has two dimensions"),
        (flat, {state: saying(blocksize=0)}, r"says blocksize '0', no whole number up to 65536"),
        (flat, {state: saying(blocksize=128)}, r"m\.weight\.absmax has shape \(144,\), and NF4 asks for \(72,\)"),
        (flat, {state: saying(nested_offset=float("nan"))}, r"says nested_offset nan, no number"),
        (flat, {"weight": flat.tensors["weight"][:9]}, r"m\.weight is U8 \(9, 1\), and NF4 asks for 4608 bytes"),
        (flat, {"weight.quant_map": flat.tensors["weight.quant_map"] * 2}, r"quant_map is not the table of NF4"),
        (eight, {"SCB": None}, r"has no tensor m\.SCB, which int8 needs beside m\.weight"),
        (eight, {"SCB": eight.tensors["SCB"][:5]}, r"m\.SCB has shape \(5,\)"),
        (eight, {"weight_format": torch.tensor(2, dtype=torch.uint8)}, r"weight_format says that the rows lie in"),
        (nvidia, {"weight_scale_2": None}, r"has no tensor m\.weight_scale_2, which NVFP4 in groups of 16 needs"),
        (nvidia, {"weight_scale_2": torch.tensor(0.0)}, r"m\.weight_scale_2 is 0\.0, no scale"),
        (nvidia, {"weight_scale": nvidia.tensors["weight_scale"].float()}, r"weight_scale is F32, and NVFP4 in groups"),
        (few, {"scales": few.tensors["scales"][:, :3]}, r"m\.scales has shape \(48, 3\), and int4 in groups"),
    ):  # fmt: skip
        with pytest.raises(ModelError, match=says) as caught:
            layouts.read(module_of(written, **changes), 48, 192)
        assert "\n" not in str(caught.value)
    wrong = gptq(48, 192, group_size=32)
    with pytest.raises(ModelError, match=r"m\.scales has shape \(6, 48\).*; .* these files have groups of 32"):
        layouts.read(module_of(Written(wrong.tensors, wrong.exact, good.scheme)), 48, 192)
    with pytest.raises(ModelError, match="m has 48 rows of 100, which 4 bits a number do not divide into words of 32"):
        layouts.check(module_of(good), 48, 100)


def test_slices_read_no_more_than_they_are(module_of: Callable[..., Module]) -> None:
    """What is stored lies in the file's mapping, and a slice of it too."""
    module = module_of(fp8(48, 192))
    stored = module.tensors.stored("m.weight")
    assert (stored.type, stored.shape) == ("F8_E4M3", (48, 192))
    whole = stored.read()
    groups = layouts.read(module, 48, 192)
    assert not whole.flags.owndata and np.shares_memory(groups.rows(8, 16).codes, groups.codes)
    assert np.array_equal(groups.columns(128, 192).rows(8, 16).codes, whole[8:16, 128:])
