# ruff: noqa: F811
"""Models that are not here, planned and shown from what their hub says, without their weights."""

from __future__ import annotations

import json
import os
import shutil
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.numpy import load_file, save_file

from ingle.errors import ModelError
from ingle.hub import headers, http, pieces, remote
from ingle.hub.names import RepoRef, UrlRef
from ingle.hub.remote import looked_at
from tests.cli.conftest import Run, ingle  # noqa: F401
from tests.hub.server import Fault, Hub, Repo
from tests.support import save_checkpoint
from tests.text.toys import byte_level_json
from tests.weights.gguf_models import write_gguf_model

NAME = "org/tiny"
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
Q8 = gguf.GGMLQuantizationType.Q8_0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of 5 MB, with all that a start needs."""
    folder = save_checkpoint(
        tmp_path_factory.mktemp("tiny"), hidden_size=256, intermediate_size=256, vocab_size=2048,
        tie_word_embeddings=False,
    )  # fmt: skip
    (folder / "tokenizer.json").write_text(byte_level_json())
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE, "eos_token": "<|endoftext|>"}))
    (folder / "generation_config.json").write_text('{"temperature": 0.6, "top_p": 0.9}')
    return folder


@pytest.fixture(scope="module")
def q8(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf_model(checkpoint, tmp_path_factory.mktemp("gguf") / "tiny-Q8_0.gguf", Q8)


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where stand-ins are made: none is left, and nobody waits for a hub that fails."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setattr(pieces, "RETRY_DELAYS_S", (0.01, 0.01))
    monkeypatch.setattr(http, "RETRY_DELAYS_S", (0.01, 0.01))
    yield folder
    assert list(folder.iterdir()) == []


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def sharded(folder: Path, to: Path, count: int = 3) -> Path:
    """The checkpoint in as many files, with an index."""
    shutil.copytree(folder, to)
    tensors = load_file(to / "model.safetensors")
    (to / "model.safetensors").unlink()
    names, claims = sorted(tensors), {}
    for at in range(count):
        file = f"model-{at + 1:05}-of-{count:05}.safetensors"
        claims |= dict.fromkeys(names[at::count], file)
        save_file({name: tensors[name] for name in names[at::count]}, to / file, {"format": "pt"})
    (to / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": claims}))
    return to


def as_bin(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    tensors = {name: torch.from_numpy(values) for name, values in load_file(to / "model.safetensors").items()}
    (to / "model.safetensors").unlink()
    torch.save(tensors, to / "pytorch_model.bin")
    return to


def as_it_is(folder: Path, to: Path) -> Path:
    return folder


def facts(out: str) -> dict[str, str]:
    return {line[:15].strip(): line[15:] for line in out.splitlines()}


def json_of(run: Run, *argv: str) -> Any:
    result = run(*argv, "--json")
    assert result.code == 0, result.err
    assert "ingle-" not in result.out
    return json.loads(result.out)


LAYOUTS: dict[str, Callable[[Path, Path], Path]] = {"safetensors": as_it_is, "sharded": sharded, "bin": as_bin}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("command", ["plan", "show"])
def test_what_is_said_of_a_folder_is_what_is_said_once_it_is_here(
    ingle: Run,
    hub: Hub,
    checkpoint: Path,
    tmp_path: Path,
    layout: str,
    command: str,
) -> None:
    folder = LAYOUTS[layout](checkpoint, tmp_path / "model")
    hub.repos[NAME] = Repo(files_of(folder) | {"README.md": b"x" * 1000, "original/consolidated.00.pth": b"x" * 1000})
    options = ["--gpus", "24GiB"] if command == "plan" else []
    far, near = (json_of(ingle, command, name, *options) for name in (NAME, str(folder)))
    small = sum(len(data) for name, data in hub.repos[NAME].files.items() if name.endswith(".json"))
    assert hub.sent < small + 450_000 < 5_000_000
    if command == "plan":
        assert hub.sent < 450_000
        (offer,) = far.pop("offers")
        assert offer["taken"] and near.pop("offers") == []
        assert far["command"] == f"ingle serve {NAME}"
        assert json.loads(json.dumps(near).replace(str(folder), NAME)) == far
        return
    download = far.pop("download")
    assert download["num_bytes"] == sum(len(data) for name, data in hub.repos[NAME].files.items() if "/" not in name)
    assert near.pop("download") is None and far["runs"] is near["runs"] is True
    assert (far.pop("model"), far.pop("path"), far.pop("license")) == (NAME, None, "apache-2.0")
    for key in ("model", "path", "license"):
        near.pop(key)
    near["need"].pop("free"), far["need"].pop("free")
    assert far == near


@pytest.mark.parametrize("says_tied", [True, False])
@pytest.mark.parametrize("layout", ["safetensors", "bin"])
def test_whether_the_head_is_the_embedding_is_seen_in_its_beginning(
    ingle: Run, hub: Hub, checkpoint: Path, tmp_path: Path, layout: str, says_tied: bool
) -> None:
    """Whatever the configuration says of it."""
    folder = shutil.copytree(checkpoint, tmp_path / "whole")
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": says_tied}
    (folder / "config.json").write_text(json.dumps(config))
    if not says_tied:
        tensors = load_file(folder / "model.safetensors")
        save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}, folder / "model.safetensors")
    folder = LAYOUTS[layout](folder, tmp_path / "model")
    hub.repos[NAME] = Repo(files_of(folder))
    for command, *options in (("show",), ("plan", "--gpus", "24GiB")):
        far, near = (json_of(ingle, command, name, *options) for name in (NAME, str(folder)))
        for key in ("need", "num_parameters", "stored_types", "formats", "layouts"):
            told = json.dumps([each.get(key) for each in (near, far)]).replace(str(folder), NAME)
            one, two = json.loads(told)
            for each in (one, two):
                if key == "need" and each:
                    each.pop("free")
            assert one == two, (command, key)
    assert hub.sent < 1_000_000


@pytest.mark.parametrize("max_part_tensors", [0, 8])
def test_a_plan_of_a_gguf_file_is_that_of_the_file(
    ingle: Run,
    hub: Hub,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    max_part_tensors: int,
) -> None:
    monkeypatch.setattr(headers, "_GGUF_PIECE", 512)
    monkeypatch.setattr(headers, "_SAFETENSORS_PIECE", 128)
    (tmp_path / "parts").mkdir()
    file = write_gguf_model(checkpoint, tmp_path / "parts" / "tiny-Q8_0.gguf", Q8, max_part_tensors)
    hub.repos["org/tiny-GGUF"] = Repo({f"Q8_0/{name}": data for name, data in files_of(tmp_path / "parts").items()})
    far = json_of(ingle, "plan", "org/tiny-GGUF:Q8_0", "--gpus", "24GiB")
    assert hub.sent < 60_000 < sum(path.stat().st_size for path in file.parent.iterdir()) / 20
    near = json_of(ingle, "plan", str(file), "--gpus", "24GiB")
    assert far.pop("offers")[0]["num_bytes"] == sum(path.stat().st_size for path in file.parent.iterdir())
    near.pop("offers")
    assert far["command"] == "ingle serve org/tiny-GGUF:Q8_0" and far["stored_types"]["Q8_0"]
    assert json.loads(json.dumps(near).replace(str(file), "org/tiny-GGUF:Q8_0")) == far


def test_a_plan_of_a_repository_with_quantizations_names_all_and_takes_one(ingle: Run, hub: Hub, q8: Path) -> None:
    data = q8.read_bytes()
    other = {f"tiny-{label}.gguf": bytes(size) for label, size in (("Q4_K_M", 700), ("IQ1_S", 300))}
    hub.repos["org/tiny-GGUF"] = Repo({"tiny-Q8_0.gguf": data, **other, "README.md": b""})
    out = ingle("plan", "org/tiny-GGUF", "--gpus", "24GiB").out
    offered = next(line for line in out.splitlines() if "on offer" in line)
    assert "IQ1_S 0.3 kB (not read by ingle), Q4_K_M 0.7 kB, Q8_0" in offered and "MB (what a pull takes)" in offered
    assert "choice       Q8_0 of org/tiny-GGUF, the best of 2 that fits into the 24.0 GiB of memory" in out
    assert out.splitlines()[-1].endswith("ingle serve org/tiny-GGUF:Q8_0")
    shown = facts(ingle("show", "org/tiny-GGUF").out)
    assert shown["choice"].startswith("Q8_0 of org/tiny-GGUF, the best of 2")
    assert shown["here"] == "no: `ingle pull org/tiny-GGUF:Q8_0` brings it"


def test_show_a_gguf_file_of_a_hub(ingle: Run, hub: Hub, smollm2_gguf: Path) -> None:
    data = smollm2_gguf.read_bytes()
    hub.repos["org/smol-GGUF"] = Repo(
        {"smol.Q4_1.gguf": data}, card={"license": "mit", "license_link": "https://x.org/l"}
    )
    shown = facts(ingle("show", "org/smol-GGUF").out)
    near = facts(ingle("show", str(smollm2_gguf)).out)
    assert hub.sent < 5_000_000
    for key in ("format", "architecture", "parameters", "stored as", "context", "chat template", "size", "runs here"):
        assert shown[key] == near[key]
    assert (shown["license"], shown["terms"], shown["gated"]) == ("mit", "https://x.org/l", "no")
    assert shown["to download"] == "98.4 MB in 1 file" and "path" not in shown
    assert shown["goes to"].endswith(f"snapshots/{'a' * 40}/smol.Q4_1.gguf")
    assert shown["page"] == f"{hub.url}/org/smol-GGUF"


def test_a_url_is_looked_at_like_a_file(ingle: Run, hub: Hub, q8: Path) -> None:
    hub.repos["org/any"] = Repo({"tiny-Q8_0.gguf": q8.read_bytes()})
    url = f"{hub.url}/org/any/resolve/main/tiny-Q8_0.gguf"
    far, near = (json_of(ingle, "plan", name, "--gpus", "24GiB") for name in (url, str(q8)))
    assert json.loads(json.dumps(near).replace(str(q8), url)) == far
    shown = facts(ingle("show", url).out)
    assert shown["model"] == shown["page"] == url and "/home/downloads/" in shown["goes to"]


def test_what_is_here_is_asked_of_no_hub(ingle: Run, hub: Hub, checkpoint: Path) -> None:
    hub.repos[NAME] = Repo(files_of(checkpoint))
    assert ingle("plan", NAME, "--gpus", "24GiB").code == 0
    cache = Path(os.environ["HF_HOME"]) / "hub" / "models--org--tiny"
    assert not cache.exists()
    snapshot = cache / "snapshots" / ("a" * 40)
    shutil.copytree(checkpoint, snapshot)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("a" * 40)
    hub.asked.clear()
    assert facts(ingle("show", NAME).out)["path"] == str(snapshot)
    assert ingle("plan", NAME, "--gpus", "24GiB").out.splitlines()[-1] == f"to serve it: ingle serve {NAME}"
    assert hub.asked == []


def test_what_a_cut_pull_has_left_is_told_and_used(ingle: Run, hub: Hub, checkpoint: Path) -> None:
    hub.repos[NAME] = repo = Repo(files_of(checkpoint))
    blobs = Path(os.environ["HF_HOME"]) / "hub" / "models--org--tiny" / "blobs"
    blobs.mkdir(parents=True)
    for entry in repo.entries():
        if entry["path"] == "tokenizer.json":
            (blobs / entry["oid"]).write_bytes(repo.files["tokenizer.json"])
        elif "lfs" in entry:
            (blobs / f"{entry['lfs']['oid']}.ingle-part").write_bytes(bytes(2_000_000))
    shown = facts(ingle("show", NAME).out)
    assert "2.0 MB of it is here" in shown["to download"]
    assert shown["here"] == f"in part: `ingle pull {NAME}` brings the rest"
    assert not any("tokenizer.json" in each for each in hub.asked)


def test_a_gated_model_is_shown_without_its_files(ingle: Run, hub: Hub, checkpoint: Path) -> None:
    hub.repos[NAME] = Repo(files_of(checkpoint), gated="manual", token="hf_secret", card={"license": "llama2"})
    result = ingle("show", NAME)
    shown = facts(result.out)
    assert shown["gated"] == f"yes: accept its terms at {hub.url}/{NAME}, and set HF_TOKEN"
    assert f"{NAME} is gated: accept its terms" in shown[""] and shown["license"] == "llama2"
    assert "MB in 5 files" in shown["to download"] and "safetensors" in shown["on offer"]
    result = ingle("plan", NAME)
    assert (result.code, result.out) == (1, "") and "is gated: accept its terms at" in result.err


@pytest.mark.parametrize(
    ("files", "tags", "says"),
    [
        ({"adapter_config.json": b"{}", "adapter_model.safetensors": b"x"}, [], "is an adapter (LoRA)"),
        ({"model_index.json": b"{}", "unet/model.safetensors": b"x"}, ["diffusers"], "makes images"),
        ({"config.json": b"{}", "model.safetensors": b"x"}, ["exl2"], "quantized for ExLlama (exl2)"),
        ({"config.json": b"{}", "model.safetensors": b"x"}, ["sentence-transformers"], "turns texts into vectors"),
    ],
)
@pytest.mark.parametrize("command", ["show", "plan"])
def test_what_ingle_does_not_serve_is_said_as_a_pull_says_it(
    ingle: Run,
    hub: Hub,
    files: dict[str, bytes],
    tags: list[str],
    says: str,
    command: str,
) -> None:
    hub.repos[NAME] = Repo(files, tags)
    result = ingle(command, NAME)
    assert (result.code, result.out, hub.sent) == (1, "", 0)
    assert says in result.err and result.err.count("\n") == 1


def test_a_quantized_model_is_planned_and_shown_not_to_run(ingle: Run, hub: Hub, checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "exl2", "bits": 4, "group_size": 128}
    hub.repos[NAME] = Repo(files_of(checkpoint) | {"config.json": json.dumps(config).encode()})
    shown = json_of(ingle, "show", NAME)
    assert shown["runs"] is False and shown["quantization"] == "EXL2, 4 bits"
    assert any(f"{NAME}: " in finding["what"] and "exl2" in finding["what"] for finding in shown["findings"])
    assert "does not run here yet" in ingle("plan", NAME, "--gpus", "24GiB").out


def test_revisions_and_hubs_are_taken(ingle: Run, hub: Hub, checkpoint: Path) -> None:
    hub.repos[NAME] = Repo(files_of(checkpoint))
    assert json_of(ingle, "show", NAME, "--revision", "v1", "--hub", "huggingface")["model"] == f"{NAME}@v1"
    assert f"/api/models/{NAME}/revision/v1" in hub.asked[0]
    assert "has no revision v7" in ingle("show", f"{NAME}@v7").err
    assert ingle("plan", f"{NAME}@v1", "--gpus", "24GiB").out.splitlines()[-1].endswith(f"ingle serve {NAME}@v1")


# What a hub may do wrong.


def looked(reference: RepoRef | UrlRef, note: Callable[[str], None] = lambda text: None) -> str:
    """What is said of it, after what may be seen of it was read."""
    from ingle.config import EngineConfig
    from ingle.plan.outline import read_outline

    with looked_at(str(reference), reference, "plan", note) as found:
        return read_outline(found.source.path, EngineConfig(str(reference))).files


@pytest.mark.parametrize("length", [0, 7, 1 << 33, 1 << 60, (1 << 64) - 1])
def test_lengths_of_headers_are_not_believed(hub: Hub, checkpoint: Path, length: int) -> None:
    data = bytearray(files_of(checkpoint)["model.safetensors"])
    data[:8] = struct.pack("<Q", length)
    hub.repos[NAME] = Repo(files_of(checkpoint) | {"model.safetensors": bytes(data)})
    with pytest.raises(ModelError, match=r"^org/tiny/model\.safetensors: damaged") as error:
        looked(RepoRef("huggingface", NAME))
    assert "/temporary/" not in str(error.value) and hub.sent < 200_000


@pytest.mark.parametrize(
    ("at", "value", "says"),
    [(0, b"GGML", "not a GGUF file"), (8, b"\xff" * 8, "more than its size"),
     (16, b"\xff" * 8, "more than its size"), (24, b"\xff" * 8, "bytes are left|are left")],
)  # fmt: skip
def test_counts_of_gguf_headers_are_not_believed(hub: Hub, q8: Path, at: int, value: bytes, says: str) -> None:
    data = bytearray(q8.read_bytes())
    data[at : at + len(value)] = value
    hub.repos["org/tiny-GGUF"] = Repo({"tiny-Q8_0.gguf": bytes(data)})
    with pytest.raises(ModelError, match=says) as error:
        looked(RepoRef("huggingface", "org/tiny-GGUF"))
    assert str(error.value).startswith("org/tiny-GGUF/tiny-Q8_0.gguf: ")


def test_a_gguf_header_that_does_not_end_is_read_no_further_than_its_bound(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ingle.weights import gguf as reader

    monkeypatch.setattr(headers, "_GGUF_PIECE", 1 << 10)
    monkeypatch.setattr(reader, "MAX_HEADER_BYTES", 1 << 16)
    strings = b"".join(struct.pack("<Q", 8) + b"x" * 8 for _ in range(50_000))
    key = struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, 8, 50_000)
    hub.repos["org/x"] = Repo({"x-Q8_0.gguf": b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + key + strings})
    with pytest.raises(ModelError, match=r"goes past the end|more than its size"):
        looked(RepoRef("huggingface", "org/x"))
    assert hub.sent <= 1 << 17


@pytest.mark.parametrize(
    ("size", "says"),
    [
        (1 << 60, "the hub says 1152921504606846976 bytes, and the server"),
        (-5, "more than any file"),
        (4_000_000, "the hub says 4000000 bytes"),
    ],
)
def test_sizes_are_not_believed(
    hub: Hub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, size: int, says: str
) -> None:
    class Lying(Repo):
        def entries(self) -> Iterator[dict[str, Any]]:
            for entry in super().entries():
                if entry["path"] == "model.safetensors":
                    entry["size"] = entry["lfs"]["size"] = size
                yield entry

    hub.repos[NAME] = Lying(files_of(checkpoint))
    with pytest.raises(ModelError, match=says):
        looked(RepoRef("huggingface", NAME))


def test_files_that_lead_out_are_not_taken(hub: Hub, checkpoint: Path, temporary: Path) -> None:
    hub.repos[NAME] = Repo(files_of(checkpoint) | {"../evil.json": b"{}"})
    with pytest.raises(ModelError, match="which is no path within it"):
        looked(RepoRef("huggingface", NAME))
    index = {"weight_map": {"a": "../../evil.safetensors"}}
    hub.repos[NAME] = Repo(
        {"config.json": b"{}", "model.safetensors.index.json": json.dumps(index).encode(), "README.md": b""}
    )
    with pytest.raises(ModelError, match=r"is not whole: its index lists '\.\./\.\./evil\.safetensors'"):
        looked(RepoRef("huggingface", NAME))
    assert not list(temporary.parent.rglob("evil*"))


def test_all_together_is_bounded(hub: Hub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "MAX_TAKEN_BYTES", 1000)
    hub.repos[NAME] = Repo(files_of(checkpoint))
    with pytest.raises(ModelError, match="what describes the model is larger than"):
        looked(RepoRef("huggingface", NAME))
    assert remote.MAX_WEIGHT_FILES < 10_000


def test_a_server_without_ranges_is_read_from_the_beginning(
    hub: Hub, q8: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(headers, "_GGUF_PIECE", 512)
    hub.ranges = False
    hub.repos["org/tiny-GGUF"] = Repo({"tiny-Q8_0.gguf": q8.read_bytes()})
    assert looked(RepoRef("huggingface", "org/tiny-GGUF")) == "GGUF"
    monkeypatch.setattr(pieces, "_SKIPPED_BYTES", 100)
    with pytest.raises(ModelError, match=r"sends tiny-Q8_0\.gguf only as a whole: `ingle pull` brings it"):
        looked(RepoRef("huggingface", "org/tiny-GGUF"))


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (Fault("/cdn/", status=503), "answers 503"),
        (Fault("/cdn/", cut_after=100), "connection"),
        (Fault(r"config\.json", status=404, headers={"X-Error-Code": "EntryNotFound"}), "it changed meanwhile"),
        (Fault("/cdn/", instead=b"<html>", times=9), "the hub says"),
    ],
)
def test_faults_are_told_in_a_line(hub: Hub, checkpoint: Path, fault: Fault, says: str) -> None:
    hub.repos[NAME] = Repo(files_of(checkpoint))
    hub.faults.append(fault)
    with pytest.raises(ModelError, match=says) as error:
        looked(RepoRef("huggingface", NAME))
    assert "\n" not in str(error.value)


def test_a_passing_fault_is_waited_for(hub: Hub, checkpoint: Path) -> None:
    hub.repos[NAME] = Repo(files_of(checkpoint))
    hub.faults += [Fault("/cdn/", status=503, times=1), Fault("/cdn/", cut_after=100, times=1)]
    assert looked(RepoRef("huggingface", NAME)) == "safetensors"


def test_shards_come_side_by_side_and_slow_ones_are_told_of(
    hub: Hub, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repos[NAME] = Repo(files_of(sharded(checkpoint, tmp_path / "model", 12)))
    hub.faults.append(Fault("/cdn/", pause_s=0.02))  # a third of a second for each
    monkeypatch.setattr(pieces, "_QUIET_S", 0.1)
    begin_s, notes = time.monotonic(), list[str]()
    assert looked(RepoRef("huggingface", NAME), notes.append) == "safetensors"
    assert time.monotonic() - begin_s < 3
    assert notes and all(note.startswith(f"reading the headers of {NAME}: ") for note in notes)


def test_a_full_temporary_folder_is_named(hub: Hub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    hub.repos[NAME] = Repo(files_of(checkpoint))
    monkeypatch.setattr(pieces.Hollow, "write", full)
    with pytest.raises(
        ModelError, match=r"cannot be kept in .*: No space left on device; point TMPDIR to another disk"
    ):
        looked(RepoRef("huggingface", NAME))
