from __future__ import annotations

import io
import json
import os
import pickle
import pickletools
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from ingle.errors import ModelError
from ingle.weights.open import open_source
from ingle.weights.tensor_sources import TorchSource
from ingle.weights.torch_bin import TorchFile
from ingle.weights.torch_pickle import PickleError, read_state_dict
from tests.support import engine_for, engine_logits, random_prompt, save_checkpoint


def state_dict() -> dict[str, Any]:
    torch.manual_seed(0)
    shared = torch.randn(5, 4)
    return OrderedDict(
        plain=torch.randn(2, 3),
        transposed=torch.randn(3, 4).t(),
        slice=shared[1:4, 2:],
        whole=shared,
        half=torch.randn(7).half(),
        brain=torch.randn(2, 2, 2).bfloat16(),
        double=torch.randn(3, dtype=torch.float64),
        parameter=torch.nn.Parameter(torch.randn(2)),
        scalar=torch.tensor(1.5),
        empty=torch.empty(0, 3),
        mask=torch.ones(2, 2, dtype=torch.bool),
        step=3,
    )


def save(folder: Path, state: Any, name: str = "pytorch_model.bin") -> Path:
    torch.save(state, folder / name)
    return folder


def test_tensors_are_what_torch_saved(tmp_path: Path) -> None:
    state = state_dict()
    source = TorchSource(save(tmp_path, state))
    for name, expected in state.items():
        if isinstance(expected, torch.Tensor) and expected.dtype.is_floating_point:
            out = torch.full(expected.shape, 9.0, dtype=torch.float32)
            source.load_into(name, out)
            assert torch.equal(out, expected.detach().float()), name
    assert "step" not in source and "mask" in source
    assert source.stored_types["F32"] == 6 + 12 + 6 + 20 + 2 + 1
    assert source.stored_types["BF16"] == 8 and source.stored_types["BoolStorage"] == 4


def test_modules_state_with_metadata(tmp_path: Path) -> None:
    module = torch.nn.Linear(3, 2)
    source = TorchSource(save(tmp_path, module.state_dict()))
    out = torch.zeros(4, 3, dtype=torch.bfloat16)
    source.load_into("weight", out[1:3])
    assert torch.equal(out[1:3], module.weight.detach().bfloat16()) and out[0].count_nonzero() == 0
    source.close()


def write_shards(folder: Path, tensors: dict[str, torch.Tensor], num_shards: int) -> None:
    weight_map = {}
    for shard in range(num_shards):
        name = f"pytorch_model-{shard + 1:05}-of-{num_shards:05}.bin"
        part = dict(list(tensors.items())[shard::num_shards])
        torch.save(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    write_index(folder, weight_map)


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_engine_runs_bin_checkpoints_like_safetensors(tmp_path: Path) -> None:
    save_checkpoint(tmp_path)
    prompt = random_prompt(0, 40)
    expected = engine_logits(engine_for(tmp_path), prompt)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    write_shards(tmp_path, tensors, 3)
    assert torch.equal(engine_logits(engine_for(tmp_path), prompt), expected)
    (tmp_path / "pytorch_model.bin.index.json").unlink()
    save(tmp_path, tensors)
    assert torch.equal(engine_logits(engine_for(tmp_path, load_format="pt"), prompt), expected)


def test_safetensors_are_preferred(tmp_path: Path) -> None:
    save_checkpoint(tmp_path)
    save(tmp_path, {"w": torch.zeros(1)})
    assert not isinstance(open_source(tmp_path, "auto", 0), TorchSource)


@pytest.mark.parametrize("shard", ["../x.bin", "/etc/x.bin", "sub/x.bin", "", "x.safetensors", "a\\b.bin", ".bin"])
def test_index_cannot_leave_the_folder(tmp_path: Path, shard: str) -> None:
    write_index(tmp_path, {"a": shard})
    with pytest.raises(ModelError, match=r"is not the name of a \.bin file in this folder"):
        TorchSource(tmp_path)


def test_wrong_shapes_and_types(tmp_path: Path) -> None:
    source = TorchSource(save(tmp_path, {"w": torch.zeros(2, 3), "i": torch.zeros(2, dtype=torch.int8)}))
    with pytest.raises(ModelError, match=r"tensor w has shape \(2, 3\).*\(3, 2\)"):
        source.load_into("w", torch.empty(3, 2))
    with pytest.raises(ModelError, match="tensor i is a CharStorage: quantized"):
        source.load_into("i", torch.empty(2))
    with pytest.raises(ModelError, match="has no tensor other"):
        source.load_into("other", torch.empty(2))


class Malicious:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize(
    "function, arguments",
    [
        (os.system, ("touch {}",)),
        (eval, ("open({!r}, 'w')",)),
        (bytearray, (1 << 40,)),
        (torch.zeros, (1 << 40,)),
        (torch.load, ("{}",)),
        (__import__, ("os",)),
    ],
    ids=lambda value: getattr(value, "__name__", "arguments"),
)
def test_malicious_pickles_are_refused_unexecuted(tmp_path: Path, function: Any, arguments: Any) -> None:
    touched = tmp_path / "touched"
    arguments = tuple(a.format(str(touched)) if isinstance(a, str) else a for a in arguments)
    save(tmp_path, {"w": torch.zeros(1), "x": Malicious(function, *arguments)})
    expected = r"pytorch_model\.bin: its pickle is refused: it asks for "
    with pytest.raises(ModelError, match=expected):
        TorchSource(tmp_path)
    assert not touched.exists()


P = b"\x80\x02"
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"
STORAGE = b"((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"


@pytest.mark.parametrize(
    "raw, message",
    [
        (b"", "damaged"),
        (P, "damaged"),
        (P + b".", "holds no dict"),
        (P + b"K\x01.", "holds no dict"),
        (P + b"}(K\x01K\x02u.", "a key that is a int"),
        (P + b"}" + b")" + b"\x85" * 100_000 + b"Ns.", "a key that is a tuple"),
        (P + b"](" + b"K\x01" * 9 + b"u.", "sets items of something"),
        (P + b"}K\x01a.", "appends to something"),
        (P + b"h\x05.", "damaged"),
        (P + b"t.", "damaged"),
        (P + b"(\x85.", "a mark where a value should be"),
        (P + b"\x8c\x02os\x8c\x06system\x93.", "the instruction STACK_GLOBAL"),
        (P + b"\x82\x01.", "the instruction EXT1"),
        (P + b"(ios\nsystem\n.", "the instruction INST"),
        (P + b"I" + b"9" * 10_000 + b"\n.", "damaged"),
        (P + b"ccollections\nOrderedDict\nK\x05\x85R.", "calls something in a way"),
        (P + b"ctorch\nFloatStorage\n)R.", "calls something in a way"),
        (P + TENSOR + STORAGE + b"K\x00K\x02\x85K\x01K\x01\x86\x89NtR.", "fewer strides"),
        (P + b"K\x00Q.", "refers to something that is no storage"),
        (P + b"K\x00Nb.", "gives a state to something"),
    ],
    ids=lambda value: None if isinstance(value, bytes) else value,
)
def test_crafted_pickles(raw: bytes, message: str) -> None:
    with pytest.raises(PickleError, match=message):
        read_state_dict(raw)


def crafted(offset: Any, shape: Any, stride: Any) -> bytes:
    """The pickle of one tensor with any sizes over a storage of four floats."""
    saved = io.BytesIO()
    torch.save({"w": torch.zeros(4)}, saved)
    raw = zipfile.ZipFile(saved).read("archive/data.pkl")
    sizes = b"K\x00K\x04\x85q\x08K\x01\x85q\x09"
    assert sizes in raw
    return raw.replace(sizes, b"".join(pickle.dumps(value, 2)[2:-1] for value in (offset, shape, stride)))


def write_archive(folder: Path, pickled: bytes, compression: int = zipfile.ZIP_STORED) -> TorchFile:
    path = folder / "pytorch_model.bin"
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("m/data.pkl", pickled)
        archive.writestr("m/byteorder", b"little")
        archive.writestr("m/data/0", torch.arange(4.0).numpy().tobytes())
    return TorchFile(path)


def test_sizes_are_checked_against_the_storage(tmp_path: Path) -> None:
    assert write_archive(tmp_path, crafted(1, (3,), (1,))).tensor("w").tolist() == [1, 2, 3]
    for repeated in ((3, (1 << 40,), (0,)), (0, (4, 4), (1, 0)), (0, (3, 2), (1, 1))):
        write_archive(tmp_path, crafted(*repeated))
        for use in (lambda source: source.shape("w"), lambda source: source.stored_rows("w", 1 << 20, 1 << 20)):
            with pytest.raises(ModelError, match="repeats the same stored numbers"):
                use(TorchSource(tmp_path))
    for sizes in ((1, (4,), (1,)), (0, (2, 3), (2, 1)), (0, (1 << 40,), (1,)), (0, (2,), (1 << 48,))):
        with pytest.raises(ModelError, match=r"its storage (has 16|'0' of 16 bytes)"):
            write_archive(tmp_path, crafted(*sizes)).tensor("w")
    for sizes in (
        (-1, (4,), (1,)),
        (0, (-4,), (1,)),
        (0, (4,), (-1,)),
        (0, (1 << 62,), (1,)),
        (0, (1,) * 17, (1,) * 17),
    ):
        with pytest.raises(ModelError, match="impossible sizes"):
            write_archive(tmp_path, crafted(*sizes))
    with pytest.raises(ModelError, match="fewer strides"):
        write_archive(tmp_path, crafted(0, (4,), ()))


def test_tensors_together_are_no_larger_than_their_file(tmp_path: Path) -> None:
    """A kilobyte of names may not turn one matrix into a model of gigabytes; tied matrices and slices are what is."""
    whole = torch.arange(64.0).view(8, 8)
    tied = {"embedding": whole, "head": whole, "rows": whole[2:4]}
    assert set(TorchSource(save(tmp_path, tied)).names) == set(tied)
    with pytest.raises(ModelError, match="in its storage '0' of 256 bytes tensors have 1280: they overlap"):
        TorchSource(save(tmp_path, {str(i): whole for i in range(5)}))


def test_storages_that_are_one_place_of_the_file(tmp_path: Path) -> None:
    """The directory of the archive may say that many members lie at the same place."""
    path = save(tmp_path, {"a": torch.zeros(64), "b": torch.ones(64)}) / "pytorch_model.bin"
    raw = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        places = {member.filename.rpartition("/")[2]: member.header_offset for member in archive.infolist()}
    entries = [at for at in range(len(raw)) if raw[at : at + 4] == b"PK\x01\x02"]
    for at in entries:
        if int.from_bytes(raw[at + 42 : at + 46], "little") == places["1"]:
            raw[at + 42 : at + 46] = places["0"].to_bytes(4, "little")
    path.write_bytes(raw)
    with pytest.raises(ModelError, match="its storage '1' overlaps another one"):
        TorchSource(tmp_path)


def test_a_pickle_cannot_take_much_memory(tmp_path: Path) -> None:
    """A byte of it makes an empty dict of 64."""
    with pytest.raises(PickleError, match="more than 4194304 instructions"):
        read_state_dict(P + b"}" * (5 << 20))


def test_archives_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    with pytest.raises(ModelError, match="is compressed"):
        write_archive(tmp_path, crafted(0, (4,), (1,)), zipfile.ZIP_DEFLATED)
    torch.save({"w": torch.zeros(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ModelError, match=r"older than PyTorch 1\.6"):
        TorchFile(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/other", b"")
    with pytest.raises(ModelError, match=r"0 files data\.pkl"):
        TorchFile(path)
    with pytest.raises(ModelError, match="no such file"):
        TorchFile(tmp_path / "absent.bin")


SAVED = io.BytesIO()
torch.save({"w": torch.arange(8.0), "v": torch.ones(2, 2)}, SAVED)
RAW = SAVED.getvalue()


@given(
    cut=st.integers(0, len(RAW)),
    flips=st.lists(st.tuples(st.integers(0, len(RAW) - 1), st.integers(0, 255)), max_size=6),
)
@settings(max_examples=300, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_archives_raise_nothing_else(tmp_path: Path, cut: int, flips: list[tuple[int, int]]) -> None:
    raw = bytearray(RAW)
    for position, value in flips:
        raw[position] = value
    (tmp_path / "pytorch_model.bin").write_bytes(raw[: max(cut, len(RAW) // 2)] if flips else raw[:cut])
    try:
        source = TorchSource(tmp_path)
        source.load_into("w", torch.empty(8))
    except ModelError as error:
        assert "\n" not in str(error)


OPCODES = [opcode.code.encode("latin-1") for opcode in pickletools.opcodes]


@given(
    st.lists(
        st.one_of(st.sampled_from(OPCODES), st.binary(max_size=4), st.sampled_from([TENSOR, STORAGE])), max_size=40
    )
)
@settings(max_examples=500, deadline=2000)
def test_any_program_gives_tensors_or_an_error(pieces: list[bytes]) -> None:
    tracemalloc.start()
    try:
        read_state_dict(P + b"".join(pieces) + b".")
    except PickleError:
        pass
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 1 << 20
