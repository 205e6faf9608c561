"""What a connection may cost before anybody knows whose it is, and how many there may be."""

from __future__ import annotations

import ipaddress
import logging
import resource
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ingle.limits import LimitsConfig

logger = logging.getLogger("ingle.server")

_LOG_EVERY_S = 10.0
_OTHER_DESCRIPTORS = 64
"""What the server has open besides connections, with room to spare."""


@dataclass(frozen=True)
class HttpLimits:
    max_header_bytes: int = 64 * 1024
    """Of a request's line and headers together."""
    max_headers: int = 256
    header_s: float = 30.0
    """To send the line and headers of a request."""
    body_s: float = 120.0
    """To send its body."""
    keep_alive_s: float = 65.0
    """Between an answer and the next request. Longer than the 60 s after which proxies let a connection go, so that
    the proxy ends it and no request meets a connection that is being closed."""
    max_pipelined: int = 16
    """Requests that may wait on a connection behind the one that is being answered."""
    max_pipelined_bytes: int = 64 * 1024
    """Of their headers and bodies together."""
    max_connections: int = 4096
    """Open at once; one address may have half of them."""
    slow_reader_s: float = 60.0
    """For a client to read most of what waits for it in `max_written_bytes`."""
    max_written_bytes: int = 64 * 1024
    """Written ahead of a client, here and again in its socket; an answer goes on as it is read."""

    @classmethod
    def of(cls, config: LimitsConfig, max_connections: int) -> HttpLimits:
        """As the flags say, with as many connections as there are file descriptors for."""
        return cls(
            max_header_bytes=config.max_header_bytes,
            max_headers=config.max_header_count,
            header_s=config.header_timeout,
            body_s=config.body_timeout,
            keep_alive_s=config.timeout_keep_alive,
            slow_reader_s=config.slow_reader_timeout,
            max_connections=max_connections,
        )


def allow_connections(wanted: int) -> int:
    """Raises the process's limit of file descriptors to hold `wanted` connections, and says how many it holds."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + _OTHER_DESCRIPTORS
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY:
        return wanted
    return max(1, min(wanted, soft - _OTHER_DESCRIPTORS))


class Counted(Protocol):
    """Where a connection is counted."""

    def enter(self, address: str) -> bool:
        """Whether a connection from `address` may stay; if so, `leave` takes it out again."""
        ...

    def leave(self, address: str) -> None: ...


class OpenConnections:
    """Counts connections and refuses those beyond the limits, with a word in the log now and then."""

    def __init__(self, max_connections: int, proxies: Sequence[str] = ()) -> None:
        """Behind an address or a network of `proxies`, as behind a Unix socket, stand many."""
        self._max = max_connections
        self._proxies = [ipaddress.ip_network(each) for each in proxies if each != "*"]
        self._all_proxies = "*" in proxies
        self._max_per_address = max(1, max_connections // 2)
        self._open: Counter[str] = Counter()
        self._num_open = 0
        self._num_refused = 0
        self._logged_s = float("-inf")

    def enter(self, address: str) -> bool:
        network = _network(address)
        most = self._max if self._is_shared(address) else self._max_per_address
        if self._num_open >= self._max or self._open[network] >= most:
            self._refused(network)
            return False
        self._open[network] += 1
        self._num_open += 1
        return True

    def leave(self, address: str) -> None:
        network = _network(address)
        self._num_open -= 1
        self._open[network] -= 1
        if not self._open[network]:
            del self._open[network]

    def _is_shared(self, address: str) -> bool:
        if not address or self._all_proxies:
            return True
        ip = ipaddress.ip_address(address.partition("%")[0])
        ip = getattr(ip, "ipv4_mapped", None) or ip
        return any(ip in network for network in self._proxies)

    def _refused(self, network: str) -> None:
        self._num_refused += 1
        now_s = time.monotonic()
        if now_s - self._logged_s < _LOG_EVERY_S:
            return
        logger.warning(
            "refused %d connections, the last from %s: %d are open, %d of them from there (--max-connections %d, "
            "half of which one address may have)",
            self._num_refused, network, self._num_open, self._open[network], self._max,
        )  # fmt: skip
        self._logged_s, self._num_refused = now_s, 0


def _network(address: str) -> str:
    """Who stands behind an address: for IPv6 its network of 64 bits, as a whole is given to each household."""
    if ":" not in address:
        return address
    ip = ipaddress.IPv6Address(address)
    if ip.ipv4_mapped is not None:
        return str(ip.ipv4_mapped)
    return str(ipaddress.IPv6Network((int(ip) >> 64 << 64, 64)))
