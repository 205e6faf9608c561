"""From a name to a model's files in the hub's own cache, with nothing that is not needed."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest

from ingle.errors import ConfigError, ModelError
from ingle.hub import quantizations
from ingle.hub.resolve import ensure_model, pull_model, resolve_model
from ingle.hub.source import Wanted
from tests.hub.repos import BESIDE, SMALL, data, files_in, gguf_repo, sharded, single
from tests.hub.server import Fault, Hub, Repo
from tests.hub.toy import Recorder

NEEDED = {*SMALL, "README.md"}


def test_one_command_brings_what_is_needed_and_tells_first_how_much(hub: Hub, recorder: Recorder) -> None:
    hub.repos["org/tiny"] = single()
    source = ensure_model("org/tiny", recorder)
    assert (source.name, source.kind) == ("org/tiny", "folder")
    assert files_in(source.path) == {*NEEDED, "model.safetensors"}
    assert (source.path / "model.safetensors").read_bytes() == data(100_000)
    assert hub.sent == sum(len(hub.repos["org/tiny"].files[name]) for name in files_in(source.path))
    told = "\n".join(recorder.notes)
    assert "org/tiny is not on this machine yet: pulling it" in told
    assert f"org/tiny: 0.1 MB to download (model.safetensors) from {hub.url}/org/tiny" in told
    assert f"terms: apache-2.0, {hub.url}/org/tiny" in told


def test_what_is_here_is_not_asked_for(hub: Hub, recorder: Recorder) -> None:
    hub.repos["org/tiny"] = single()
    path = ensure_model("org/tiny", recorder).path
    hub.asked.clear()
    assert ensure_model("org/tiny", recorder).path == path == resolve_model("org/tiny").path
    assert ensure_model("Org/Tiny", recorder).path == path
    assert not hub.asked


def test_its_cache_is_huggingface_hubs(hub: Hub, recorder: Recorder) -> None:
    hub.repos["org/tiny"] = Repo({**SMALL, **sharded(3, 5_000), "pytorch_model.bin": data(10)})
    path = ensure_model("org/tiny", recorder).path
    sent = hub.sent
    cache = str(path.parents[2])
    same = huggingface_hub.snapshot_download("org/tiny", cache_dir=cache, ignore_patterns=["*.bin"], endpoint=hub.url)
    assert (Path(same), hub.sent) == (path, sent)
    assert huggingface_hub.try_to_load_from_cache("org/tiny", "config.json", cache_dir=cache) == str(
        path / "config.json"
    )
    assert huggingface_hub.scan_cache_dir(cache).warnings == []


def test_what_huggingface_hub_brought_is_used(hub: Hub, recorder: Recorder) -> None:
    hub.repos["org/tiny"] = single()
    cache = Path(huggingface_hub.constants.HF_HUB_CACHE)
    path = huggingface_hub.snapshot_download("org/tiny", cache_dir=cache, endpoint=hub.url)
    hub.asked.clear()
    assert ensure_model("org/tiny", recorder).path == Path(path)
    assert not hub.asked


def test_what_huggingface_hub_began_is_gone_on_with(hub: Hub, recorder: Recorder) -> None:
    hub.repos["org/tiny"] = Repo({**SMALL, **sharded(3, 5_000)})
    cache = Path(huggingface_hub.constants.HF_HUB_CACHE)
    huggingface_hub.snapshot_download(
        "org/tiny", cache_dir=cache, endpoint=hub.url, allow_patterns=["*.json", "*-00002-*"]
    )
    hub.asked.clear()
    path = ensure_model("org/tiny", recorder).path
    assert not [path for path in hub.asked if "00002-of" in path]
    assert {f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)} <= files_in(path)


@pytest.mark.parametrize(
    ("files", "taken"),
    [
        ({**SMALL, **sharded(2, 100), **sharded(2, 100, "pytorch_model", "bin")}, "model-0000{}-of-00002.safetensors"),
        ({**SMALL, **sharded(2, 100, "pytorch_model", "bin")}, "pytorch_model-0000{}-of-00002.bin"),
    ],
)
def test_never_both_kinds_of_weights(hub: Hub, recorder: Recorder, files: dict[str, bytes], taken: str) -> None:
    hub.repos["org/tiny"] = Repo({**files, **BESIDE})
    found = files_in(ensure_model("org/tiny", recorder).path)
    weights = {name for name in found if name.endswith((".safetensors", ".bin"))}
    assert weights == {taken.format(1), taken.format(2)}


def test_a_revision_has_its_own_files(hub: Hub, recorder: Recorder) -> None:
    hub.repos["org/tiny"] = single()
    path = ensure_model("org/tiny@v1", recorder).path
    assert resolve_model("org/tiny@v1").path == path
    assert (path.parents[1] / "refs" / "v1").read_text() == "a" * 40
    assert pull_model("org/tiny", recorder, revision="a" * 40).path == path
    with pytest.raises(ModelError, match=r"org/tiny has no revision v9: its branches and commits are at"):
        ensure_model("org/tiny@v9", recorder)
    with pytest.raises(ConfigError, match="--revision v1: org/tiny@main has no other revision"):
        pull_model("org/tiny@main", recorder, revision="v1")


def test_a_newer_commit_is_pulled_and_shares_what_is_the_same(hub: Hub, recorder: Recorder) -> None:
    hub.repos["org/tiny"] = single()
    old = ensure_model("org/tiny", recorder).path
    changed = single()
    changed.commit, changed.files["generation_config.json"] = "b" * 40, b'{"temperature": 0.7}'
    hub.repos["org/tiny"] = changed
    assert ensure_model("org/tiny", recorder).path == old
    sent = hub.sent
    new = pull_model("org/tiny", recorder).path
    assert new.name == "b" * 40 and hub.sent - sent < 100
    assert resolve_model("org/tiny").path == new


def test_without_its_hub_what_is_here_will_do(hub: Hub, recorder: Recorder) -> None:
    hub.repos["org/tiny"] = single()
    path = ensure_model("org/tiny", recorder).path
    hub.faults = [Fault("/api/", 503, {"Retry-After": "3600"})]
    assert pull_model("org/tiny", recorder).path == path
    assert recorder.notes[-1].endswith("what is here of org/tiny is whole")


def test_a_renamed_repository(hub: Hub, recorder: Recorder) -> None:
    hub.repos["new/tiny"] = single()
    hub.renamed["old/tiny"] = "new/tiny"
    path = ensure_model("old/tiny", recorder).path
    assert "old/tiny is called new/tiny now" in recorder.notes
    hub.asked.clear()
    assert ensure_model("old/tiny", recorder).path == path
    assert not hub.asked


def test_a_gated_model_with_a_token_that_stays_with_the_hub(
    hub: Hub, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repos["org/gated"] = single()
    hub.repos["org/gated"].gated, hub.repos["org/gated"].token = "manual", "hf_secret"
    with pytest.raises(ModelError, match=r"org/gated is gated: accept its terms at https://huggingface.co/org/gated"):
        ensure_model("org/gated", recorder)
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(ModelError, match=r"org/gated is gated, and the account of your token has not been granted"):
        ensure_model("org/gated", recorder)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert ensure_model("org/gated", recorder).path.is_dir()
    assert {token for path, token in hub.tokens if path.startswith("/cdn/")} == {None}
    with pytest.raises(ConfigError, match="HF_TOKEN holds what no token is made of"):
        monkeypatch.setenv("HF_TOKEN", "hf_ü")
        ensure_model("org/other", recorder)


def test_offline(hub: Hub, recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos["org/tiny"] = single()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"is not asked because HF_HUB_OFFLINE is set"):
        ensure_model("org/tiny", recorder)
    assert not hub.asked


@pytest.mark.parametrize(
    ("choice", "taken"),
    [
        ("Q4_K_M", {"M-Q4_K_M.gguf"}),
        ("q4_k_m", {"M-Q4_K_M.gguf"}),
        ("Q4_K", {"M-Q4_K_M.gguf"}),
        ("M-Q8_0.gguf", {"M-Q8_0.gguf"}),
        ("F16", {"M-F16/M-F16-00001-of-00002.gguf", "M-F16/M-F16-00002-of-00002.gguf"}),
    ],
)
def test_gguf_by_quantization(hub: Hub, recorder: Recorder, choice: str, taken: set[str]) -> None:
    hub.repos["org/M-GGUF"] = gguf_repo()
    name = f"hf.co/org/M-GGUF:{choice}"
    source = ensure_model(name, recorder)
    snapshot = next(parent for parent in source.path.parents if parent.parent.name == "snapshots")
    assert (source.kind, files_in(snapshot)) == ("gguf", taken)
    hub.asked.clear()
    assert ensure_model(name, recorder) == source
    assert not hub.asked


@pytest.mark.parametrize(
    ("free", "taken", "why"),
    [
        (1 << 30, "Q8_0", r"taking Q8_0 of org/M-GGUF, the best of 3 that fits into the 1.0 GiB of memory"),
        (8_000, "Q4_K_M", r"taking Q4_K_M of org/M-GGUF, the best of 3 that fits"),
        (100, "Q4_K_M", r"taking Q4_K_M of org/M-GGUF, the smallest of 3: none is one that fits"),
    ],
)
def test_without_a_quantization_the_best_that_fits(
    hub: Hub, recorder: Recorder, monkeypatch: pytest.MonkeyPatch, free: int, taken: str, why: str
) -> None:
    hub.repos["org/M-GGUF"] = gguf_repo()
    monkeypatch.setattr(quantizations, "free_memory", lambda: free)
    assert ensure_model("org/M-GGUF", recorder).path.name == f"M-{taken}.gguf"
    assert [note for note in recorder.notes if note.startswith(why)], recorder.notes


def test_a_quantization_that_is_not_there_or_not_read(hub: Hub, recorder: Recorder) -> None:
    hub.repos["org/M-GGUF"] = gguf_repo()
    with pytest.raises(ModelError, match=r"org/M-GGUF has no 'Q5_K_M': there are IQ1_S \(1.0 kB\), Q4_K_M .*, F16 "):
        ensure_model("org/M-GGUF:Q5_K_M", recorder)
    with pytest.raises(ModelError, match=r"ingle does not read IQ1_S; take one of those that it reads: there are Q4"):
        ensure_model("org/M-GGUF:IQ1_S", recorder)
    hub.repos["org/tiny"] = single()
    with pytest.raises(ModelError, match=r"org/tiny holds no .gguf file, so there is no 'Q4_0': leave `:Q4_0` out"):
        ensure_model("org/tiny:Q4_0", recorder)


@pytest.mark.parametrize(
    ("files", "tags", "message"),
    [
        ({"adapter_config.json": b"{}", "adapter_model.safetensors": b"x"}, [], "is an adapter .LoRA.*merge_and"),
        (
            {**SMALL, "model.safetensors": b"x", "1_Pooling/config.json": b"{}"},
            ["sentence-transformers"],
            "org/x turns texts into vectors and writes none",
        ),
        ({**SMALL, "model.safetensors": b"x"}, ["text-classification"], "org/x scores texts"),
        ({"model_index.json": b"{}", "unet/x.safetensors": b"x"}, [], "is a pipeline of diffusers"),
        ({**SMALL, "model.safetensors": b"x"}, ["exl2"], "is quantized for ExLlama"),
        ({"model.onnx": b"x", "config.json": b"{}"}, [], "holds ONNX files"),
        ({"params.json": b"{}", "consolidated.00.pth": b"x"}, [], "is in its makers' own format"),
        ({"tf_model.h5": b"x", "config.json": b"{}"}, [], "TensorFlow, Flax or Core ML"),
        ({"README.md": b"soon"}, [], "holds no model: 1 files"),
        ({**SMALL, "weights.safetensors": b"x"}, [], "has weights, but not as a model of transformers"),
        ({"ggml.gguf": b"x", "mmproj.gguf": b"x", "M-IQ1_S.gguf": b"x"}, [], "has no GGUF file that ingle reads"),
        (
            {**SMALL, "config.json": b'{"architectures": ["BertModel"]}', "model.safetensors": b""},
            [],
            "holds 'BertModel', which is no model that ingle runs; ingle serves",
        ),
        ({**SMALL, "config.json": b"[]", "model.safetensors": b"x" * 9}, [], "config.json holds no object"),
        (
            {**SMALL, "model.safetensors.index.json": b'{"weight_map": {"a": "gone.safetensors"}}'},
            [],
            "is not whole: its index lists 'gone.safetensors'",
        ),
        (
            {**SMALL, "config.json": b'{"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": true}',
             "model.safetensors": b""},
            [],
            "is an encoder with a decoder",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_told_before_weights_come(
    hub: Hub, recorder: Recorder, files: dict[str, bytes], tags: list[str], message: str
) -> None:
    hub.repos["org/x"] = Repo(files, tags)
    with pytest.raises(ModelError, match=message) as error:
        ensure_model("org/x", recorder)
    assert "\n" not in str(error.value)
    weights = [name for name in files if name.endswith((".safetensors", ".bin", ".gguf"))]
    assert not [path for path in hub.asked if any(path.endswith(f"/{name}") for name in weights)]


def test_include_and_exclude(hub: Hub, recorder: Recorder) -> None:
    hub.repos["org/tiny"] = single()
    source = pull_model("org/tiny", recorder, wanted=Wanted(("*.json", "original/*"), ("original/*.pth",)))
    assert files_in(source.path) == {*(name for name in SMALL if name.endswith(".json")), "original/params.json"}
    with pytest.raises(ModelError, match=r"holds no file that matches '\*.txt'"):
        pull_model("org/tiny", recorder, wanted=Wanted(("*.txt",)))
    source = pull_model("org/tiny", recorder, wanted=Wanted(exclude=("README*", "LICENSE")))
    assert "model.safetensors" in files_in(source.path) and "LICENSE" not in files_in(source.path)


def test_two_pulls_at_once_wait_for_each_other(hub: Hub) -> None:
    hub.repos["org/tiny"] = single()
    hub.faults = [Fault("cdn", pause_s=0.05)]
    recorders = [Recorder(), Recorder()]
    threads = [threading.Thread(target=ensure_model, args=("org/tiny", recorder)) for recorder in recorders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    waited = [
        recorder for recorder in recorders if any("another process is pulling" in note for note in recorder.notes)
    ]
    assert len(waited) == 1
    assert len([path for path in hub.asked if "cdn" in path]) == 1


@pytest.mark.parametrize("path", ["../../evil", "/etc/evil", "a/../../evil", "a\\..\\evil", "a//b", "x\n.json"])
def test_a_hub_that_names_files_outside_is_not_followed(hub: Hub, recorder: Recorder, path: str) -> None:
    hub.repos["org/tiny"] = Repo({**single().files, path: b"evil"})
    with pytest.raises(ModelError, match="which is no path within it: nothing of it is taken"):
        ensure_model("org/tiny", recorder)


def test_a_full_disk_is_seen_before_the_download(hub: Hub, recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos["org/tiny"] = single(3_000_000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=60_000_000))
    with pytest.raises(ModelError, match=r"needs 67.1 MB of disk space, .* has 60.0 MB free; make room, or point HF"):
        ensure_model("org/tiny", recorder)
    assert not [path for path in hub.asked if "cdn" in path]


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("Qwen/Qwen3-06B", "did you mean Qwen/Qwen3-0.6B"),
        ("qwen/qwen3-0.6", "did you mean Qwen/Qwen3-0.6B"),
        ("Quen/Qwen3-0.6B", "did you mean Qwen/Qwen3-0.6B"),
        ("nobody/nothing", "check the name; for a private one set HF_TOKEN$"),
    ],
)
def test_a_mistyped_name_gets_near_ones(hub: Hub, recorder: Recorder, name: str, near: str) -> None:
    hub.repos["Qwen/Qwen3-0.6B"] = hub.repos["Qwen/Qwen3-8B"] = single()
    with pytest.raises(ModelError, match=f"has no public model {name}: .*{near}"):
        ensure_model(name, recorder)
