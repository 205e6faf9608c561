"""Keys: how they are told, compared, named and limited, and what takes an administrator's."""

from __future__ import annotations

import asyncio
import gc
import hmac
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from ingle.config import ServerConfig
from ingle.config.access import AccessConfig, ApiKey, ListenConfig
from ingle.errors import ConfigError
from ingle.server import access as access_module
from ingle.server import app as app_module
from ingle.server import launch
from ingle.server.access import Client, Keys
from ingle.server.endpoints import Endpoint
from ingle.server.followed import FollowedFiles
from ingle.server.models import ServedModel
from ingle.server.rates import Bucket, Meter

from .fakes import app_for, assert_error, client_of, until

KEYS = tuple(ApiKey(f"sk-{index:04}-" + "x" * 56, f"key-{index}") for index in range(8))


def test_a_key_is_found_and_no_other() -> None:
    keys = Keys(KEYS)
    for key in KEYS:
        assert keys.find(key.key.encode()) == Client(key.name)
        for wrong in (key.key[:-1], key.key + "x", key.key.upper(), "", key.key[::-1]):
            assert keys.find(wrong.encode()) is None
    assert Keys(()).find(b"") is None


def test_each_key_is_compared_in_full_whichever_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []
    compare = hmac.compare_digest

    def counted(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return compare(one, other)

    keys = Keys(KEYS)
    monkeypatch.setattr(access_module.hmac, "compare_digest", counted)
    for given in (KEYS[0].key, KEYS[-1].key, KEYS[3].key[:-1] + "y", "", "x" * 10_000):
        compared.clear()
        keys.find(given.encode())
        assert len(compared) == len(KEYS) and {len(each) for pair in compared for each in pair} == {32}
        assert not any(key.key.encode() in pair for key in KEYS for pair in compared)


def test_digests_are_of_this_process_alone() -> None:
    """Whoever can choose guesses, but not see their digests, learns nothing by how long a comparison took."""
    one, two = Keys(KEYS), Keys(KEYS)
    assert not set(one._clients) & set(two._clients)
    assert not any(key.key in repr(vars(one)) for key in KEYS) and KEYS[0].key not in repr(KEYS)


def slower(one: Callable[[], object], other: Callable[[], object], *, rounds: int = 3000) -> float:
    """By which part of its own time `one` takes longer than `other`: of medians over calls that take turns, whose order
    changes, so that what else the machine does falls on both alike."""
    taken: tuple[list[int], list[int]] = ([], [])
    gc.collect()
    gc.disable()
    try:
        for index in range(rounds):
            for which in (0, 1) if index % 2 else (1, 0):
                call = (one, other)[which]
                start = time.perf_counter_ns()
                call()
                taken[which].append(time.perf_counter_ns() - start)
    finally:
        gc.enable()
    first, second = (statistics.median(sorted(each)[: rounds // 2]) for each in taken)
    return (first - second) / second


def leaky(keys: list[bytes], given: bytes) -> bool:
    """As one would compare without thinking of it."""
    return any(len(key) == len(given) and all(a == b for a, b in zip(key, given, strict=True)) for key in keys)


def test_timing_tells_nothing_of_how_much_of_a_key_is_right() -> None:
    keys, raw = Keys(KEYS), [key.key.encode() for key in KEYS]
    right = raw[4]
    all_wrong, nearly_right = b"?" * len(right), right[:-1] + b"?"
    assert slower(lambda: leaky(raw, nearly_right), lambda: leaky(raw, all_wrong)) > 0.3, "this test sees nothing"
    pairs = {
        "nothing right, and all but the last letter": (nearly_right, all_wrong),
        "the first letters of another key": (raw[0][:7] + b"?" * (len(right) - 7), all_wrong),
        "the first key, and the last": (raw[0], raw[-1]),
    }
    for name, (one, other) in pairs.items():
        # A loaded machine may disturb one look, not each of several.
        finds = partial(keys.find, one), partial(keys.find, other)
        seen = list[float]()
        while len(seen) < 5 and not (seen and abs(seen[-1]) < 0.05):
            seen.append(slower(*finds))
        assert abs(seen[-1]) < 0.05, f"{name}: {seen}"


LINES = """
# of the team
sk-alice  name=alice rpm=60 tpm=100k
sk-bob name=bob@example.com tpm=1.5m   # on holiday
\tsk-plain
sk-root admin name=root
"""


def test_a_file_of_keys(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(LINES)
    config = AccessConfig(("first", "second"), str(path), ("boss",))
    told = [
        (key.key, key.name, key.is_admin, key.requests_per_minute, key.tokens_per_minute) for key in config.all_keys()
    ]
    inf = float("inf")
    assert told == [
        ("first", "key-1", False, inf, inf),
        ("second", "key-2", False, inf, inf),
        ("sk-alice", "alice", False, 60, 1e5),
        ("sk-bob", "bob@example.com", False, inf, 1.5e6),
        ("sk-plain", "key-5", False, inf, inf),
        ("sk-root", "root", True, inf, inf),
        ("boss", "admin-2", True, inf, inf),
    ]


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("secret name=", "a name is up to 64 letters"),
        ("secret name=a/b", "a name is up to 64 letters"),
        ("secret name=" + "a" * 65, "a name is up to 64 letters"),
        ("secret rpm=0", "rpm=0 is no number above 0"),
        ("secret tpm=many", "tpm=many is no number above 0"),
        ("secret rpm=-1", "rpm=-1 is no number above 0"),
        ("secret rpm=1e9", "no number above 0"),
        ("secret words", "behind a key may stand"),
        ("secret secret2", "behind a key may stand"),
    ],
)
def test_a_line_that_cannot_be(tmp_path: Path, line: str, error: str) -> None:
    path = tmp_path / "keys"
    path.write_text(f"good\n{line}\n")
    with pytest.raises(ConfigError, match="line 2: ") as raised:
        AccessConfig(api_key_file=str(path))
    assert error in str(raised.value) and "secret" not in str(raised.value)


def test_a_configuration_shows_no_secret() -> None:
    config = ServerConfig(
        access=AccessConfig(api_key=("sk-secret",), admin_api_key=("sk-more",)),
        listen=ListenConfig(ssl_certfile="c", ssl_keyfile_password="sk-pass"),
    )
    assert "sk-" not in repr(config) + repr(config.access.all_keys()) + repr(Keys(config.access.all_keys()))


def test_keys_are_bounded(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("".join(f"{number}\n" for number in range(10_001)))
    with pytest.raises(ConfigError, match="10001 keys are too many"):
        AccessConfig(api_key_file=str(path))
    path.write_bytes(b"#" * ((1 << 20) + 1))
    with pytest.raises(ConfigError, match="no list of keys"):
        AccessConfig(api_key_file=str(path))


def test_a_key_that_is_given_twice(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("a\nb name=bob\n")
    assert [key.key for key in AccessConfig(("a", "a"), str(path)).all_keys()] == ["a", "b"]
    for twice in (AccessConfig, lambda **given: AccessConfig(**given, api_key_file=str(path))):
        with pytest.raises(ConfigError, match="both as --api-key and as --admin-api-key"):
            twice(api_key=("a",), admin_api_key=("a",))
    path.write_text("a name=x\na name=y\n")
    with pytest.raises(ConfigError, match="given twice"):
        AccessConfig(api_key_file=str(path))


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_a_bucket() -> None:
    clock = Clock()
    bucket = Bucket(60, clock)
    for _ in range(60):
        assert bucket.seconds_until(1) == 0
        bucket.take(1)
    assert bucket.seconds_until(1) == pytest.approx(1)
    clock.now_s = 1.5
    assert bucket.level == pytest.approx(1.5)
    bucket.take(100)
    assert bucket.seconds_until(1) == pytest.approx(99.5)
    clock.now_s = 1e6
    assert bucket.level == 60
    slow = Bucket(0.5, clock)
    slow.take(1)
    assert slow.seconds_until(1) == pytest.approx(120)


def test_tokens_are_made_up_for() -> None:
    clock = Clock()
    meter = Meter(float("inf"), 600, clock)
    assert meter.admit() == (0, "")
    meter.spend(1199)
    wait_s, limit = meter.admit()
    assert wait_s == pytest.approx(60) and limit == "600 tokens a minute"
    assert meter.headers() == {
        "x-ratelimit-limit-tokens": "600", "x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "119.9s",
    }  # fmt: skip
    clock.now_s = 60
    assert meter.admit() == (0, "")


@pytest.mark.anyio
async def test_requests_a_minute(model: ServedModel) -> None:
    keys = (
        ApiKey("a", "alice", requests_per_minute=2),
        ApiKey("b", "alice", requests_per_minute=2),
        ApiKey("c", "carol"),
    )
    client = client_of(app_for(model, api_keys=keys))
    body = {"prompt": "x", "max_tokens": 1}
    for key, remaining in (("a", "1"), ("b", "0")):
        answer = await client.post("/v1/completions", json=body, headers={"x-api-key": key})
        assert answer.status_code == 200 and answer.headers["x-ratelimit-remaining-requests"] == remaining
        assert answer.headers["x-ratelimit-limit-requests"] == "2" and "x-ratelimit-limit-tokens" not in answer.headers
    answer = await client.post("/v1/completions", json=body, headers={"x-api-key": "a"})
    assert (
        assert_error(answer, 429, "The key alice has 2 requests a minute", "try again in")["code"]
        == "rate_limit_exceeded"
    )
    assert 1 <= int(answer.headers["retry-after"]) <= 30
    assert (await client.get("/v1/models", headers={"x-api-key": "a"})).status_code == 200, "looking costs nothing"
    answer = await client.post("/v1/completions", json=body, headers={"x-api-key": "c"})
    assert answer.status_code == 200 and "x-ratelimit-limit-requests" not in answer.headers
    answer = await client.post("/v1/messages", json={}, headers={"x-api-key": "a"})
    assert answer.status_code == 429 and answer.json()["error"]["type"] == "rate_limit_error"


@pytest.mark.anyio
@pytest.mark.parametrize("stream", [False, True])
async def test_tokens_a_minute(model: ServedModel, stream: bool) -> None:
    client = client_of(app_for(model, api_keys=(ApiKey("a", "alice", tokens_per_minute=100),)))
    ask = {"prompt": "four", "max_tokens": 60, "ignore_eos": True, "stream": stream}
    answer = await client.post("/v1/completions", json=ask, headers={"x-api-key": "a"})
    assert answer.status_code == 200
    left = int(answer.headers["x-ratelimit-remaining-tokens"])
    assert (left == 95) if stream else (35 <= left <= 36), "the prompt is known when a stream begins, the answer is not"
    answer = await client.post("/v1/completions", json=ask, headers={"x-api-key": "a"})
    assert answer.status_code == 200
    answer = await client.post("/v1/completions", json=ask, headers={"x-api-key": "a"})
    assert_error(answer, 429, "100 tokens a minute")
    assert (await client.post("/v1/embeddings", json={"input": "x"}, headers={"x-api-key": "a"})).status_code == 429


@pytest.mark.anyio
async def test_files_are_looked_at_again_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ingle.server.followed._LOOK_S", 0.01)
    path, read = tmp_path / "file", list[str]()
    path.write_text("one")
    following = asyncio.create_task(FollowedFiles("it", [str(path)], lambda: read.append(path.read_text())).follow())
    for text in ("second", "the third"):
        path.rename(tmp_path / "away")
        await asyncio.sleep(0.03)
        (tmp_path / "away").write_text(text)
        (tmp_path / "away").rename(path)
        await until(lambda text=text: text in read, within_s=30)  # type: ignore[misc]
    following.cancel()
    await asyncio.wait([following])


CLIENTS: list[tuple[str, tuple[ApiKey, ...], bool, dict[str, tuple[int, int]]]] = [
    ("nothing, on loopback", (), True, {"": (200, 200)}),
    ("nothing, --allow-open", (), False, {"": (200, 403)}),
    ("a key", (ApiKey("k"),), True, {"": (401, 401), "no": (401, 401), "k": (200, 403)}),
    (
        "an administrator's alone",
        (ApiKey("r", is_admin=True),),
        True,
        {"": (401, 401), "no": (401, 401), "r": (200, 200)},
    ),
    (
        "both",
        (ApiKey("k"), ApiKey("r", is_admin=True)),
        False,
        {"": (401, 401), "no": (401, 401), "k": (403, 403), "r": (200, 200)},
    ),
]


@pytest.mark.anyio
@pytest.mark.parametrize(("name", "keys", "is_local", "clients"), CLIENTS, ids=[each[0] for each in CLIENTS])
async def test_what_takes_an_administrators_key(
    model: ServedModel,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    keys: tuple[ApiKey, ...],
    is_local: bool,
    clients: dict[str, tuple[int, int]],
) -> None:
    async def done(request: Request) -> Response:
        return PlainTextResponse("done")

    added = (
        Endpoint("GET", "/told", done, guards="tells"),
        Endpoint("POST", "/changed/{what}", done, guards="changes"),
    )
    monkeypatch.setattr(app_module, "ENDPOINTS", (*app_module.ENDPOINTS, *added))
    client: httpx.AsyncClient = client_of(app_for(model, api_keys=keys, is_local=is_local))
    for key, (told, changed) in clients.items():
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        assert (await client.get("/told", headers=headers)).status_code == told
        assert (await client.head("/told", headers=headers)).status_code == told
        answer = await client.post("/changed/a", headers=headers)
        assert answer.status_code == changed
        if changed == 403:
            assert_error(answer, 403, "--admin-api-key")
        open_to_all = not any(not each.is_admin for each in keys)
        ordinary = await client.get("/v1/models", headers=headers)
        assert (ordinary.status_code == 200) == (open_to_all or key in ("k", "r"))


@pytest.mark.anyio
async def test_a_file_of_keys_that_changes(
    model: ServedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "keys"
    path.write_text("a name=alice rpm=1\nb name=bob\n")
    config = ServerConfig(access=AccessConfig(api_key_file=str(path)))
    app = app_for(model, api_keys=config.access.all_keys())
    client = client_of(app)
    [files] = launch._followed(config, None, app.state.keys)

    async def statuses() -> dict[str, int]:
        return {
            key: (await client.post("/tokenize", json={"prompt": "x"}, headers={"x-api-key": key})).status_code
            for key in "abc"
        }

    assert await statuses() == {"a": 200, "b": 200, "c": 401}
    path.write_text("a name=alice rpm=1\nc name=carol\n")
    files.refresh()
    assert await statuses() == {"a": 429, "b": 401, "c": 200}, "a limit that is spent stays so"
    for wrong in ("", "c words\n", None):
        path.unlink() if wrong is None else path.write_text(wrong)
        files.refresh()
        assert "holds on: --api-key-file" in caplog.messages[-1]
        assert await statuses() == {"a": 429, "b": 401, "c": 200}
    path.write_text("ops admin\n")
    files.refresh()
    assert "holds on: none but administrators' keys are left" in caplog.messages[-1], "nobody gets in without a key"
    assert await statuses() == {"a": 429, "b": 401, "c": 200}
