"""Files and batches: with the official client, over restarts, and with what others may send."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from starlette.applications import Starlette

from ingle.channel import EngineStats
from ingle.limits import LimitsConfig
from ingle.server.batch import store as store_module
from ingle.server.batch import worker as worker_module
from ingle.server.batch.store import Store
from ingle.server.batch.worker import BatchWorker
from ingle.server.models import ServedModel

from .fakes import GREETING, MODEL, ScriptedEngine, app_for, assert_error, client_of, served, until

pytestmark = pytest.mark.anyio


class PowerCut(BaseException):
    """The process ends here."""


@dataclass
class Clock:
    s: float = 1_700_000_000.0

    def __call__(self) -> float:
        return self.s


@dataclass
class Place:
    """A server's state on disk, and how a server goes on with it."""

    model: ServedModel
    root: Path
    max_bytes: int = 1 << 20
    clock: Clock = field(default_factory=Clock)
    limits: LimitsConfig = LimitsConfig()  # noqa: RUF009 (frozen)

    def app(self) -> Starlette:
        return app_for(self.model, store=Store(self.root, self.max_bytes, self.clock, self.limits))

    @asynccontextmanager
    async def working(self) -> AsyncIterator[httpx.AsyncClient]:
        app = self.app()
        worker = app.state.batches = BatchWorker(app, app.state.models, app.state.store)
        running = asyncio.create_task(worker.run())
        try:
            async with client_of(app) as client:
                yield client
        finally:
            running.cancel()
            with suppress(asyncio.CancelledError, PowerCut):
                await running


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "_LOOK_S", 0.01)


@pytest.fixture
def place(model: ServedModel, tmp_path: Path) -> Place:
    return Place(model, tmp_path / "kept")


def line(custom_id: str, url: str = "/v1/chat/completions", **body: Any) -> dict[str, Any]:
    asked = {"model": MODEL, "messages": [{"role": "user", "content": custom_id}], **body}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": asked}


def jsonl(lines: Iterable[Any]) -> bytes:
    return b"".join(json.dumps(each).encode() + b"\n" for each in lines)


async def upload(client: httpx.AsyncClient, content: bytes, purpose: str = "batch", **more: str) -> httpx.Response:
    return await client.post("/v1/files", files={"file": ("in.jsonl", content)}, data={"purpose": purpose, **more})


async def begin(client: httpx.AsyncClient, lines: Iterable[Any], **body: Any) -> dict[str, Any]:
    file = (await upload(client, jsonl(lines))).json()
    asked = {"input_file_id": file["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h", **body}
    response = await client.post("/v1/batches", json=asked)
    assert response.status_code == 200, response.text
    return dict(response.json())


async def ended(client: httpx.AsyncClient, batch: dict[str, Any], within_s: float = 10.0) -> dict[str, Any]:
    for _ in range(int(within_s / 0.01)):
        batch = (await client.get(f"/v1/batches/{batch['id']}")).json()
        if batch["status"] in ("completed", "failed", "expired", "cancelled"):
            return batch
        await asyncio.sleep(0.01)
    raise AssertionError(f"not within {within_s} s: {batch}")


async def results(client: httpx.AsyncClient, file_id: str) -> dict[str, Any]:
    content = (await client.get(f"/v1/files/{file_id}/content")).text
    lines = [json.loads(each) for each in content.splitlines()]
    assert len({each["custom_id"] for each in lines}) == len(lines)
    return {each["custom_id"]: each for each in lines}


# ---- the official client


async def test_the_official_client(place: Place) -> None:
    app = place.app()
    app.state.batches = BatchWorker(app, app.state.models, app.state.store)
    running = asyncio.create_task(app.state.batches.run())
    async with (
        served(app) as port,
        openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as sdk,
    ):
        content = jsonl([line("a"), line("b", temperature=-1), line("c", max_tokens=3)])
        file = await sdk.files.create(
            file=("questions 你.jsonl", content), purpose="batch",
            expires_after={"anchor": "created_at", "seconds": 7200},
        )  # fmt: skip
        assert (file.bytes, file.filename, file.purpose) == (len(content), "questions 你.jsonl", "batch")
        assert file.expires_at == file.created_at + 7200
        assert [each.id async for each in sdk.files.list()] == [file.id]
        assert (await sdk.files.content(file.id)).content == content
        batch = await sdk.batches.create(
            input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h", metadata={"for": "test"}
        )
        assert batch.status == "validating" and batch.expires_at == batch.created_at + 86_400
        while batch.status in ("validating", "in_progress", "finalizing"):
            await asyncio.sleep(0.02)
            batch = await sdk.batches.retrieve(batch.id)
        assert (batch.status, batch.metadata) == ("completed", {"for": "test"}), batch
        assert batch.request_counts is not None
        assert batch.request_counts.model_dump() == {"total": 3, "completed": 2, "failed": 1}
        assert [each.id async for each in sdk.batches.list()] == [batch.id]
        assert batch.output_file_id is not None and batch.error_file_id is not None
        lines = [json.loads(each) for each in (await sdk.files.content(batch.output_file_id)).text.splitlines()]
        said = {each["custom_id"]: each["response"]["body"]["choices"][0]["message"]["content"] for each in lines}
        assert said == {"a": GREETING, "c": "Hel"} and all(each["error"] is None for each in lines)
        (bad,) = [json.loads(each) for each in (await sdk.files.content(batch.error_file_id)).text.splitlines()]
        assert bad["custom_id"] == "b" and bad["response"]["status_code"] == 400
        assert "temperature" in bad["response"]["body"]["error"]["message"]
        assert (await sdk.files.delete(file.id)).deleted
        with pytest.raises(openai.NotFoundError):
            await sdk.files.retrieve(file.id)
        with pytest.raises(openai.BadRequestError, match="has ended: it is completed"):
            await sdk.batches.cancel(batch.id)
    running.cancel()


# ---- batches


async def test_a_server_that_starts_anew_goes_on(place: Place, engine: ScriptedEngine) -> None:
    engine.step_s = 0.01
    lines = [line(str(index), max_tokens=4) for index in range(40)]
    async with place.working() as client:
        batch = await begin(client, lines)
        folder = place.root / "batches" / batch["id"]
        await until(lambda: (folder / "output.jsonl").exists() and (folder / "output.jsonl").stat().st_size > 0, 5.0)
    done = (folder / "output.jsonl").read_bytes().count(b"\n")
    assert 0 < done < len(lines) and engine.running == 0
    with (folder / "output.jsonl").open("ab") as file:
        file.write(b'{"id":"batch_req_1","custom_id":"cut o')  # the power went
    asked = len(engine.requests)
    async with place.working() as client:
        batch = await ended(client, batch)
        assert (batch["status"], batch["request_counts"]["completed"]) == ("completed", 40)
        assert len(await results(client, batch["output_file_id"])) == 40
    assert len(engine.requests) - asked == 40 - done, "what was answered is not asked again"
    assert batch["error_file_id"] is None and not (folder / "input.jsonl").exists()


async def test_an_end_that_was_cut_off_is_made_again(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    real, cut = Store._write, [1]

    def failing(path: Path, record: Any) -> None:
        if path.parent.name == "files" and getattr(record, "purpose", "") == "batch_output" and cut:
            cut.pop()
            raise PowerCut
        real(path, record)

    async with place.working() as client:
        monkeypatch.setattr(Store, "_write", staticmethod(failing))
        batch = await begin(client, [line("a")])
        await until(lambda: not cut, 5.0)
    async with place.working() as client:
        batch = await ended(client, batch)
        assert batch["status"] == "completed" and list(await results(client, batch["output_file_id"])) == ["a"]


async def test_cancelled(place: Place, engine: ScriptedEngine) -> None:
    engine.step_s = 0.01
    async with place.working() as client:
        batch = await begin(client, [line(str(index), max_tokens=4) for index in range(60)])
        await until(lambda: len(engine.requests) > 2, 5.0)
        answer = (await client.post(f"/v1/batches/{batch['id']}/cancel")).json()
        assert answer["status"] == "cancelling" and answer["cancelling_at"]
        batch = await ended(client, batch)
        assert batch["status"] == "cancelled" and batch["cancelled_at"]
        counts = batch["request_counts"]
        assert 0 < counts["completed"] < 60 == counts["total"]
        assert len(await results(client, batch["output_file_id"])) == counts["completed"]


async def test_expired(place: Place, engine: ScriptedEngine) -> None:
    engine.step_s = 0.01
    async with place.working() as client:
        batch = await begin(client, [line(str(i), max_tokens=4) for i in range(60)], completion_window="1h")
        await until(lambda: len(engine.requests) > 2, 5.0)
        place.clock.s += 3600
        batch = await ended(client, batch)
        assert batch["status"] == "expired" and batch["expired_at"]
        answered = await results(client, batch["output_file_id"])
        late = await results(client, batch["error_file_id"])
        assert len(answered) + len(late) == 60
        assert {each["error"]["code"] for each in late.values()} == {"batch_expired"}


async def test_whoever_waits_goes_first(place: Place, engine: ScriptedEngine) -> None:
    engine.stats = EngineStats(num_waiting=1)
    async with place.working() as client:
        batch = await begin(client, [line("a")])
        folder = place.root / "batches" / batch["id"]
        await until(lambda: (folder / "output.jsonl").exists(), 5.0)
        await asyncio.sleep(0.05)
        assert not engine.requests
        engine.stats = EngineStats()
        assert (await ended(client, batch))["status"] == "completed"
        await client.post("/v1/chat/completions", json=line("b")["body"])
    assert engine.in_background == [True, False]


async def test_no_more_than_half_of_the_slots(place: Place, engine: ScriptedEngine) -> None:
    engine.step_s, most = 0.005, 0
    async with place.working() as client:
        batch = await begin(client, [line(str(index), max_tokens=4) for index in range(30)])
        while (await client.get(f"/v1/batches/{batch['id']}")).json()["status"] != "completed":
            most = max(most, engine.running)
            await asyncio.sleep(0.001)
    assert most == engine.info.max_num_seqs // 2


@pytest.mark.parametrize(
    ("lines", "code", "message"),
    [
        (["{"], "invalid_json_line", "the line is no request"),
        ([b"\xff".decode("latin-1")], "invalid_json_line", "the line is no request"),
        ([{"custom_id": "a", "url": "/v1/chat/completions"}], "invalid_json_line", "missing required field `body`"),
        ([line("")], "invalid_custom_id", "1 to 512 characters"),
        ([line("a"), line("b"), line("a")], "duplicate_custom_id", "custom_id is that of line 1"),
        ([{**line("a"), "method": "GET"}], "invalid_method", "must be POST"),
        ([line("a", "/v1/embeddings")], "invalid_url", "'/v1/embeddings' is none of /v1/chat/completions"),
        ([line("a", "../../etc")], "invalid_url", "is none of"),
        ([line("a", stream=True)], "stream_not_allowed", "a batch has no streams"),
        ([line("a"), line("b", model="other")], "model_not_found", "The model 'other' does not exist"),
        ([], "empty_file", "has no line"),
    ],
)
async def test_input_that_cannot_be_run(place: Place, lines: list[Any], code: str, message: str) -> None:
    content = b"".join(each.encode() + b"\n" if isinstance(each, str) else jsonl([each]) for each in lines)
    async with place.working() as client:
        file = (await upload(client, content)).json()
        batch = (
            await client.post(
                "/v1/batches",
                json={"input_file_id": file["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h"},
            )
        ).json()
        batch = await ended(client, batch)
    assert batch["status"] == "failed" and batch["output_file_id"] is None
    error = batch["errors"]["data"][0]
    assert error["code"] == code and message in error["message"]


async def test_lines_of_a_batch_are_counted(place: Place) -> None:
    place.limits = LimitsConfig(max_batch_lines=3)
    async with place.working() as client:
        batch = await ended(client, await begin(client, [line(str(index)) for index in range(5)]))
    assert batch["errors"]["data"][0]["code"] == "too_many_lines"


async def test_a_batch_of_another_model_waits_for_its_server(place: Place) -> None:
    async with place.working() as client:
        batch = await begin(client, [line("a", model="other")])
        await asyncio.sleep(0.05)
        assert (await client.get(f"/v1/batches/{batch['id']}")).json()["status"] == "validating"
        await client.post(f"/v1/batches/{batch['id']}/cancel")
        assert (await ended(client, batch))["status"] == "cancelled"


async def test_of_two_servers_one_works(place: Place, engine: ScriptedEngine) -> None:
    async with place.working() as first, place.working() as second:
        batches = [await begin(client, [line(str(i)) for i in range(5)]) for client in (first, second)]
        assert [(await ended(second, batch))["status"] for batch in batches] == ["completed"] * 2
    assert len(engine.requests) == 10


@pytest.mark.parametrize(
    ("body", "parts", "param"),
    [
        ({"input_file_id": None}, ["input_file_id"], "input_file_id"),
        ({"input_file_id": "file-" + "0" * 32}, ["There is no file"], "file_id"),
        ({"input_file_id": "../../../etc/passwd"}, ["There is no file"], "file_id"),
        ({"endpoint": "/v1/models"}, ["must be one of /v1/"], "endpoint"),
        ({"completion_window": "1y"}, ["must be 24h"], "completion_window"),
        ({"metadata": {"a": "x" * 600}}, ["16 pairs"], "metadata"),
        (
            {"output_expires_after": {"anchor": "created_at", "seconds": 5}},
            ["from 3600"],
            "output_expires_after.seconds",
        ),
    ],
)
async def test_batches_that_are_refused(place: Place, body: dict[str, Any], parts: list[str], param: str) -> None:
    async with client_of(place.app()) as client:
        file = (await upload(client, jsonl([line("a")]))).json()
        asked = {"input_file_id": file["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h", **body}
        status = 404 if parts == ["There is no file"] else 400
        assert_error(await client.post("/v1/batches", json=asked), status, *parts, param=param)
        other = (await upload(client, b"x", "evals")).json()
        asked |= {"input_file_id": other["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h"}
        if not body.keys() & {"metadata", "output_expires_after"}:
            assert_error(
                await client.post("/v1/batches", json=asked), 400, "was uploaded for evals", param="input_file_id"
            )


# ---- files


async def test_files(place: Place) -> None:
    async with client_of(place.app()) as client:
        ids = []
        for index in range(5):
            place.clock.s += 1
            ids.append((await upload(client, b"x" * index, "batch" if index % 2 else "user_data")).json()["id"])
        listed = (await client.get("/v1/files?limit=2")).json()
        assert [file["id"] for file in listed["data"]] == ids[:2:-1] and listed["has_more"]
        listed = (await client.get(f"/v1/files?limit=2&order=asc&after={ids[2]}")).json()
        assert [file["id"] for file in listed["data"]] == ids[3:] and not listed["has_more"]
        listed = (await client.get("/v1/files?purpose=batch")).json()
        assert [file["id"] for file in listed["data"]] == [ids[3], ids[1]]
        assert (await client.get(f"/v1/files/{ids[2]}")).json()["bytes"] == 2
        assert (await client.get(f"/v1/files/{ids[2]}/content")).content == b"xx"
        assert (await client.delete(f"/v1/files/{ids[2]}")).json() == {"id": ids[2], "object": "file", "deleted": True}
        for way in (client.get, client.delete):
            assert_error(await way(f"/v1/files/{ids[2]}"), 404, "There is no file", param="file_id")
        for query in ("limit=0", "limit=x", "after=nobody", "order=up"):
            assert_error(await client.get(f"/v1/files?{query}"), 400, param=query.partition("=")[0])


@pytest.mark.parametrize("name", ["..%2F..%2Fsecret", "file-..", "%2e%2e", "file-" + "A" * 32, "batch_" + "0" * 32])
async def test_no_name_becomes_a_path(place: Place, name: str) -> None:
    (place.root / "files").mkdir(parents=True)
    (place.root.parent / "secret.data").write_text("hidden words")
    (place.root.parent / "secret.json").write_text('{"id": "hidden words"}')
    async with client_of(place.app()) as client:
        for path in (f"/v1/files/{name}", f"/v1/files/{name}/content", f"/v1/batches/{name}"):
            response = await client.get(path)
            assert response.status_code == 404 and "hidden" not in response.text


async def test_names_are_only_told(place: Place) -> None:
    async with client_of(place.app()) as client:
        response = await client.post(
            "/v1/files", files={"file": ("../../evil\x07/a b.jsonl", b"x")}, data={"purpose": "batch"}
        )
        assert response.json()["filename"] == "a b.jsonl"
    assert sorted(path.suffix for path in (place.root / "files").iterdir()) == [".data", ".json"]


async def test_files_expire(place: Place) -> None:
    async with client_of(place.app()) as client:
        more = {"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}
        file = (await upload(client, b"x", **more)).json()
        kept = (await upload(client, b"y")).json()
        place.clock.s += 3600
        assert [each["id"] for each in (await client.get("/v1/files")).json()["data"]] == [kept["id"]]
        assert (await client.get(f"/v1/files/{file['id']}/content")).status_code == 404
    (orphan := place.root / "files" / f"file-{'0' * 32}.data").touch()  # of a delete that was cut off
    os.utime(orphan, (0, 0))
    Store(place.root, 100, place.clock).sweep()
    assert {path.stem for path in (place.root / "files").iterdir()} == {kept["id"]}


async def test_room_is_bounded(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.max_bytes = 1000
    async with client_of(place.app()) as client:
        assert (await upload(client, b"x" * 900)).status_code == 200
        assert_error(await upload(client, b"x" * 200), 413, "up to 1000 bytes of files")
        assert (await upload(client, b"x" * 100)).status_code == 200
        place.limits = LimitsConfig(max_file_bytes=10)
        place.max_bytes = 1 << 20
    async with client_of(place.app()) as client:
        assert_error(await upload(client, b"x" * 11), 413, "larger than 10 bytes")
        monkeypatch.setattr(store_module, "MAX_FILES", 2)
        assert_error(await upload(client, b"x"), 413, "keeps 2 files already")
    assert not list((place.root / "files").glob("*.part"))


@pytest.mark.parametrize(
    ("kind", "body", "status", "message"),
    [
        ("application/json", b"{}", 415, "Send the file as a form"),
        ("multipart/form-data", b"x", 415, "with a boundary"),
        ("multipart/form-data; boundary=b", b"x", 400, "The form cannot be read"),
        ("multipart/form-data; boundary=b", b"--b--\r\n", 400, "file is required"),
        ("multipart/form-data; boundary=b", b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\nx', 400, ""),
        ("multipart/form-data; boundary=b", b"--b\r\n" + b"a: b\r\n" * 99, 400, "The form cannot be read"),
        (
            "multipart/form-data; boundary=b",
            b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\n' + b"x" * 5000 + b"\r\n--b--\r\n",
            400,
            "'purpose' is larger than 4096 bytes",
        ),
        (
            "multipart/form-data; boundary=b",
            b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nx\r\n' * 2 + b"--b--\r\n",
            400,
            "several files",
        ),
    ],
)
async def test_forms_that_are_none(place: Place, kind: str, body: bytes, status: int, message: str) -> None:
    async with client_of(place.app()) as client:
        response = await client.post("/v1/files", content=body, headers={"content-type": kind})
        assert response.status_code == status and message in response.json()["error"]["message"]
        assert_error(await upload(client, b"x", "everything"), 400, "purpose must be one of", param="purpose")
    assert not list((place.root / "files").glob("file-*"))


async def test_what_a_path_takes(place: Place) -> None:
    async with client_of(place.app()) as client:
        for path, methods in (("/v1/files", "GET, HEAD, POST"), ("/v1/files/x", "DELETE, GET, HEAD")):
            assert (await client.options(path)).headers["allow"] == f"{methods}, OPTIONS"
            assert (await client.put(path)).headers["allow"] == methods


async def test_a_server_without_files(model: ServedModel) -> None:
    async with client_of(app_for(model)) as client:
        for path in ("/v1/files", "/v1/batches"):
            assert_error(await client.get(path), 404, "This server keeps no files")


def test_nothing_is_on_disk_before_somebody_asks(place: Place) -> None:
    async def idle() -> None:
        async with place.working():
            await asyncio.sleep(0.05)

    asyncio.run(idle())
    assert not place.root.exists()
