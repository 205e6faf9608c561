"""The hubs that models come from: whether each answers, how fast, through which proxy, and what time it says it is."""

from __future__ import annotations

import email.utils
import http.client
import importlib.util
import os
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

_TIMEOUT_S = 5.0
"""For one wait on the network."""
_DEADLINE_S = 8.0
"""For all of them: finding a name may take the system's resolver longer than that."""
_TRUE = {"1", "true", "yes", "on"}


@dataclass(frozen=True)
class Hub:
    name: str
    endpoint: str
    source: str
    """The variable that names the endpoint; empty for the hub's own."""
    mirror: str
    """What helps where it cannot be reached."""


@dataclass(frozen=True)
class HubAnswer:
    hub: Hub
    proxy: str | None
    """Without its password."""
    proxy_source: str = ""
    """The variable that names it."""
    seconds: float = 0.0
    failure: str | None = None
    ahead_s: float | None = None
    """How much this machine's clock is before the hub's; None where it does not say."""


def hubs(environment: Mapping[str, str]) -> list[Hub]:
    """Hugging Face, or the mirror that the user named, and ModelScope."""
    return [
        _hub(
            environment, "Hugging Face", "https://huggingface.co", ("HF_ENDPOINT",),
            "a mirror (HF_ENDPOINT=https://hf-mirror.com), ModelScope, or a proxy (https_proxy)",
        ),
        _hub(
            environment, "ModelScope", "https://modelscope.cn", ("MODELSCOPE_ENDPOINT", "MODELSCOPE_DOMAIN"),
            "Hugging Face, or a proxy (https_proxy)",
        ),
    ]  # fmt: skip


def _hub(environment: Mapping[str, str], name: str, own: str, variables: tuple[str, ...], mirror: str) -> Hub:
    source = next((each for each in variables if environment.get(each)), "")
    endpoint = environment[source].strip().rstrip("/") if source else own
    return Hub(name, endpoint if "://" in endpoint else f"https://{endpoint}", source, mirror)


def ask_hubs() -> list[HubAnswer]:
    """None where the user works offline. Answers within `_DEADLINE_S`, whatever the network does."""
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in _TRUE:
        return []
    asked = hubs(os.environ)
    answers: dict[Hub, HubAnswer] = {}

    def ask(hub: Hub) -> None:
        try:
            answers[hub] = _ask(hub)
        except Exception as error:  # addresses and proxies come from outside, and nobody waits for this thread
            answers[hub] = HubAnswer(hub, None, failure=f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=ask, args=(hub,), daemon=True) for hub in asked]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + _DEADLINE_S
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    late = f"no answer within {_DEADLINE_S:g} s"
    return [answers.get(hub) or HubAnswer(hub, None, failure=late) for hub in asked]


def _ask(hub: Hub) -> HubAnswer:
    try:
        url = urlsplit(hub.endpoint)
        is_address = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:  # of a port, or of brackets
        is_address = False
    if not is_address or not url.hostname:
        return HubAnswer(hub, None, failure=f"{hub.source} is no address of a hub, such as https://hf-mirror.com")
    proxies = urllib.request.getproxies()
    source = url.scheme if proxies.get(url.scheme) else "all"
    proxy = proxies.get(source)
    if proxy is not None and urllib.request.proxy_bypass(url.hostname):
        proxy = None
    shown = None if proxy is None else _without_password(proxy)
    asked = HubAnswer(hub, shown, "" if proxy is None else f"{source}_proxy")
    if proxy is not None and urlsplit(proxy).scheme.startswith("socks"):
        lack = None if importlib.util.find_spec("socksio") else f"{shown} speaks SOCKS: pip install socksio"
        return replace(asked, failure=lack or f"{shown} speaks SOCKS, by which it was not tried")
    handlers = [urllib.request.ProxyHandler({} if proxy is None else {url.scheme: proxy}), _NoRedirect()]
    request = urllib.request.Request(hub.endpoint + "/", method="HEAD", headers={"User-Agent": "ingle-doctor"})
    return _answer(asked, lambda: _head(urllib.request.build_opener(*handlers), request))


Headers = Mapping[str, str]


def _answer(asked: HubAnswer, ask: Callable[[], tuple[int, Headers]]) -> HubAnswer:
    started = time.monotonic()
    try:
        status, headers = ask()
    except (OSError, http.client.HTTPException, ValueError) as error:
        return replace(asked, seconds=time.monotonic() - started, failure=_why(error))
    seconds = time.monotonic() - started
    failure = None
    if status == 407:
        failure = (
            f"the proxy asks for a name and a password: write them into {asked.proxy_source} (http://NAME:PASSWORD@…)"
        )
    elif status >= 500 or status == 429:
        failure = f"it answers {status} {http.client.responses.get(status, '')}".rstrip()
    return replace(asked, seconds=seconds, failure=failure, ahead_s=_ahead_s(headers))


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """An answer is an answer: where it leads is not asked for."""

    def redirect_request(self, *_: object) -> None:
        return None


def _head(opener: urllib.request.OpenerDirector, request: urllib.request.Request) -> tuple[int, Headers]:
    try:
        with opener.open(request, timeout=_TIMEOUT_S) as response:
            return response.status, dict(response.headers.items())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, dict(error.headers.items())


def _why(error: Exception) -> str:
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(reason, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted ({reason.verify_message}): is a proxy between? SSL_CERT_FILE names its"
    if isinstance(reason, TimeoutError):
        return f"no answer within {_TIMEOUT_S:g} s"
    if isinstance(reason, socket.gaierror):
        return "its name is not found (DNS)"
    return getattr(reason, "strerror", None) or str(reason) or type(reason).__name__


def _ahead_s(headers: Headers) -> float | None:
    """By its Date; caches say for how long they have kept an answer."""
    try:
        date = email.utils.parsedate_to_datetime(headers.get("Date", "")).timestamp()
        return time.time() - date - int(headers.get("Age", "0"))
    except (ValueError, TypeError, OverflowError):
        return None


def _without_password(proxy: str) -> str:
    before, at, after = proxy.rpartition("@")
    return f"{before.partition('://')[0]}://…@{after}" if at and "://" in before else after
