"""What goes wrong with hubs, and the line that says what to do."""

from __future__ import annotations

import pytest

from ingle.errors import ModelError
from ingle.hub import http
from ingle.hub.resolve import ensure_model
from tests.hub.repos import data, files_in, single
from tests.hub.server import Fault, Hub
from tests.hub.toy import Recorder

PAGE = b"<!doctype html><title>Sign in</title>"
HTML = {"Content-Type": "text/html; charset=utf-8"}
MODEL, CDN = "^/api/models/", "^/cdn/"


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "RETRY_DELAYS_S", (0.01, 0.01))
    monkeypatch.setattr("ingle.hub.download.RETRY_DELAYS_S", (0.01, 0.01))
    monkeypatch.setattr(http, "READ_S", 0.3)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault(MODEL, 401, {"X-Error-Code": "RepoNotFound"}), "has no public model org/tiny: check the name; for"),
        (Fault(MODEL, 401, {"X-Error-Message": "Invalid credentials"}), "does not take your token"),
        (Fault(MODEL, 403, {"X-Error-Message": "no scope"}), r"your token does not allow to read org/tiny \(403"),
        (Fault(MODEL, 403, {"X-Error-Code": "GatedRepo"}), "is gated: accept its terms at .*, then set HF_TOKEN"),
        (Fault(MODEL, 404), "has no public model org/tiny"),
        (Fault(MODEL, 403, {"X-Error-Message": "Access to this resource is disabled."}), "has been disabled by"),
        (Fault(MODEL, 429, {"Retry-After": "300"}), "limits how often it is asked .429.: try again in 300 s"),
        (Fault(MODEL, 429), "limits how often it is asked .429.: try again later, or with a token"),
        (Fault(MODEL, 500), "answers 500: it is down or overloaded; try again later or a mirror"),
        (Fault(MODEL, 503, {"Retry-After": "Fri, 31 Dec 2100 23:59:59 GMT"}), "answers 503: .* in 86400 s"),
        (Fault(MODEL, 504), "answers 504"),
        (Fault(MODEL, 418), "answers 418"),
        (Fault(MODEL, 200, HTML, PAGE), "answers with a web page in the file's place: .* HF_ENDPOINT"),
        (Fault(MODEL, 200, {}, PAGE), "answers what is not JSON"),
        (Fault(MODEL, 200, {}, b"[" * 100_000), "answers what is not JSON"),
        (Fault(MODEL, 200, {}, b'{"error": "no"}'), "answers otherwise than a hub does"),
        (Fault(MODEL, 200, {}, b'{"id": "org/tiny"}'), "says no commit of org/tiny: is it the address of a hub"),
        (Fault(MODEL, 302, {"Location": "/api/models/org/tiny"}), "redirects more than 10 times"),
        (Fault(MODEL, 302, {"Location": "file:///etc/passwd"}), "is not an address of http or https"),
        (Fault("/config.json$", 404, {"X-Error-Code": "EntryNotFound"}), "has no file config.json: it changed"),
        (Fault(CDN, 403), "localhost:[0-9]+/cdn/org/tiny/model.safetensors answers 403 Forbidden$"),
        (Fault(CDN, 503), "answers 503: it is down or overloaded"),
        (Fault(CDN, cut_after=0), "model.safetensors: the connection ended after 0 of 100000 bytes|connection broke"),
        (Fault(CDN, instead=data(100_000, 9)), "what came has SHA-256 .*…, and the hub says .*; it was"),
        (Fault(CDN, instead=data(90_000)), "the hub says 100000 bytes, and localhost:[0-9]+ sends 90000; a mirror"),
        (Fault(CDN, instead=data(110_000)), "the hub says 100000 bytes, and localhost:[0-9]+ sends 110000"),
        (Fault(CDN, 200, HTML, PAGE), "answers with a web page in the file's place"),
        (Fault("generation_config.json$", instead=b'{"temperature": 0.5}'), "what came has git's SHA-1"),
    ],
)
def test_each_fault_has_its_line(hub: Hub, recorder: Recorder, fault: Fault, message: str) -> None:
    hub.repos["org/tiny"] = single()
    hub.faults = [fault]
    with pytest.raises(ModelError, match=message) as error:
        ensure_model("org/tiny", recorder)
    assert len(error.value.lines()) == 1 and len(str(error.value)) < 500
    assert "sig=secret" not in str(error.value) + "".join(recorder.notes)
    hub.faults.clear()
    path = ensure_model("org/tiny", recorder).path
    assert (path / "model.safetensors").read_bytes() == data(100_000)


@pytest.mark.parametrize(
    "fault",
    [
        Fault(MODEL, 429, {"Retry-After": "0"}, times=1),
        Fault(MODEL, 502, times=2),
        Fault(CDN, 503, times=2),
        Fault(CDN, cut_after=40_000, times=1),
        Fault(CDN, cut_after=1_000, times=20),
        Fault("tokenizer.json$", cut_after=5, times=1),
        Fault(CDN, pause_s=0.5, times=1),
    ],
)
def test_what_passes_is_waited_for(hub: Hub, recorder: Recorder, fault: Fault) -> None:
    hub.repos["org/tiny"] = single()
    hub.faults = [fault]
    path = ensure_model("org/tiny", recorder).path
    assert (path / "model.safetensors").read_bytes() == data(100_000)
    assert any("trying again in 0 s" in note for note in recorder.notes)
    assert hub.sent >= sum(len(hub.repos["org/tiny"].files[name]) for name in files_in(path))


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"http_proxy": "http://user:word@127.0.0.1:9"},
            "cannot be reached .*through the proxy http://127.0.0.1:9: check",
        ),
        ({"http_proxy": "socks5://127.0.0.1:9"}, "speaks SOCKS: `pip install socksio`"),
        ({"http_proxy": "ftp://proxy"}, "the proxy ftp://proxy is not an address"),
        ({}, "cannot be reached .*: check the network and the address"),
    ],
)
def test_the_way_to_the_hub(
    hub: Hub, recorder: Recorder, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ModelError, match=message) as error:
        ensure_model("org/tiny", recorder)
    assert "word" not in str(error.value)


def test_a_proxy_is_used(hub: Hub, recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos["org/tiny"] = single()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://hub.invalid")
    monkeypatch.setenv("http_proxy", hub.url)
    monkeypatch.setenv("no_proxy", "localhost")
    assert ensure_model("org/tiny", recorder).path.is_dir()
