"""What browsers send for pages of other sites does not reach the server, unless its owner has named the site."""

from __future__ import annotations

from collections.abc import Callable

import httpx
import pytest

from ingle.config.access import AccessConfig
from ingle.errors import ConfigError

from .fakes import assert_error

pytestmark = pytest.mark.anyio

MakeClient = Callable[..., httpx.AsyncClient]
BODY = {"prompt": "x", "max_tokens": 1}
SITE = "https://chat.example.com"
OWN = [  # Host, Origin
    ("127.0.0.1:8000", "http://127.0.0.1:8000"),
    ("localhost:8000", "http://localhost:8000"),
    ("[::1]:8000", "http://[::1]:8000"),
    ("llm.example.com", "https://llm.example.com"),  # behind a proxy that ends TLS
    ("llm.example.com:443", "https://llm.example.com"),
    ("llm.example.com", "http://llm.example.com:80"),
    ("LLM.Example.com:8443", "https://llm.example.com:8443"),
]
FOREIGN = [
    ("127.0.0.1:8000", SITE),
    ("127.0.0.1:8000", "http://127.0.0.1:3000"),
    ("127.0.0.1:8000", "http://localhost:8000"),
    ("localhost:8000", "http://localhost"),
    ("localhost", "http://localhost:8000"),
    ("127.0.0.1:8000", "null"),
    ("127.0.0.1:8000", ""),
    ("127.0.0.1:8000", "file://"),
    ("127.0.0.1:8000", "http://127.0.0.1:8000.evil.example"),
    ("127.0.0.1:8000", "http://evil.example@127.0.0.1:8000"),
    ("127.0.0.1:8000", "http://127.0.0.1:99999999999999999999"),
    ("127.0.0.1:8000", "http://127.0.0.1:8000 https://evil.example"),
    ("127.0.0.1:8000", "vscode-webview://127.0.0.1:8000"),
    ("127.0.0.1:8000", "chrome-extension://abcdef"),
]


@pytest.mark.parametrize(("host", "origin"), OWN)
async def test_pages_of_the_server_itself_may(make_client: MakeClient, host: str, origin: str) -> None:
    headers = {"Host": host, "Origin": origin}
    client = make_client()
    assert (await client.post("/v1/completions", json=BODY, headers=headers)).status_code == 200
    answer = await client.get("/v1/models", headers=headers)
    assert answer.status_code == 200 and not any(name.startswith("access-control-") for name in answer.headers)


@pytest.mark.parametrize(("host", "origin"), FOREIGN)
async def test_pages_of_others_may_not(make_client: MakeClient, host: str, origin: str) -> None:
    headers = {"Host": host, "Origin": origin}
    for client in (make_client(), make_client(api_keys=("key",))):
        client.headers["x-api-key"] = "key"
        for method, path in (
            ("POST", "/v1/completions"),
            ("GET", "/v1/models"),
            ("DELETE", "/v1/files/x"),
            ("GET", "/"),
        ):
            answer = await client.request(method, path, headers=headers)
            assert_error(answer, 403, "--cors-origin", repr(origin))
            assert not any(name.startswith("access-control-") for name in answer.headers)
        ask = {**headers, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
        answer = await client.options("/v1/completions", headers=ask)
        assert answer.status_code == 403 and not any(name.startswith("access-control-") for name in answer.headers)


async def test_a_second_origin_does_not_hide_the_first(make_client: MakeClient) -> None:
    headers = [("Origin", "http://127.0.0.1:8000"), ("Origin", SITE)]
    assert_error(await make_client().get("/v1/models", headers=headers), 403, repr(SITE))


@pytest.mark.parametrize(
    ("method", "site", "mode", "status"),
    [
        ("GET", "cross-site", "no-cors", 403),  # an image, a script
        ("GET", "same-site", "no-cors", 403),
        ("GET", "cross-site", "navigate", 200),  # a link
        ("POST", "cross-site", "navigate", 403),
        ("GET", "same-origin", "cors", 200),
        ("GET", "none", "navigate", 200),  # typed
    ],
)
async def test_what_comes_without_an_origin(
    make_client: MakeClient, method: str, site: str, mode: str, status: int
) -> None:
    headers = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": mode}
    answer = await make_client().request(method, "/version", headers=headers)
    assert answer.status_code == status


@pytest.mark.parametrize(
    ("named", "origin", "may"),
    [
        (SITE, SITE, True),
        (f"{SITE}/", SITE, True),
        (SITE.upper(), SITE, True),
        (SITE, "http://chat.example.com", False),
        (SITE, f"{SITE}:8443", False),
        (SITE, f"{SITE}.evil.example", False),
        ("https://*.example.com", SITE, True),
        ("https://*.example.com", "https://a.b.example.com", True),
        ("https://*.example.com", "https://example.com", False),
        ("https://*.example.com", "https://evil.example/x.example.com", False),
        ("https://*.example.com", "https://evil.example:1.example.com", False),
        ("https://*.example.com", "https://a@b.example.com", False),
        ("http://localhost:*", "http://localhost:5173", True),
        ("http://localhost:*", "http://localhost", True),
        ("http://localhost:*", "http://localhost.evil.example:80", False),
        ("http://localhost:*", "https://localhost:5173", False),
        ("vscode-webview://*", "vscode-webview://1a2b", True),
        ("app://obsidian.md", "app://obsidian.md", True),
        ("null", "null", True),
        ("*", "https://any.example", True),
        ("*", "null", True),
    ],
)
async def test_sites_that_were_named(make_client: MakeClient, named: str, origin: str, may: bool) -> None:
    origins = AccessConfig(cors_origin=("https://first.example", named)).cors_origins()
    client = make_client(cors_origins=origins, api_keys=("key",))
    headers = {"Origin": origin, "Authorization": "Bearer key"}
    answer = await client.post("/v1/completions", json=BODY, headers=headers)
    assert answer.status_code == (200 if may else 403)
    assert answer.headers.get("access-control-allow-origin") == (("*" if named == "*" else origin) if may else None)
    assert "origin" in answer.headers.get("vary", "").lower() or not may
    refused = await client.post("/v1/completions", json=BODY, headers={"Origin": origin})
    assert refused.status_code == (401 if may else 403)
    assert ("access-control-allow-origin" in refused.headers) == may, "a page has to see that its key is wrong"


async def test_what_a_browser_asks_before_needs_no_key(make_client: MakeClient) -> None:
    client = make_client(cors_origins=(SITE,), api_keys=("key",), allowed_hosts=("localhost",))
    ask = {
        "Origin": SITE,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
        "Access-Control-Request-Private-Network": "true",
    }
    for path in ("/v1/chat/completions", "/nowhere"):
        answer = await client.options(path, headers=ask)
        assert answer.status_code == 200
        allowed = {name: answer.headers[f"access-control-allow-{name}"] for name in ("origin", "headers", "methods")}
        assert allowed["origin"] == SITE and "POST" in allowed["methods"] and "DELETE" in allowed["methods"]
        assert {"authorization", "x-stainless-os"} <= set(allowed["headers"].split(","))
        assert "access-control-allow-credentials" not in answer.headers
    assert (await client.options("/v1/models", headers={"Origin": SITE})).status_code == 401, "no question of that kind"
    assert (await client.options("/v1/models", headers={**ask, "Host": "evil.example"})).status_code == 403
    assert (await client.options("/v1/models", headers={**ask, "Origin": "https://evil.example"})).status_code == 403
    exposed = (
        (await client.get("/v1/models", headers={"Origin": SITE})).headers["access-control-expose-headers"].lower()
    )
    assert {"x-request-id", "retry-after", "x-ratelimit-remaining-tokens"} <= set(exposed.split(", "))


@pytest.mark.parametrize("origin", ["chat.example.com", "https://chat.example.com/page", "https://", "example", "//x"])
def test_what_is_no_origin(origin: str) -> None:
    with pytest.raises(ConfigError, match="--cors-origin"):
        AccessConfig(cors_origin=(origin,))


LOCAL = [
    ("192.168.1.5:8000", 200),
    ("[fd00::7]:8000", 200),
    ("gpu-box:8000", 200),
    ("gpu-box.local", 200),
    ("ingle.default.svc.cluster.local", 200),
    ("llm.internal:80", 200),
    ("llm.example.com", 403),
    ("local.example", 403),
    ("192.168.1.5.nip.example", 403),
    ("evil.local.example", 403),
]


@pytest.mark.parametrize(("host", "status"), LOCAL)
async def test_an_open_server_answers_to_no_name_of_the_internet(
    make_client: MakeClient, host: str, status: int
) -> None:
    """A page whose name is made to point at a server of the visitor's network sends that name along."""
    client = make_client(local_names=True)
    headers = {"Host": host, "Origin": f"http://{host}"}
    assert (await client.post("/v1/completions", json=BODY, headers=headers)).status_code == status
