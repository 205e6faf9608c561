"""What a server says before its model is there, and under which names it knows it."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from ingle.config.access import ApiKey
from ingle.hub.resolve import ModelSource, resolve_model
from ingle.server import loading as loading_module
from ingle.server.access import Access
from ingle.server.app import ENDPOINTS, create_app
from ingle.server.loading import Loading
from ingle.server.models import ModelPool, ServedModel
from ingle.server.names import served_names

from .fakes import MODEL, assert_error, client_of

pytestmark = pytest.mark.anyio


async def test_until_the_model_is_there_clients_are_told_what_is_done(model: ServedModel) -> None:
    loading, pool = Loading(), ModelPool()
    client = client_of(create_app(pool, Access((ApiKey("key"),)), loading=loading))
    keyed = {"Authorization": "Bearer key"}
    loading.report("loading weights of llama on cpu: 40 %")

    health = await client.get("/health")
    assert (health.status_code, health.headers["retry-after"]) == (503, "1")
    said = health.json()
    assert said["status"] == "loading" and said["stage"] == "loading weights of llama on cpu: 40 %"
    assert said["percent"] == 40 and 0 <= said["seconds"] < 10
    assert (await client.get("/ping")).json()["status"] == "loading"
    of_a_model = [("POST", "/v1/chat/completions"), ("GET", "/v1/models"), ("GET", "/v1/models/any")]
    of_a_model += [("POST", each.path) for each in ENDPOINTS if each.body and not each.path.startswith("/v1/")]
    for method, path in of_a_model:
        assert (await client.request(method, path)).status_code == 401
        refused = await client.request(method, path, headers=keyed)
        assert assert_error(refused, 503, "The model is being loaded: ", "40 %", "/health")["code"] == "model_loading"
        assert refused.headers["retry-after"] == "1"
    assert (await client.get("/version", headers=keyed)).status_code == 200
    assert (await client.get("/", headers=keyed)).json()["models"] == []

    pool.add(model)
    loading.done = True
    assert (await client.get("/health")).json()["status"] == "ok"
    assert (await client.get("/", headers=keyed)).json()["models"] == [MODEL, "alias"]


@pytest.mark.parametrize(
    ("stage", "percent"),
    [("compiling: 12 of 20 files", 60), ("loading: 7 %", 7), ("reading 3 things", None), ("0 of 0", 0)],
)
def test_the_share_is_read_from_the_stage(stage: str, percent: int | None) -> None:
    loading = Loading()
    loading.report(stage)
    assert loading.percent == percent


async def test_the_log_has_each_stage_once_and_is_never_silent_for_long(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, logger="ingle")
    monkeypatch.setattr(loading_module, "_SILENT_S", 0.02)
    monkeypatch.setattr(loading_module, "_TICK_S", 0.005)
    loading = Loading()
    for stage in ("reading", "weights: 1 %", "weights: 2 %"):
        loading.report(stage)
    assert caplog.messages == ["engine: reading", "engine: weights: 1 %"]
    watched = asyncio.create_task(loading.watch())
    await asyncio.sleep(0.06)
    loading.done = True
    await watched
    assert caplog.messages[2].startswith("engine: still weights: 2 % (0 s since the start)")


async def test_other_names_answer_and_are_not_shown(model: ServedModel) -> None:
    path = "/secret/tiny"
    client = client_of(create_app(ModelPool([replace(model, names=("tiny",), root="tiny", also=(path,))]), Access()))
    answer = await client.post("/v1/completions", json={"model": path, "prompt": "a", "max_tokens": 2})
    assert (answer.status_code, answer.json()["model"]) == (200, "tiny")
    assert (await client.get(f"/v1/models/{path}")).json()["id"] == "tiny"
    error = await client.post("/v1/completions", json={"model": "other", "prompt": "a"})
    for response in (await client.get("/v1/models"), await client.get("/v1/models/other"), error):
        assert "secret" not in response.text and "tiny" in response.text


def test_names_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    snapshot = tmp_path / "models--Org--Name" / "snapshots" / "0123"
    for folder in (tmp_path / "Some-Model", snapshot):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    for file in ("a.Q4_K_M.gguf", "b-00001-of-00002.gguf"):
        (tmp_path / file).write_bytes(b"GGUF")
    cases = {
        "Some-Model": ("Some-Model", str(tmp_path / "Some-Model")),
        "./Some-Model/": ("Some-Model", "./Some-Model"),
        str(tmp_path / "Some-Model"): ("Some-Model", str(tmp_path / "Some-Model")),
        "a.Q4_K_M.gguf": ("a.Q4_K_M", "a.Q4_K_M.gguf"),
        "./b-00001-of-00002.gguf": ("b", "b-00001-of-00002"),
        str(snapshot): ("Org/Name", str(snapshot)),
    }
    for given, (shown, other) in cases.items():
        names = served_names(resolve_model(given), given)
        assert names.shown == (shown,) and other in names.also, given
    monkeypatch.chdir(tmp_path / "Some-Model")
    assert served_names(resolve_model("."), ".").shown == ("Some-Model",)


def test_alias_and_full_name_both_answer(tmp_path: Path) -> None:
    for given in ("smollm2", "smollm2:135m", "SmolLM2"):
        names = served_names(ModelSource("smollm2:135m", tmp_path / "x.gguf", "gguf"), given)
        assert names.shown == ("smollm2:135m",) and "smollm2" in names.also
    names = served_names(ModelSource("qwen3:8b", tmp_path / "x", "folder"), "qwen3")
    assert names.shown == ("qwen3:8b",) and {"qwen3", "Qwen/Qwen3-8B"} <= {*names.also}
