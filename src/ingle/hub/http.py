"""HTTP as hubs need it: redirects, retries and answers within bounds, and every failure in one line.

httpx takes proxies and certificates from the environment: http(s)_proxy, no_proxy, SSL_CERT_FILE.
"""

from __future__ import annotations

import email.utils
import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ingle.errors import ModelError
from ingle.version import __version__

if TYPE_CHECKING:
    import httpx

CONNECT_S, READ_S = 10.0, 30.0
MAX_REDIRECTS = 10
MAX_JSON_BYTES = 64 << 20
_MAX_ERROR_BYTES = 64 << 10
MAX_WAIT_S = 60.0
"""The longest Retry-After that is waited for."""
RETRY_DELAYS_S = (1.0, 2.0, 4.0, 8.0)
"""Before each further try of what failed for a reason that may pass."""

_PASSING = {408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524}
_PROXIES = ("https_proxy", "http_proxy", "all_proxy", "HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY")
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


class HubError(ModelError):
    """A hub did not give what it was asked for."""


class Unreachable(HubError):
    """For a reason on the way to it, or of its own, that may pass. `retry_after_s` is what it said itself."""

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NotConnected(Unreachable):
    """Not even a connection came about, so the name, the network or the proxy is wrong more likely than not."""


class Refused(HubError):
    """It answered that it will not, or has no such thing."""

    def __init__(self, message: str, status: int, alternative: str | None = None) -> None:
        super().__init__(message, alternative=alternative)
        self.status = status


@dataclass(frozen=True)
class Answer:
    """What a failing answer says, for those who put it in words."""

    status: int
    code: str
    """Hugging Face's X-Error-Code, such as GatedRepo; empty elsewhere."""
    message: str
    """In a header, as Hugging Face has it, or in the JSON of the body; empty where there is neither."""
    url: str
    sent_token: bool


Explain = Callable[[Answer], "str | None"]
"""A hub's own words for a failing answer; None where it has none."""


@dataclass(frozen=True)
class Body:
    """An answer whose bytes are still to come."""

    response: httpx.Response
    start: int
    """Of its first byte in the file."""
    total: int | None
    """Bytes of the whole file, where the server says."""
    etag: str | None
    """What If-Range takes: the ETag, or else the date of the last change."""
    url: str
    """Where it came from in the end."""

    @property
    def host(self) -> str:
        return urlsplit(self.url).netloc.rpartition("@")[2]

    def chunks(self) -> Iterator[bytes]:
        """Raises `Unreachable` when the connection breaks."""
        import httpx

        try:
            yield from self.response.iter_bytes()  # as they come: what came before a break is kept
        except httpx.HTTPError as error:
            raise Unreachable(_transport(error, self.url)) from error


class Http:
    """A client for one hub. `trusted` are the hosts that get its token, besides the one that is asked."""

    setting: str
    """The environment variable that says where the hub is, for error messages; empty where none does."""

    def __init__(
        self,
        *,
        headers: Mapping[str, str] | None = None,
        trusted: frozenset[str] = frozenset(),
        explain: Explain = lambda answer: None,
        on_wait: Callable[[str], None] = lambda text: None,
        setting: str = "",
    ) -> None:
        self.setting = setting
        self._headers = {"User-Agent": f"ingle/{__version__}", "Accept-Encoding": "identity", **(headers or {})}
        self._trusted = trusted
        self._explain = explain
        self._on_wait = on_wait
        self._client = _new_client()

    @property
    def sends_token(self) -> bool:
        return "Authorization" in self._headers or "Cookie" in self._headers

    @property
    def elsewhere(self) -> str:
        """What to do about a server that sends what it should not."""
        return f"try again later, or set {self.setting} to another" if self.setting else "try again later"

    def close(self) -> None:
        """Also ends what is under way in other threads."""
        self._client.close()

    def __enter__(self) -> Http:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def json(self, url: str, params: Mapping[str, str] | None = None) -> Any:
        """The JSON at `url`. Raises `HubError`, also for a web page in its place."""
        import httpx

        url = str(httpx.URL(url, params=params)) if params else url
        text = self.retrying(lambda: self._read(url, MAX_JSON_BYTES))
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise HubError(
                f"{shown_url(url)} answers what is not JSON ({error}): is it the address of a hub?"
            ) from error

    def read(self, url: str, max_bytes: int, start: int = 0, size: int | None = None) -> bytes:
        """Of the file at `url`, from `start`: `size` of them, or as many as there are.

        Raises `HubError`, also for more than `max_bytes`.
        """
        return self.retrying(lambda: self._read(url, max_bytes, start, size))

    def retrying(self, work: Callable[[], bytes]) -> bytes:
        """`work`, tried again while the reason may pass, and somebody is there. Says so before each wait."""
        for delay in RETRY_DELAYS_S:
            try:
                return work()
            except NotConnected:
                raise
            except Unreachable as error:
                wait_before_retry(error, delay, self._on_wait)
        return work()

    def _read(self, url: str, max_bytes: int, start: int = 0, size: int | None = None) -> bytes:
        if size == 0:
            return b""
        end = "" if size is None else start + size - 1
        with self.open(url, f"bytes={start}-{end}" if start or size is not None else None) as body:
            skip = start - body.start  # a server without ranges sends all
            if skip < 0:
                raise HubError(f"{shown_url(url)} answers with other bytes than those asked for")
            most = skip + (max_bytes if size is None else size)
            read = bytearray()
            for chunk in body.chunks():
                read += chunk
                if len(read) >= most:
                    break
        if size is None and len(read) > max_bytes:
            raise HubError(f"{shown_url(url)} answers with more than the {max_bytes} bytes that are taken of it")
        if size is not None and len(read) < most:
            raise Unreachable(f"{shown_url(url)} ended after {len(read)} bytes where {most} were expected")
        return bytes(read[skip:most])

    @contextmanager
    def open(self, url: str, byte_range: str | None = None, if_range: str | None = None) -> Iterator[Body]:
        """One try. `byte_range` is a Range header; `if_range` the ETag that the file must still have for it.

        Raises `Unreachable`, and `Refused` with what the hub's `explain` says.
        """
        import httpx

        headers = dict(self._headers)
        if byte_range is not None:
            headers["Range"] = byte_range
            if if_range is not None:
                headers["If-Range"] = if_range
        try:
            response = self._follow(self._client.build_request("GET", url, headers=headers))
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            kind = NotConnected if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout) else Unreachable
            raise kind(_transport(error, url)) from error
        except RuntimeError as error:  # of a client that another thread has closed
            raise Unreachable(f"{shown_url(url)}: {error}") from error
        try:
            self._check(response, url)
            yield _body(response)
        finally:
            response.close()

    def _follow(self, request: httpx.Request) -> httpx.Response:
        import httpx

        tokens = {name: request.headers[name] for name in ("Authorization", "Cookie") if name in request.headers}
        for _ in range(MAX_REDIRECTS):
            response = self._client.send(request, stream=True, follow_redirects=False)
            following = response.next_request
            if following is None:
                return response
            response.close()
            if request.url.scheme == "https" and following.url.scheme != "https":
                raise HubError(f"{shown_url(str(request.url))} redirects from https to http, which is not followed")
            if following.url.host in self._trusted:
                following.headers.update(tokens)
            request = following
        raise httpx.TooManyRedirects(f"more than {MAX_REDIRECTS} redirects")

    def _check(self, response: httpx.Response, url: str) -> None:
        status = response.status_code
        if status < 400:
            kind = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
            if kind in ("text/html", "application/xhtml+xml"):
                address = self.setting or "the address"
                raise HubError(
                    f"{shown_url(str(response.url))} answers with a web page in the file's place: a login or proxy "
                    f"page, or not the address of a hub; open it in a browser, or check {address} and the proxy"
                )
            return
        came_from = str(response.url)
        answer = Answer(
            status,
            response.headers.get("X-Error-Code", ""),
            (response.headers.get("X-Error-Message") or _message(response))[:300],
            url,
            self.sends_token,
        )
        is_own = urlsplit(came_from).netloc == urlsplit(url).netloc or response.url.host in self._trusted
        said = self._explain(answer) if is_own else None  # of its store of large files it knows nothing
        if status in _PASSING:
            wait_s = _retry_after(response.headers.get("Retry-After"))
            raise Unreachable(said or _passing(answer, wait_s), wait_s)
        raise Refused(
            said or f"{shown_url(came_from)} answers {status} {answer.message or response.reason_phrase}", status
        )


def wait_before_retry(
    error: Unreachable, delay_s: float, say: Callable[[str], None], stopped: threading.Event | None = None
) -> None:
    """As long as the hub asks for, else `delay_s`. Raises `error` where that is more than anybody wants to wait."""
    wait_s = delay_s if error.retry_after_s is None else error.retry_after_s
    if wait_s > MAX_WAIT_S:
        raise error
    say(f"{error}; trying again in {wait_s:.0f} s")
    (stopped or threading.Event()).wait(wait_s)


def _new_client() -> httpx.Client:
    import httpx

    for name in ("httpx", "httpcore"):
        logging.getLogger(name).setLevel(logging.WARNING)  # else every request is told, with what signs its URL
    try:
        limits = httpx.Limits(max_connections=32, max_keepalive_connections=32)
        return httpx.Client(timeout=httpx.Timeout(READ_S, connect=CONNECT_S), limits=limits)
    except ImportError as error:  # of socksio
        raise HubError(f"the proxy {_proxy()} speaks SOCKS: `pip install socksio`, or set an http proxy") from error
    except (ValueError, httpx.InvalidURL) as error:
        raise HubError(f"the proxy {_proxy()} is not an address: {error}; correct or unset it") from error
    except OSError as error:
        raise HubError(f"no HTTPS: {error}; check SSL_CERT_FILE and SSL_CERT_DIR") from error


def _message(response: httpx.Response) -> str:
    """What the JSON of a failing answer says went wrong."""
    import httpx

    body = bytearray()
    try:
        for chunk in response.iter_bytes():
            body += chunk
            if len(body) >= _MAX_ERROR_BYTES:
                return ""
        said = json.loads(body)
    except (httpx.HTTPError, ValueError, RecursionError):  # the status has to do
        return ""
    found = [said[key] for key in ("Message", "message", "error") if said.get(key)] if isinstance(said, dict) else []
    return found[0] if found and isinstance(found[0], str) else ""


def _body(response: httpx.Response) -> Body:
    headers = response.headers
    encoded = headers.get("Content-Encoding", "identity").lower() not in ("", "identity")
    length = headers.get("Content-Length", "")
    total = int(length) if length.isdecimal() and not encoded else None
    start = 0
    if response.status_code == 206 or "Content-Range" in headers:  # ModelScope sends ranges with 200
        match = _CONTENT_RANGE.fullmatch(headers.get("Content-Range", "").strip())
        if match is None or encoded:
            raise HubError(f"{shown_url(str(response.url))} answers a range without saying which bytes it sends")
        start, total = int(match[1]), None if match[3] == "*" else int(match[3])
    etag = headers.get("ETag", "W/")
    if encoded or etag.startswith("W/"):  # which may stand for other bytes
        etag = None if encoded else headers.get("Last-Modified")
    return Body(response, start, total, etag, str(response.url))


def _retry_after(value: str | None) -> float | None:
    """Seconds, of a header that holds them or a date."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return min(float(value), 86400.0)
    try:
        moment = email.utils.parsedate_to_datetime(value).timestamp()
    except (TypeError, ValueError):
        return None
    return min(max(moment - time.time(), 0.0), 86400.0)


def _passing(answer: Answer, wait_s: float | None) -> str:
    when = "later" if wait_s is None else f"in {wait_s:.0f} s"
    if answer.status == 429:
        token = "" if answer.sent_token else ", or with a token, which may ask more often"
        return f"{shown_url(answer.url)} limits how often it is asked (429): try again {when}{token}"
    return f"{shown_url(answer.url)} answers {answer.status}: it is down or overloaded; try again {when} or a mirror"


def _transport(error: Exception, url: str) -> str:
    """What went wrong on the way, and what to do."""
    import httpx

    where, said = shown_url(url), str(error) or type(error).__name__
    if isinstance(error, httpx.ProxyError):
        return f"{where}: the proxy {_proxy()} does not let it through: {said}"
    if isinstance(error, httpx.ConnectTimeout | httpx.PoolTimeout):
        return f"{where} does not answer within {CONNECT_S:.0f} s{_mirror(url)}"
    if isinstance(error, httpx.TimeoutException):
        return f"{where} sent nothing for {READ_S:.0f} s"
    if isinstance(error, httpx.ConnectError):
        if "CERTIFICATE" in said.upper():
            return f"{where}: its certificate is not trusted ({said}): is a proxy between? name its in SSL_CERT_FILE"
        return f"{where} cannot be reached ({said}){_mirror(url)}"
    if isinstance(error, httpx.TooManyRedirects):
        return f"{where} redirects more than {MAX_REDIRECTS} times"
    if isinstance(error, httpx.UnsupportedProtocol | httpx.InvalidURL):
        return f"{where} is not an address of http or https: {said}"
    return f"{where}: the connection broke: {said}"


def _mirror(url: str) -> str:
    proxy = f", through the proxy {_proxy()}" if _proxy() else ""
    if urlsplit(url).hostname == "huggingface.co":
        return f"{proxy}: check the network, or take a mirror (HF_ENDPOINT=https://hf-mirror.com) or --hub modelscope"
    return f"{proxy}: check the network and the address"


def _proxy() -> str:
    """The environment's, without what it says of user and password."""
    found = next((os.environ[name] for name in _PROXIES if os.environ.get(name)), "")
    return re.sub(r"//[^/@]*@", "//", found)[:200]


def shown_url(url: str) -> str:
    """A URL without the signature that may stand in its query, and without a password."""
    return re.sub(r"//[^/@]*@", "//", url.partition("?")[0])[:300]
