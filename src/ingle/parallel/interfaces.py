"""Network interfaces of this machine, by the addresses that they have."""

from __future__ import annotations

import contextlib
import socket
import struct
import sys
from ipaddress import ip_address
from pathlib import Path

_SIOCGIFADDR = 0x8915
_INET6 = Path("/proc/net/if_inet6")


def interface_of(address: str) -> str | None:
    """Its name, such as eth0; None where that is not found out."""
    try:
        wanted = str(ip_address(address))
    except ValueError:  # a name
        return None
    return next((name for _, name in socket.if_nameindex() if wanted in _addresses(name)), None)


def _addresses(interface: str) -> list[str]:
    found = []
    if sys.platform == "linux":
        import fcntl

        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            request = struct.pack("256s", interface.encode()[:15])
            with contextlib.suppress(OSError):  # it has none of IPv4
                found.append(socket.inet_ntoa(fcntl.ioctl(sock.fileno(), _SIOCGIFADDR, request)[20:24]))
        if _INET6.is_file():
            rows = [line.split() for line in _INET6.read_text().splitlines()]
            found += [str(ip_address(int(row[0], 16))) for row in rows if row[-1] == interface]
    return found
