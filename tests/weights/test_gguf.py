from __future__ import annotations

import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ingle.errors import ModelError
from ingle.weights.gguf import BLOCK_TYPES, MAX_ARRAY_DEPTH, GgufFile, header_needs

U32, U64, STRING, ARRAY, UINT8, UINT32 = struct.Struct("<I"), struct.Struct("<Q"), 8, 9, 0, 4


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return U64.pack(len(raw)) + raw


def pair(key: str, type_id: int, value: bytes) -> bytes:
    return text(key) + U32.pack(type_id) + value


def tensor_info(name: str, dims: tuple[int, ...] = (4,), type_id: int = 0, offset: int = 0) -> bytes:
    head = text(name) + U32.pack(len(dims)) + b"".join(U64.pack(dim) for dim in dims)
    return head + U32.pack(type_id) + U64.pack(offset)


def image(
    *, pairs: tuple[bytes, ...] = (), tensors: tuple[bytes, ...] = (), data: bytes = b"", version: int = 3
) -> bytes:
    head = b"GGUF" + U32.pack(version) + U64.pack(len(tensors)) + U64.pack(len(pairs))
    head += b"".join(pairs) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + data


def rich_image() -> bytes:
    """Every kind of metadata, and tensors of two types."""
    vocabulary = b"".join(text(token) for token in ("a", "你", "b" * 20))
    return image(
        pairs=(
            pair("general.architecture", STRING, text("llama")),
            pair("general.alignment", UINT32, U32.pack(32)),
            pair("flag", 7, b"\x01"),
            pair("big", 10, U64.pack(2**60)),
            pair("half", 12, struct.pack("<d", 0.5)),
            pair("tokens", ARRAY, U32.pack(STRING) + U64.pack(3) + vocabulary),
            pair("scores", ARRAY, U32.pack(6) + U64.pack(3) + struct.pack("<3f", 1, 2, 3)),
            pair("nested", ARRAY, U32.pack(ARRAY) + U64.pack(1) + U32.pack(UINT8) + U64.pack(2) + b"\x05\x06"),
        ),
        tensors=(tensor_info("blocks", (32, 2), 2), tensor_info("floats", (4, 2), 0, 64)),
        data=bytes(range(64)) + np.arange(8, dtype="<f4").tobytes(),
    )


@pytest.fixture
def opened(tmp_path: Path):
    def open_image(raw: bytes) -> GgufFile:
        path = tmp_path / "crafted.gguf"
        path.write_bytes(raw)
        return GgufFile(path)

    return open_image


def test_reads_what_the_reference_writer_writes(write_gguf) -> None:
    rng = np.random.default_rng(0)
    metadata = {
        "tokenizer.ggml.tokens": ["<s>", "你好", ""],
        "tokenizer.ggml.scores": [0.5, -1.0, 2.0],
        "llama.block_count": 7,
        "some.flag": True,
        "some.float": 0.25,
    }
    tensors = {"a.weight": rng.normal(size=(6, 64)).astype(np.float32), "b.weight": np.ones(5, np.float16)}
    path = write_gguf(metadata, tensors, {"a.weight": gguf.GGMLQuantizationType.Q4_1})
    file = GgufFile(path)
    assert {key: file.metadata[key] for key in metadata} == metadata
    assert file.metadata["general.architecture"] == "llama"
    for expected in gguf.GGUFReader(path).tensors:
        tensor = file.tensors[expected.name]
        assert tensor.shape == tuple(expected.shape.tolist()[::-1])
        assert (tensor.type, tensor.nbytes, tensor.offset) == (
            expected.tensor_type.name,
            expected.n_bytes,
            expected.data_offset,
        )
        np.testing.assert_array_equal(tensor.data, expected.data.view(np.uint8).reshape(-1))
    assert file.num_parameters == 6 * 64 + 5
    assert file.parameters_by_type == {"Q4_1": 6 * 64, "F16": 5}


def test_block_types_are_those_of_the_reference() -> None:
    for number, block in BLOCK_TYPES.items():
        reference = gguf.GGMLQuantizationType(number)
        assert (block.name, (block.elements, block.nbytes)) == (reference.name, gguf.GGML_QUANT_SIZES[reference])


def test_every_metadata_type_and_version_2(opened) -> None:
    for version in (2, 3):
        raw = bytearray(rich_image())
        raw[4] = version
        file = opened(bytes(raw))
        assert file.metadata == {
            "general.architecture": "llama",
            "general.alignment": 32,
            "flag": True,
            "big": 2**60,
            "half": 0.5,
            "tokens": ["a", "你", "b" * 20],
            "scores": [1.0, 2.0, 3.0],
            "nested": [[5, 6]],
        }
        assert file.tensors["floats"].data.view("<f4").tolist() == list(range(8))


def test_without_texts_all_else_is_the_same(opened) -> None:
    whole = opened(rich_image())
    file = GgufFile(whole.path, texts=False)
    assert file.metadata == {**whole.metadata, "tokens": []}
    assert {name: tensor.offset for name, tensor in file.tensors.items()} == {
        name: tensor.offset for name, tensor in whole.tensors.items()
    }


def test_views_outlive_the_file_object_and_are_read_only(opened) -> None:
    view = opened(rich_image()).tensors["floats"].data
    assert view.view("<f4")[7] == 7.0
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 1


def test_unknown_tensor_type_is_listed_and_refused_on_reading(opened) -> None:
    file = opened(image(tensors=(tensor_info("odd", (4,), 200),), data=bytes(16)))
    tensor = file.tensors["odd"]
    assert (tensor.type, tensor.shape, file.parameters_by_type) == ("unknown-200", (4,), {"unknown-200": 4})
    with pytest.raises(ModelError, match="odd has unknown-200"):
        _ = tensor.data


HUGE = U64.pack(2**63)
NESTED = U32.pack(ARRAY) + U64.pack(1)
BAD_IMAGES = {
    "empty": (b"", "empty"),
    "other format": (b"PK\x03\x04" + bytes(100), "not a GGUF file"),
    "version 1": (image(version=1), "version 1"),
    "big endian": (b"GGUF" + struct.pack(">I", 3) + bytes(64), "big-endian"),
    "tensor count": (b"GGUF" + U32.pack(3) + HUGE + U64.pack(0), "tensors"),
    "key count": (b"GGUF" + U32.pack(3) + U64.pack(0) + HUGE, "metadata keys"),
    "string length": (image(pairs=(pair("k", STRING, HUGE),)), "k needs 9223372036854775808 bytes"),
    "key length": (image(pairs=(HUGE + bytes(40),)), "a metadata key needs"),
    "array length": (image(pairs=(pair("k", ARRAY, U32.pack(UINT8) + HUGE),)), "k claims"),
    "string in array": (image(pairs=(pair("k", ARRAY, U32.pack(STRING) + U64.pack(2) + HUGE),)), "past the end"),
    "array of strings": (image(pairs=(pair("k", ARRAY, U32.pack(STRING) + U64.pack(9) + text("")),)), "past the end"),
    "deep nesting": (image(pairs=(pair("k", ARRAY, NESTED * 50 + U32.pack(UINT8) + U64.pack(0)),)), "nests arrays"),
    "value type": (image(pairs=(pair("k", 13, bytes(8)),)), "unknown type 13"),
    "bad text": (image(pairs=(pair("k", STRING, text(b"\xff\xfe")),)), "not UTF-8"),
    "bad token": (image(pairs=(pair("k", ARRAY, U32.pack(STRING) + U64.pack(1) + text(b"\xff")),)), "element 0"),
    "newline in key": (image(pairs=(pair("k\nv", 7, b"\x00"),)), "not printable"),
    "duplicate key": (image(pairs=(pair("k", 7, b"\x00"),) * 2), "k appears twice"),
    "duplicate tensor": (image(tensors=(tensor_info("t"),) * 2, data=bytes(32)), "t appears twice"),
    "no dimensions": (image(tensors=(tensor_info("t", ()),), data=bytes(32)), "0 dimensions"),
    "dimensions": (image(tensors=(tensor_info("t", (1,) * 5),), data=bytes(32)), "5 dimensions"),
    "zero dimension": (image(tensors=(tensor_info("t", (4, 0)),), data=bytes(32)), "impossible"),
    "overflowing product": (image(tensors=(tensor_info("t", (2**32, 2**32)),), data=bytes(32)), "truncated"),
    "row of half a block": (image(tensors=(tensor_info("t", (33,), 2),), data=bytes(64)), "no multiple of Q4_0's 32"),
    "offset": (image(tensors=(tensor_info("t", (4,), 0, 2**62),), data=bytes(32)), "truncated"),
    "unaligned": (image(tensors=(tensor_info("t", (4,), 0, 8),), data=bytes(64)), "alignment 32"),
    "data cut": (image(tensors=(tensor_info("t", (16,)),), data=bytes(63)), "truncated"),
    "overlap": (
        image(tensors=(tensor_info("t", (16,)), tensor_info("u", (16,), 0, 32)), data=bytes(96)),
        "t and u overlap",
    ),
    "the same place": (image(tensors=(tensor_info("t", (16,)), tensor_info("u", (8,))), data=bytes(64)), "overlap"),
    "alignment 0": (image(pairs=(pair("general.alignment", UINT32, U32.pack(0)),)), "general.alignment is 0"),
    "alignment 24": (image(pairs=(pair("general.alignment", UINT32, U32.pack(24)),)), "general.alignment is 24"),
    "alignment huge": (image(pairs=(pair("general.alignment", UINT32, U32.pack(2**31)),)), "general.alignment"),
    "alignment text": (image(pairs=(pair("general.alignment", STRING, text("32")),)), "general.alignment"),
}


@pytest.mark.parametrize("raw, message", BAD_IMAGES.values(), ids=BAD_IMAGES)
def test_one_line_says_what_is_wrong(opened, raw: bytes, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        opened(raw)
    assert "crafted.gguf" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_nesting_up_to_the_limit_is_read(opened) -> None:
    inner = NESTED * (MAX_ARRAY_DEPTH - 1) + U32.pack(UINT8) + U64.pack(1) + b"\x09"
    assert opened(image(pairs=(pair("k", ARRAY, inner),))).metadata["k"] == [[[[9]]]]


def test_alignment_is_honoured(opened) -> None:
    head = image(
        pairs=(pair("general.alignment", UINT32, U32.pack(256)),),
        tensors=(tensor_info("t", (4,)), tensor_info("u", (4,), 0, 256)),
    )
    floats = np.arange(4, dtype="<f4").tobytes()
    file = opened(head + bytes(-len(head) % 256) + floats + bytes(240) + floats)
    assert file.tensors["t"].offset == 256
    assert file.tensors["u"].data.view("<f4").tolist() == [0, 1, 2, 3]


def part(number: int, count: int, *tensors: str) -> bytes:
    infos = tuple(tensor_info(name, (4,), 0, 32 * i) for i, name in enumerate(tensors))
    pairs = (pair("split.no", 2, struct.pack("<H", number - 1)), pair("split.count", 2, struct.pack("<H", count)))
    return image(pairs=pairs, tensors=infos, data=bytes(32 * len(tensors)))


def write_parts(folder: Path, *parts: tuple[str, ...]) -> list[Path]:
    paths = [folder / f"m-{i:05}-of-{len(parts):05}.gguf" for i in range(1, len(parts) + 1)]
    for number, (path, tensors) in enumerate(zip(paths, parts, strict=True), 1):
        path.write_bytes(part(number, len(parts), *tensors))
    return paths


def test_parts_are_read_as_one_model(tmp_path: Path) -> None:
    first, second, _ = write_parts(tmp_path, (), ("a", "b"), ("c",))
    file = GgufFile(first)
    assert {name: tensor.path for name, tensor in file.tensors.items()}["b"] == second
    assert file.num_parameters == 12 and file.tensors["c"].data.tolist() == [0] * 16


def test_parts_that_do_not_belong_together(tmp_path: Path) -> None:
    first, second, third = write_parts(tmp_path, (), ("a",), ("a",))
    with pytest.raises(ModelError, match=r"m-00003-of-00003\.gguf: has tensor a, as m-00002-of-00003\.gguf has"):
        GgufFile(first)
    with pytest.raises(ModelError, match=r"part 00002 .* give the first, m-00001-of-00003\.gguf"):
        GgufFile(second)
    third.unlink()
    with pytest.raises(ModelError, match=r"m-00003-of-00003\.gguf: no such file"):
        GgufFile(first)
    with pytest.raises(ModelError, match="not named so"):
        GgufFile(first.rename(tmp_path / "model.gguf"))


def test_missing_files_and_folders(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent.gguf", tmp_path / ("x" * 300), tmp_path / "a\0b"):
        with pytest.raises(ModelError):
            GgufFile(path)


RICH = rich_image()


@given(cut=st.integers(0, len(RICH) - 1))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_truncated_anywhere_is_a_model_error(opened, cut: int) -> None:
    with pytest.raises(ModelError):
        opened(RICH[:cut])


@given(st.lists(st.tuples(st.integers(0, len(RICH) - 1), st.integers(0, 255)), min_size=1, max_size=8))
@example([(8, 255), (15, 255)])
@settings(max_examples=600, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_flipped_bytes_give_a_file_within_bounds_or_a_model_error(opened, flips: list[tuple[int, int]]) -> None:
    raw = bytearray(RICH)
    for position, value in flips:
        raw[position] = value
    try:
        file = opened(bytes(raw))
    except ModelError as error:
        assert "\n" not in str(error)
        return
    for tensor in file.tensors.values():
        assert 0 < tensor.offset <= tensor.offset + tensor.nbytes <= len(raw)
        assert tensor.nbytes == 0 or tensor.data.nbytes == tensor.nbytes


def test_crafted_header_cannot_take_much_memory(tmp_path: Path) -> None:
    """A large sparse file may claim a billion elements with room for them; the reader must refuse, not build lists."""
    path = tmp_path / "sparse.gguf"
    with path.open("wb") as file:
        file.write(b"GGUF" + U32.pack(3) + U64.pack(0) + U64.pack(1))
        file.write(pair("k", ARRAY, U32.pack(UINT8) + U64.pack(10**9)))
        file.truncate(4 << 30)
    tracemalloc.start()
    try:
        with pytest.raises(ModelError, match="claims 1000000000 elements"):
            GgufFile(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_header_of_which_the_beginning_is_known_asks_for_more_until_it_is_whole(tmp_path: Path) -> None:
    raw, path = rich_image(), tmp_path / "hollow.gguf"
    enough = []
    for known in range(4, len(raw)):
        path.write_bytes(raw[:known] + bytes(len(raw) - known))
        needed = header_needs(path, known)
        if needed == known:
            enough.append(known)
        else:
            assert known < needed <= (enough or [len(raw)])[0]
    assert enough and enough == list(range(enough[0], len(raw))), "and then never again"
    path.write_bytes(raw[: enough[0]] + bytes(len(raw) - enough[0]))
    assert GgufFile(path).metadata == header_metadata(raw, tmp_path)


def header_metadata(raw: bytes, folder: Path) -> dict[str, object]:
    (folder / "whole.gguf").write_bytes(raw)
    return GgufFile(folder / "whole.gguf").metadata


def test_reader_does_not_import_torch() -> None:
    code = "import sys, ingle.weights.gguf, ingle.weights.hf_config; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
