"""What a client keeps on the server is its own, if its key has a name."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Route

from ingle.config.access import ApiKey
from ingle.server.access import client_of as client_in
from ingle.server.batch import worker as worker_module
from ingle.server.batch.store import Store
from ingle.server.batch.worker import BatchWorker
from ingle.server.models import ServedModel

from .fakes import MODEL, app_for, assert_error, client_of

pytestmark = pytest.mark.anyio

KEYS = (
    ApiKey("a", "alice", owner="alice"),
    ApiKey("b", "bob", owner="bob"),
    ApiKey("r", "root", owner="root", is_admin=True),
    ApiKey("x", "key-4"),
    ApiKey("y", "key-5"),
)


@pytest.fixture
def app(model: ServedModel, tmp_path: Path) -> Starlette:
    return app_for(model, api_keys=KEYS, store=Store(tmp_path, 1 << 30))


@pytest.fixture
def client(app: Starlette) -> httpx.AsyncClient:
    return client_of(app)


def as_(key: str) -> dict[str, Any]:
    return {"headers": {"x-api-key": key}}


def lines() -> bytes:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}
    return json.dumps({"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": body}).encode()


async def upload(client: httpx.AsyncClient, key: str) -> str:
    sent = await client.post("/v1/files", files={"file": ("f", lines())}, data={"purpose": "batch"}, **as_(key))
    assert sent.status_code == 200 and "owner" not in sent.json()
    return str(sent.json()["id"])


async def test_files(client: httpx.AsyncClient) -> None:
    mine, shared = await upload(client, "a"), await upload(client, "x")
    for key, seen in (("a", [mine]), ("b", []), ("r", []), ("x", [shared]), ("y", [shared])):
        listed = (await client.get("/v1/files", **as_(key))).json()["data"]
        assert [each["id"] for each in listed] == seen and not any("owner" in each for each in listed)
    for key in ("b", "r", "x"):
        for ask in (client.get(f"/v1/files/{mine}", **as_(key)), client.delete(f"/v1/files/{mine}", **as_(key))):
            assert_error(await ask, 404, f"There is no file '{mine}'", param="file_id")
        assert (await client.get(f"/v1/files/{mine}/content", **as_(key))).status_code == 404
        asked = {"input_file_id": mine, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
        assert (await client.post("/v1/batches", json=asked, **as_(key))).status_code == 404
    assert (await client.get(f"/v1/files/{mine}/content", **as_(key="a"))).content == lines()


async def test_batches(app: Starlette, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "_LOOK_S", 0.01)
    chat = next(each for each in app.routes if isinstance(each, Route) and each.path == "/v1/chat/completions")
    asked_by, inner = [], chat.endpoint

    async def spying(request: Any) -> Any:
        asked_by.append(client_in(request.scope).name)
        return await inner(request)

    chat.endpoint = spying
    mine = await upload(client, "a")
    asked = {"input_file_id": mine, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    batch = (await client.post("/v1/batches", json=asked, **as_("a"))).json()
    worker = BatchWorker(app, app.state.models, app.state.store)
    running = asyncio.create_task(worker.run())
    path = f"/v1/batches/{batch['id']}"
    try:
        for _ in range(3000):
            batch = (await client.get(path, **as_("a"))).json()
            if batch["status"] == "completed":
                break
            await asyncio.sleep(0.01)
    finally:
        running.cancel()
        await asyncio.wait([running])
    assert batch["status"] == "completed" and asked_by == ["alice"]
    for key in ("b", "r", "x"):
        assert_error(await client.get(path, **as_(key)), 404, "There is no batch", param="batch_id")
        assert (await client.post(f"{path}/cancel", **as_(key))).status_code == 404
        assert (await client.get("/v1/batches", **as_(key))).json()["data"] == []
        assert (await client.get(f"/v1/files/{batch['output_file_id']}/content", **as_(key))).status_code == 404
    assert [each["id"] for each in (await client.get("/v1/batches", **as_("a"))).json()["data"]] == [batch["id"]]
    assert (await client.get(f"/v1/files/{batch['output_file_id']}/content", **as_("a"))).status_code == 200


async def test_answers(client: httpx.AsyncClient) -> None:
    made = (await client.post("/v1/responses", json={"model": MODEL, "input": "hello"}, **as_("a"))).json()
    path, item = f"/v1/responses/{made['id']}", made["output"][0]["id"]
    for key in ("b", "r", "x"):
        for each in (path, f"{path}/input_items"):
            assert_error(await client.get(each, **as_(key)), 404, "does not exist here", param="response_id")
        assert (await client.delete(path, **as_(key))).status_code == 404
        for more in ({"previous_response_id": made["id"]}, {"input": [{"type": "item_reference", "id": item}]}):
            asked = {"model": MODEL, "input": "and then?", **more}
            assert (await client.post("/v1/responses", json=asked, **as_(key))).status_code == 404
    asked = {"model": MODEL, "input": "and then?", "previous_response_id": made["id"]}
    assert (await client.post("/v1/responses", json=asked, **as_("a"))).status_code == 200
    assert (await client.delete(path, **as_("a"))).status_code == 200


async def test_what_was_kept_before_there_were_owners_is_everybodys(tmp_path: Path) -> None:
    store = Store(tmp_path, 1 << 30)
    (tmp_path / "files").mkdir()
    old = {"id": "file-" + "0" * 32, "bytes": 1, "created_at": 1, "filename": "f", "purpose": "batch"}
    (tmp_path / "files" / f"{old['id']}.json").write_text(json.dumps(old))
    assert [(kept.id, kept.owner) for kept in store.files()] == [(old["id"], "")]
