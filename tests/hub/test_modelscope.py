"""Models of ModelScope, from a server that speaks as it does (`modelscope_server`).

By hand, with the package's 1.19.2, 1.31.0 and 1.40.2 against that server: what each of them had downloaded was found
without a request, by branch and by tag; what ingle had downloaded was used by 1.40.2, which asked for the listing and
for no file (and for nothing at all with `local_files_only`). Versions before 1.38 do not know the folders of later
ones, ingle's among them. `LAYOUTS` are the folders that they left, `LOGIN` is what a login of theirs did.
"""

from __future__ import annotations

import base64
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ingle.errors import ConfigError, ModelError
from ingle.hub import http
from ingle.hub.caches import cached_models
from ingle.hub.http import NotConnected
from ingle.hub.names import RepoRef, parse_name
from ingle.hub.origins import modelscope, origin_of
from ingle.hub.resolve import ensure_model, pull_model
from ingle.hub.source import Wanted
from ingle.hub.store import Store
from tests.hub.modelscope_server import CHANGED_S, NOT_FOUND, Model, Scope, ScopeHandler
from tests.hub.repos import CONFIG, data
from tests.hub.server import Fault, serving
from tests.hub.toy import Recorder

SMALL = {
    "config.json": json.dumps(CONFIG).encode(),
    "configuration.json": b'{"framework": "pytorch", "task": "text-generation"}',
    "tokenizer.json": b'{"model": {"type": "BPE", "vocab": {}, "merges": []}}',
}
SIZE = 100_000
NAME = "modelscope:org/Tiny-1.5B"
LFS, FILE = "^/lfs/", "^/api/v1/models/org/Tiny-1.5B/repo "
FILES, ANY = "/repo/files$", "^/"
PAGE = b"<!doctype html><title>Sign in</title>"


def tiny(**changes: object) -> Model:
    beside = {"README.md": b"# tiny", ".gitattributes": b"lfs", "original/params.json": b"{}"}
    return Model({**SMALL, **beside, "model.safetensors": data(SIZE)}, **changes)


def gguf() -> Model:
    return Model({"M-Q4_K_M.gguf": b"GGUF" + data(400), "sub/M-Q8_0.gguf": b"GGUF" + data(800), **SMALL})


@pytest.fixture
def scope(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: Store) -> Iterator[Scope]:
    """ModelScope with one model, of which ingle knows; its cache is empty."""
    for name in ("HF_HUB_OFFLINE", "INGLE_HUB", "MODELSCOPE_DOMAIN", "MODELSCOPE_API_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MODELSCOPE_HOME", str(tmp_path / "account"))
    monkeypatch.setattr(http, "RETRY_DELAYS_S", (0.01, 0.01))
    monkeypatch.setattr("ingle.hub.download.RETRY_DELAYS_S", (0.01, 0.01))
    monkeypatch.setattr(http, "READ_S", 0.5)
    with serving(Scope(repos={"org/Tiny-1.5B": tiny()}), ScopeHandler) as state:
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", state.url)
        yield state


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write(folder: Path, files: dict[str, bytes], when_s: float | None = None) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        if when_s is not None:
            os.utime(path, (when_s, when_s))


def test_one_name_brings_what_is_needed_and_no_more(scope: Scope, recorder: Recorder, tmp_path: Path) -> None:
    source = ensure_model(NAME, recorder)
    assert source.name == "org/Tiny-1.5B" and source.kind == "folder"
    assert source.path == tmp_path / "cache/models/org--Tiny-1.5B/snapshots/master"
    assert files_in(source.path) == {**SMALL, "README.md": b"# tiny", "model.safetensors": data(SIZE)}
    assert any(
        f"MB to download (model.safetensors) from {scope.url}/models/org/Tiny" in note for note in recorder.notes
    )
    assert any(note.startswith("terms: apache-2.0") for note in recorder.notes)

    asked = len(scope.asked)
    assert ensure_model(NAME.upper().replace("MODELSCOPE", "modelscope"), recorder).path == source.path
    assert len(scope.asked) == asked, "what is here needs no hub"
    assert [(held.name, held.format) for held in cached_models()] == [(NAME, "safetensors")]


def test_gguf_by_quantization(scope: Scope, recorder: Recorder) -> None:
    scope.repos["org/gguf"] = gguf()
    source = ensure_model("modelscope.cn/models/org/gguf:q8_0", recorder)
    assert source.kind == "gguf" and source.path.read_bytes() == b"GGUF" + data(800)
    assert set(files_in(source.path.parents[1])) == {"sub/M-Q8_0.gguf"}
    assert ensure_model("modelscope:org/gguf:Q4_K_M", recorder).path.name == "M-Q4_K_M.gguf"
    assert [held.name for held in cached_models()] == ["modelscope:org/gguf:Q4_K_M", "modelscope:org/gguf:Q8_0"]


def test_a_revision_has_its_own_folder_and_a_wrong_one_is_told_which_there_are(
    scope: Scope, recorder: Recorder
) -> None:
    tag = {**tiny().files, "model.safetensors": data(500, 7)}
    scope.repos["org/Tiny-1.5B"] = tiny(revisions={"v1.0.0": tag})
    source = ensure_model(f"{NAME}@v1.0.0", recorder)
    assert source.path.name == "v1.0.0" and (source.path / "model.safetensors").read_bytes() == data(500, 7)
    assert ensure_model(NAME, recorder).path.name == "master"
    with pytest.raises(ModelError, match=r"org/Tiny-1\.5B has no revision main: there are master, v1\.0\.0$"):
        ensure_model(f"{NAME}@main", recorder)


@pytest.mark.parametrize("by", ["variable", "flag"])
def test_the_default_hub(scope: Scope, recorder: Recorder, monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    if by == "variable":
        monkeypatch.setenv("INGLE_HUB", "modelscope")
        source = ensure_model("org/Tiny-1.5B", recorder)
    else:
        source = pull_model("org/Tiny-1.5B", recorder, hub="modelscope")
    assert (source.path / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault(FILES, 404, {}, json.dumps(NOT_FOUND).encode()), "no public model org/Tiny-1.5B: check the name; for a"),
        (Fault(FILES, 200, {}, json.dumps(NOT_FOUND).encode()), "no public model org/Tiny-1.5B: check the name; for a"),
        (Fault(FILES, 404, {}, b'{"Message": "Error 1461: Can\'t create"}'), "is overloaded: Error 1461: Can't create"),
        (Fault(FILES, 401), "private, or its terms are to be accepted at .*: do so, and set MODELSCOPE_API_TOKEN to a"),
        (Fault(FILES, 403), "private, or its terms are to be accepted at .*/models/org/Tiny-1.5B: do so, and set"),
        (Fault(FILES, 200, {}, b'{"Code": 403, "Message": "no", "Success": false}'), "is private, or its terms are"),
        (Fault(FILES, 200, {}, b'{"Code": 10010, "Message": "busy"}'), "repo/files answers: busy$"),
        (
            Fault(FILES, 429, {"Retry-After": "300"}),
            "limits how often it is asked .429.: try again in 300 s, or with a",
        ),
        (Fault(FILES, 500), "answers 500: it is down or overloaded"),
        (Fault(FILES, 502, {}, PAGE), "answers 502: it is down or overloaded"),
        (Fault(FILES, 400, {}, b'{"Message": "bad Revision"}'), "answers 400 bad Revision"),
        (Fault(FILES, 200, {"Content-Type": "text/html"}, PAGE), "answers with a web page .* MODELSCOPE_ENDPOINT and"),
        (Fault(FILES, 200, {}, b"{"), "answers what is not JSON"),
        (Fault(FILES, 200, {}, b"[]"), "answers otherwise than ModelScope does: is MODELSCOPE_ENDPOINT right"),
        (Fault(FILES, 200, {}, b'{"Data": {"Files": [{"Path": 1}]}}'), "answers otherwise than ModelScope does"),
        (Fault(FILES, 200, {}, b'{"Data": {"Files": [{"Path": "../x"}]}}'), "lists a file '../x', which is no path"),
        (Fault(FILES, 200, {}, b'{"Data": {"Files": null}}'), "holds no model: 0 files"),
        (Fault(f"{FILE}config.json", 404), "org/Tiny-1.5B has no file config.json: it changed meanwhile"),
        (Fault(f"{FILE}config.json", 403), "private, or its terms are to be accepted"),
        (Fault(LFS, 403), "localhost:[0-9]+/lfs/org/Tiny-1.5B/master/model.safetensors answers 403 Forbidden$"),
        (Fault(LFS, 503), "answers 503: it is down or overloaded"),
        (Fault(LFS, cut_after=0), "model.safetensors: the connection ended after 0 of 100000 bytes|connection broke"),
        (Fault(LFS, instead=data(SIZE, 9)), "what came has SHA-256 .* by a mirror or a proxy: .* MODELSCOPE_ENDPOINT"),
        (
            Fault(LFS, instead=data(90_000)),
            "the hub says 100000 bytes, and localhost:[0-9]+ sends 90000; .* MODELSCOPE",
        ),
        (Fault(f"{FILE}config.json", instead=b" " * len(SMALL["config.json"])), "config.json: what came has SHA-256"),
    ],
)
def test_each_fault_has_its_line(scope: Scope, recorder: Recorder, fault: Fault, message: str) -> None:
    scope.faults.append(fault)
    with pytest.raises(ModelError, match=message) as caught:
        ensure_model(NAME, recorder)
    assert len(caught.value.lines()) == 1 and "\n" not in str(caught.value)
    assert "secret" not in str(caught.value), "what signs a URL stays out of messages"
    scope.faults.clear()
    assert files_in(ensure_model(NAME, recorder).path).keys() >= {*SMALL, "model.safetensors"}


@pytest.mark.parametrize(
    "fault",
    [
        Fault(ANY, 404, {}, b'{"Code": 10010205001, "Message": "x: Error 1461: Can\'t create"}', times=1),
        Fault(ANY, 429, {"Retry-After": "0"}, times=2),
        Fault(FILES, 503, times=2),
        Fault(LFS, 502, times=1),
        Fault(LFS, cut_after=30_000, times=3),
    ],
)
def test_what_passes_is_tried_again(scope: Scope, recorder: Recorder, fault: Fault) -> None:
    scope.faults.append(fault)
    assert (ensure_model(NAME, recorder).path / "model.safetensors").read_bytes() == data(SIZE)
    assert fault.times == 0


def test_nobody_there(scope: Scope, recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(NotConnected, match=r"^http://127.0.0.1:9/\S+ cannot be reached"):
        ensure_model(NAME, recorder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match="is not asked because HF_HUB_OFFLINE is set"):
        ensure_model(NAME, recorder)


def test_what_is_served_no_text_is_told_before_weights_come(scope: Scope, recorder: Recorder) -> None:
    scope.repos["org/Tiny-1.5B"] = tiny(tasks=["sentence-embedding"])
    with pytest.raises(ModelError, match="turns texts into vectors"):
        ensure_model(NAME, recorder)
    assert scope.sent == 0


@pytest.mark.parametrize(("name", "cut"), [("model.safetensors", 70_000), ("config.json", 20), ("tokenizer.json", 1)])
def test_a_cut_file_is_gone_on_with(scope: Scope, recorder: Recorder, name: str, cut: int) -> None:
    """Of large files the store of large objects takes ranges as usual; the hub answers those of small ones with 200."""
    scope.faults.append(Fault(f" {name}$|^/lfs/.*{name}$", cut_after=cut, times=2 if name.endswith("s") else 1))
    whole = sum(map(len, SMALL.values())) + len(b"# tiny") + SIZE
    folder = ensure_model(NAME, recorder).path
    assert files_in(folder)[name] == {**SMALL, "model.safetensors": data(SIZE)}[name]
    assert scope.sent == whole, "nothing came twice"


def test_an_interrupted_pull_is_gone_on_with(scope: Scope, recorder: Recorder) -> None:
    scope.faults.append(Fault(LFS, pause_s=0.02, times=1))

    def interrupt(stage: str, done: int) -> None:
        if stage == "pulling" and done > SIZE // 4:
            raise KeyboardInterrupt

    recorder.on_update = interrupt
    with pytest.raises(KeyboardInterrupt):
        ensure_model(NAME, recorder)
    [held] = cached_models()
    assert held.name == NAME and held.format == "interrupted"
    sent = scope.sent
    recorder.on_update = lambda stage, done: None
    assert (ensure_model(NAME, recorder).path / "model.safetensors").read_bytes() == data(SIZE)
    assert scope.sent - sent < SIZE


@pytest.mark.parametrize("length", [SIZE, SIZE // 2, SIZE + 1])
def test_a_beginning_of_another_file_is_thrown_away(
    scope: Scope, recorder: Recorder, tmp_path: Path, length: int
) -> None:
    folder = tmp_path / "cache/models/org--Tiny-1.5B/snapshots/master"
    write(folder, {"model.safetensors.ingle-part": data(length, 5)})
    assert (ensure_model(NAME, recorder).path / "model.safetensors").read_bytes() == data(SIZE)


def test_an_older_state_of_the_branch_is_not_mixed_with_the_new_one(
    scope: Scope, recorder: Recorder, tmp_path: Path
) -> None:
    folder = tmp_path / "cache/models/org--Tiny-1.5B/snapshots/master"
    old = {**SMALL, "tokenizer.json": SMALL["tokenizer.json"].replace(b"BPE", b"XYZ")}
    write(folder, old, CHANGED_S - 1000)
    ensure_model(NAME, recorder)
    assert (folder / "tokenizer.json").read_bytes() == SMALL["tokenizer.json"]
    fetched = {line.rpartition(" ")[2] for line in scope.asked if "/repo " in line}
    assert fetched == {"tokenizer.json", "README.md", "model.safetensors"}, "what is as it was stays"


def test_many_files_and_odd_names(scope: Scope, recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub cuts its listings without a word: what a model needs may lie behind the cut."""
    monkeypatch.setattr(modelscope, "_LISTING_LIMIT", 30)
    scope.limit = 30
    odd = {"数据/a b#c?.json": b"odd", "a+b&c=%20.txt": b"plus"}
    noise = {f"checkpoints/{step}/{n}.txt": b"1" for step in range(3) for n in range(25)}
    scope.repos["org/Tiny-1.5B"] = Model({**noise, **odd, "gguf/M-Q8_0.gguf": b"GGUF", **SMALL, "README.md": b"#"})
    source = ensure_model(f"{NAME}:Q8_0", recorder)
    assert source.path.read_bytes() == b"GGUF"
    folder = pull_model(NAME, recorder, wanted=Wanted(include=("*.json", "a+b*"))).path
    assert files_in(folder).items() >= odd.items()

    scope.repos["org/Tiny-1.5B"] = Model({f"{n}.txt": b"1" for n in range(31)})
    with pytest.raises(ModelError, match="has 30 files or more beside each other: ModelScope lists no more"):
        ensure_model(f"{NAME}:Q4_0", recorder)


def test_a_range_of_a_small_file(scope: Scope) -> None:
    """As `ingle plan` reads headers: the hub sends it with status 200."""
    origin = origin_of(RepoRef("modelscope", "org/Tiny-1.5B"))
    with origin.http:
        listing = origin.listing(RepoRef("modelscope", "org/Tiny-1.5B"))
        for name in ("config.json", "model.safetensors"):
            file = listing.find(name)
            assert file is not None
            content = scope.repos["org/Tiny-1.5B"].files[name]
            assert origin.http.read(origin.url(listing, file), 100, start=10, size=20) == content[10:30]


def test_search(scope: Scope) -> None:
    scope.repos |= {f"makers/qwen-{n}": tiny(gated=n == 0) for n in range(120)}
    origin = origin_of(RepoRef("modelscope", "qwen"))
    with origin.http:
        found = origin.search("qwen", 70)
        assert len(found) == 70, "the hub gives 50 at a time"
        assert (found[0].name, found[0].downloads, found[0].task, found[0].gated) == (
            "makers/qwen-0", 100, "text-generation", True,
        )  # fmt: skip
        assert [each.name for each in origin.by("org")] == ["org/Tiny-1.5B"]
        scope.faults.append(Fault("^/openapi", 200, {}, b'{"success": false, "code": "QuotaLimitExceed"}'))
        with pytest.raises(ModelError, match="answers: QuotaLimitExceed"):
            origin.search("qwen", 5)


def test_a_mistyped_name_gets_near_ones(scope: Scope, recorder: Recorder) -> None:
    with pytest.raises(ModelError, match=r"has no public model org/Tiny-1\.5: .*; did you mean modelscope:org/Tiny-1"):
        ensure_model("modelscope:org/Tiny-1.5", recorder)


@pytest.mark.parametrize(
    ("name", "endpoint"),
    [
        ("https://modelscope.cn/models/org/name/files", None),
        ("www.modelscope.cn/models/org/name", None),
        ("https://www.modelscope.ai/models/org/name", "https://www.modelscope.ai"),
        ("https://modelscope.cn/models/org/name/resolve/master/a.gguf", None),
    ],
)
def test_addresses_of_both_sites(name: str, endpoint: str | None) -> None:
    ref = parse_name(name)
    assert isinstance(ref, RepoRef)
    assert (ref.hub, ref.repo, ref.revision, ref.endpoint) == ("modelscope", "org/name", None, endpoint)


def test_a_mirror_with_the_files_alone_will_do(scope: Scope, recorder: Recorder) -> None:
    scope.faults.append(Fault("^/openapi/", 404))
    assert (ensure_model(NAME, recorder).path / "model.safetensors").is_file()
    assert any(note.startswith("terms: its page names no licence") for note in recorder.notes)


LOGIN = base64.b64decode("""
gASVjAMAAAAAAACMEHJlcXVlc3RzLmNvb2tpZXOUjBFSZXF1ZXN0c0Nvb2tpZUphcpSTlCmBlH2UKIwHX3BvbGljeZSMDmh0dHAuY29va2llamFylIwT
RGVmYXVsdENvb2tpZVBvbGljeZSTlCmBlH2UKIwIbmV0c2NhcGWUiIwHcmZjMjk2NZSJjBNyZmMyMTA5X2FzX25ldHNjYXBllE6MDGhpZGVfY29va2ll
MpSJjA1zdHJpY3RfZG9tYWlulImMG3N0cmljdF9yZmMyOTY1X3VudmVyaWZpYWJsZZSIjBZzdHJpY3RfbnNfdW52ZXJpZmlhYmxllImMEHN0cmljdF9u
c19kb21haW6USwCMHHN0cmljdF9uc19zZXRfaW5pdGlhbF9kb2xsYXKUiYwSc3RyaWN0X25zX3NldF9wYXRolImMEHNlY3VyZV9wcm90b2NvbHOUjAVo
dHRwc5SMA3dzc5SGlIwQX2Jsb2NrZWRfZG9tYWluc5QpjBBfYWxsb3dlZF9kb21haW5zlE51YowIX2Nvb2tpZXOUfZSMDW1vZGVsc2NvcGUuY26UfZSM
AS+UfZQojARjc3JmlGgGjAZDb29raWWUk5QpgZR9lCiMB3ZlcnNpb26USwCMBG5hbWWUaCGMBXZhbHVllIwBeJSMBHBvcnSUTowOcG9ydF9zcGVjaWZp
ZWSUiYwGZG9tYWlulGgdjBBkb21haW5fc3BlY2lmaWVklIiMEmRvbWFpbl9pbml0aWFsX2RvdJSJjARwYXRolGgfjA5wYXRoX3NwZWNpZmllZJSIjAZz
ZWN1cmWUiYwHZXhwaXJlc5ROjAdkaXNjYXJklIiMB2NvbW1lbnSUTowLY29tbWVudF91cmyUTowHcmZjMjEwOZSJjAVfcmVzdJR9lIwISHR0cE9ubHmU
TnN1YowMbV9zZXNzaW9uX2lklGgjKYGUfZQoaCZLAGgnaDpoKIwObXMtZHVtbXktdG9rZW6UaCpOaCuJaCyMDW1vZGVsc2NvcGUuY26UaC2IaC6JaC9o
H2gwiGgxiWgyigUAV4b0AGgziWg0Tmg1Tmg2iWg3fZR1YowCenqUaCMpgZR9lChoJksAaCdoQGgojAVsYXRlcpRoKk5oK4loLIwNbW9kZWxzY29wZS5j
bpRoLYhoLoloL2gfaDCIaDGJaDJOaDOIaDROaDVOaDaJaDd9lGg5TnN1YnVzc3ViLg==
""")
"""`credentials/cookies` of a login with the token ms-dummy-token that expires in 2100, between other cookies."""


def test_a_private_model_with_a_token_that_stays_with_the_hub(
    scope: Scope, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    scope.repos["org/Tiny-1.5B"] = tiny(token="ms-mine")
    with pytest.raises(ModelError, match="is private, or its terms"):
        ensure_model(NAME, recorder)
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "ms-other")
    with pytest.raises(
        ModelError, match=r"does not take your token .MODELSCOPE_API_TOKEN or `modelscope login`.: make"
    ):
        ensure_model(NAME, recorder)
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", " ms-mine\n")
    scope.tokens.clear()
    assert (ensure_model(NAME, recorder).path / "model.safetensors").read_bytes() == data(SIZE)
    assert {token for path, token in scope.tokens if path.startswith("/lfs/")} == {None}
    assert {token for path, token in scope.tokens if not path.startswith("/lfs/")} == {"Bearer ms-mine"}
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "ms mine; x")
    with pytest.raises(ConfigError, match="MODELSCOPE_API_TOKEN holds what no token is made of"):
        ensure_model(f"{NAME}@v2", recorder)


@pytest.mark.parametrize(
    ("cookies", "known"),
    [
        (LOGIN, True),
        (LOGIN.replace((4102444800).to_bytes(5, "little"), (1).to_bytes(5, "little")), False),
        (LOGIN[:300], False),
        (b"", False),
        (b"\x80\x04h\x05.", False),
        (b"cos\nsystem\n(S'touch /tmp/ingle-was-here'\ntR.", False),
    ],
)
def test_a_login_of_the_package_is_read_and_never_run(
    scope: Scope, recorder: Recorder, tmp_path: Path, cookies: bytes, known: bool
) -> None:
    scope.repos["org/Tiny-1.5B"] = tiny(token="ms-dummy-token")
    write(tmp_path / "account", {"credentials/cookies": cookies})
    if known:
        assert (ensure_model(NAME, recorder).path / "model.safetensors").is_file()
        assert {token for path, token in scope.tokens if path.startswith("/lfs/")} == {None}
    else:
        with pytest.raises(ModelError, match="is private, or its terms"):
            ensure_model(NAME, recorder)
    assert not Path("/tmp/ingle-was-here").exists()


MARKERS = {".msc": b"\x80\x04]\x94.", ".mdl": b"\x80\x04}\x94."}
OF_TAG, OF_MASTER = b"Revision:v1.0.0,CreatedAt:1726842501", b"Revision:master,CreatedAt:1726842501"
LAYOUTS = {
    "1.19": ("hub/org/Tiny-1___5B", {**MARKERS, ".mv": OF_MASTER}),
    "1.19, with tags": ("hub/org/Tiny-1___5B", {**MARKERS, ".mv": OF_TAG}),
    "1.31": ("models/org/Tiny-1___5B", {**MARKERS, ".mv": OF_MASTER}),
    "1.31, default": ("hub/models/org/Tiny-1___5B", {**MARKERS, ".mv": OF_MASTER}),
    "1.40": ("models/org--Tiny-1.5B/snapshots/master", {}),
    "1.40, tag": ("models/org--Tiny-1.5B/snapshots/v1.0.0", {}),
    "before": ("org/Tiny-1.5B", MARKERS),
}


@pytest.mark.parametrize("version", LAYOUTS)
def test_what_the_package_has_downloaded_is_found_without_a_request(
    scope: Scope, recorder: Recorder, tmp_path: Path, version: str
) -> None:
    place, markers = LAYOUTS[version]
    cache = tmp_path / "cache"
    write(cache / place, {**tiny().files, **markers})
    for noise in (".lock/x.lock", "._____temp/org/Tiny-1___5B/part", "hub/._____temp/a", "models/org/absent/.mdl"):
        write(cache, {noise: b""})
    if version == "1.31":  # which links the name as it is
        (cache / "models/org/Tiny-1.5B").symlink_to(cache / place, target_is_directory=True)
    is_tag = "tag" in version
    found = ensure_model(f"{NAME}@v1.0.0" if is_tag else NAME, recorder)
    assert found.path.resolve() == cache / place and not scope.asked
    assert [(held.name, held.format) for held in cached_models()] == [(NAME, "safetensors")]
    with pytest.raises(ModelError, match="has no revision"):  # it is asked for: what is here is another
        ensure_model(f"{NAME}@v2.0.0", recorder)


def test_gguf_in_old_folders(scope: Scope, recorder: Recorder, tmp_path: Path) -> None:
    files = gguf().files
    del files["config.json"]
    write(tmp_path / "cache/hub/models/org/gguf-0___5b", files)
    assert ensure_model("modelscope:org/gguf-0.5b:Q8_0", recorder).path.read_bytes() == files["sub/M-Q8_0.gguf"]
    assert [held.name for held in cached_models()] == [
        "modelscope:org/gguf-0.5b:Q4_K_M", "modelscope:org/gguf-0.5b:Q8_0",
    ]  # fmt: skip


def test_what_the_package_began_is_gone_on_with(scope: Scope, recorder: Recorder, tmp_path: Path) -> None:
    folder = tmp_path / "cache/models/org/Tiny-1___5B"
    write(folder, SMALL, time.time())
    assert ensure_model(NAME, recorder).path == folder
    assert not any(" config.json" in line for line in scope.asked)
    assert not (tmp_path / "cache/models/org--Tiny-1.5B").exists()
