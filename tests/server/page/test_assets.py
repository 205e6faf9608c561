"""The files of the page: who gets them, how they are kept, and that they are what the lock says."""

from __future__ import annotations

import gzip
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from ingle.server.page.assets import STATIC, Assets
from tests.server.fakes import assert_error

pytestmark = pytest.mark.anyio

MakeClient = Callable[..., httpx.AsyncClient]
ROOT = Path(__file__).parents[3]
HTML = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}
KEYED = {"api_keys": ("a-key",)}


async def test_browsers_get_the_page_and_programs_what_they_got(make_client: MakeClient) -> None:
    client = make_client()
    page = await client.get("/", headers=HTML)
    assert (
        page.headers["content-type"].startswith("text/html")
        and "{{" not in page.text
        and page.headers["vary"] == "Accept"
    )
    for headers in ({}, {"Accept": "application/json"}, {"Accept": "*/*"}):
        assert (await client.get("/", headers=headers)).json()["name"] == "ingle"
    assert (await client.get("/", headers={**HTML, "If-None-Match": page.headers["etag"]})).status_code == 304
    off = make_client(page=False)
    assert (await off.get("/", headers=HTML)).json()["docs"] == "/openapi.json"
    for path in ("/docs", "/redoc", "/page/x/js/main.js"):
        assert_error(await off.get(path), 404)


async def test_nothing_of_it_needs_a_key_and_all_else_does(make_client: MakeClient) -> None:
    client = make_client(**KEYED)
    page = await client.get("/", headers=HTML)
    assert page.status_code == 200 and (await client.head("/", headers=HTML)).status_code == 200
    for address in re.findall(r'(?:src|href)="(page/[^"]+)"', page.text):
        assert (await client.get(f"/{address}")).status_code == 200, address
    assert (await client.get("/docs")).status_code == 200
    for method, path in (("GET", "/"), ("GET", "/v1/models"), ("GET", "/metrics"), ("GET", "/ingle/requests")):
        assert (await client.request(method, path)).status_code == 401
    for method, path in (
        ("POST", "/"),
        ("POST", "/page/x/js/main.js"),
        ("GET", "/v1/models"),
        ("GET", "/openapi.json"),
        ("GET", "/page"),
    ):
        assert (await client.request(method, path, headers=HTML)).status_code == 401, (method, path)
    hidden = make_client(page=False, **KEYED)
    for path in ("/", "/docs", "/page/x/js/main.js"):
        assert (await hidden.get(path, headers=HTML)).status_code == 401, path


async def test_what_a_browser_is_told_of_it(make_client: MakeClient) -> None:
    client = make_client()
    for path in ("/", "/docs"):
        answer = await client.get(path, headers=HTML)
        policy = dict(
            rule.split(" ", 1) for rule in answer.headers["content-security-policy"].split("; ") if " " in rule
        )
        assert (
            policy["default-src"] == "'none'"
            and policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        )
        assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
        assert (
            answer.headers["x-content-type-options"] == "nosniff" and answer.headers["referrer-policy"] == "no-referrer"
        )
        assert not re.search(r"<script(?![^>]*src=)|\son\w+=|style=|https?://", answer.text), (
            "nothing inline, nothing from elsewhere"
        )
    version = Assets().version
    file = await client.get(f"/page/{version}/js/main.js", headers={"Accept-Encoding": "identity"})
    assert file.headers["content-type"].startswith("text/javascript") and "immutable" in file.headers["cache-control"]
    assert file.headers["x-content-type-options"] == "nosniff" and "content-encoding" not in file.headers
    packed = await client.get(f"/page/{version}/js/main.js", headers={"Accept-Encoding": "br, gzip"})
    assert packed.headers["content-encoding"] == "gzip" and packed.text == file.text
    assert packed.headers["vary"] == "Accept-Encoding"
    old = await client.get("/page/of-yesterday/js/main.js", headers={"If-None-Match": file.headers["etag"]})
    assert old.status_code == 304 and old.headers["cache-control"] == "no-cache"


async def test_no_name_becomes_a_path(make_client: MakeClient) -> None:
    client = make_client()
    for name in (
        "../assets.py",
        "..%2fassets.py",
        "js/../../assets.py",
        "/etc/passwd",
        "js",
        "",
        "js/main.js/",
        "js\\main.js",
        "js/main.js%00",
    ):
        assert (await client.get(f"/page/x/{name}")).status_code == 404, name


async def test_behind_a_prefix(make_client: MakeClient) -> None:
    client = make_client(root_path="/llm")
    for path in ("/llm", "/llm/"):
        page = (await client.get(path, headers=HTML)).text
        addresses = re.findall(r'(?:src|href)="([^"]+)"', page)
        assert addresses and all(address.startswith("/llm/page/") for address in addresses)
        assert (await client.get(addresses[0])).status_code == 200
    assert 'href="/llm/openapi.json"' in (await client.get("/llm/docs")).text


def test_the_libraries_are_those_of_the_lock() -> None:
    checked = subprocess.run([sys.executable, "tools/vendor.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
    for library in (STATIC / "vendor").iterdir():
        assert library.name == "lock.json" or any(library.glob("LICENSE*")), library


def test_the_whole_is_small() -> None:
    def packed(*patterns: str) -> int:
        files = {path for pattern in patterns for path in STATIC.glob(pattern) if path.is_file()}
        return sum(len(gzip.compress(path.read_bytes())) for path in files)

    assert packed("*.html", "css/*", "js/**/*", "vendor/marked/*.js", "vendor/dompurify/*.mjs") < 110_000, (
        "before maths, colours and charts"
    )
    assert packed("**/*") < 1_300_000


def test_both_languages_have_all_that_is_said() -> None:
    said = {
        name: dict(re.findall(r"^  (\w+): '(.*)',$", (STATIC / f"js/words/{name}.js").read_text(), re.M))
        for name in ("en", "zh")
    }
    assert said["en"].keys() == said["zh"].keys() and len(said["en"]) > 150
    for name, text in said["en"].items():
        assert sorted(re.findall(r"\{\w+\}", text)) == sorted(re.findall(r"\{\w+\}", said["zh"][name])), name
    code = "".join(path.read_text() for path in STATIC.glob("js/**/*.js"))
    used = set(re.findall(r"\bt\(\s*'(\w+)'", code))
    assert used <= said["en"].keys()
    begun = re.findall(r"\bt\(`(\w+_)\$", code)
    literal = set(re.findall(r"'(\w+)'", code))
    idle = {name for name in said["en"] if name not in literal and not name.startswith(tuple(begun))}
    assert not idle, "nobody says that"


def test_our_own_files_are_short_and_make_no_markup_of_text() -> None:
    for path in STATIC.glob("js/**/*.js"):
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) < 300, f"{path.name} is long"
        assert not re.search(
            r"\binner" r"HTML\b|\bouterHTML\b|insertAdjacentHTML|\beval\(|new Function|document\.write", text
        ), path.name
