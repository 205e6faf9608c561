"""Connections of rank 0 with ranks on other hosts, over TCP.

Who connects has to prove that it is of the team: both ends know a secret that rank 0 made up, and each answers the
other's random number with a digest under it. Of what a stranger says no more is read than that takes. What goes over a
connection afterwards is neither hidden nor sealed: it is for networks that only the hosts' owners reach.
"""

from __future__ import annotations

import contextlib
import hmac
import queue
import secrets
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Collection, Sequence
from typing import Literal, NamedTuple, get_args

from ingle.channel import LENGTH, MAX_FRAME_BYTES
from ingle.errors import EngineError

Role = Literal["words", "steps", "engine"]
"""Of a connection: what a rank says, what it is told; all that goes between an engine and its server."""
ROLES: tuple[Role, ...] = get_args(Role)
OF_A_RANK: tuple[Role, ...] = ("words", "steps")

SECRET_BYTES = 32
_NONCE_BYTES = 32
_CALL = struct.Struct(f"<8sHB{_NONCE_BYTES}s")
_MAGIC = b"ingle 1\n"
_PROOF_BYTES = 32
_PROOF_S = 10.0
"""For a stranger to prove that it is none."""
_MOST_STRANGERS = 64
_LOOK_S = 0.2
_PIECE_BYTES = 1 << 20
_LOST_S = 5.0
"""For a rank whose connection has broken to be found dead, and why."""
_IDLE_S, _PROBE_S, _NUM_PROBES = 2, 1, 5
"""A host that is gone, or the network to it, is found out by the kernel, whatever its processes do."""
_READ_WITHIN_S: dict[Role, int] = {"words": _IDLE_S + _PROBE_S * _NUM_PROBES, "engine": 60}
"""What was sent, or there is nobody. Steps a rank may leave unread for long."""


class Caller(NamedTuple):
    rank: int
    role: Role


def listening(address: str) -> socket.socket:
    """At a free port of this address alone. Raises `EngineError` where it is no address of this machine."""
    try:
        return socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET)
    except OSError as error:
        raise EngineError(f"ranks on other hosts are to reach this one at {address}, which fails: {error}") from None


def _proof(secret: bytes, speaker: str, nonce: bytes, call: bytes) -> bytes:
    return hmac.digest(secret, b"%s\n%s%s" % (speaker.encode(), nonce, call), "sha256")


def _tune(sock: socket.socket, role: Role) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {"TCP_KEEPIDLE": _IDLE_S, "TCP_KEEPINTVL": _PROBE_S, "TCP_KEEPCNT": _NUM_PROBES}
    if role in _READ_WITHIN_S:
        options["TCP_USER_TIMEOUT"] = 1000 * _READ_WITHIN_S[role]
    for name, value in options.items():
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _exactly(sock: socket.socket, count: int, until_s: float) -> bytes:
    """Raises `OSError` where that many bytes do not come in time."""
    got = bytearray()
    while len(got) < count:
        left_s = until_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("no answer in time")
        sock.settimeout(left_s)
        data = sock.recv(count - len(got))
        if not data:
            raise ConnectionError("it hung up")
        got += data
    return bytes(got)


# ---- how they come about


class Gate:
    """Where ranks on other hosts come in, until it is closed."""

    def __init__(self, address: str, secret: bytes) -> None:
        self._secret = secret
        self._listener = listening(address)
        self._places = threading.Semaphore(_MOST_STRANGERS)
        self._came: queue.SimpleQueue[tuple[Caller, socket.socket]] = queue.SimpleQueue()
        self.address, self.port = self._listener.getsockname()[:2]
        threading.Thread(target=self._accept, name="accepting ranks", daemon=True).start()

    def admit(
        self, callers: Collection[Caller], alive: Callable[[], None], within_s: float
    ) -> dict[Caller, socket.socket]:
        """Waits until all of them are there. What `alive` raises meanwhile ends that.

        Raises `EngineError` where one does not come in time.
        """
        admitted: dict[Caller, socket.socket] = {}
        until_s = time.monotonic() + within_s
        with contextlib.ExitStack() as stack:
            while len(admitted) < len(callers):
                alive()
                with contextlib.suppress(queue.Empty):
                    caller, sock = self._came.get(timeout=_LOOK_S)
                    if caller in callers and caller not in admitted:
                        admitted[caller] = stack.enter_context(sock)
                        continue
                    sock.close()
                if time.monotonic() > until_s:
                    missing = min(caller.rank for caller in callers if caller not in admitted)
                    raise EngineError(
                        f"rank {missing} did not reach {self.address} port {self.port} within {within_s:.0f} s: does a "
                        "firewall stand between the hosts?"
                    )
            stack.pop_all()
        return admitted

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def __enter__(self) -> Gate:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _accept(self) -> None:
        while True:
            self._places.acquire()
            try:
                sock, _ = self._listener.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._ask, args=(sock,), name="asking a rank", daemon=True).start()

    def _ask(self, sock: socket.socket) -> None:
        try:
            caller = self._recognized(sock)
        except OSError:
            caller = None
        finally:
            self._places.release()
        if caller is None:
            sock.close()
        else:
            self._came.put((caller, sock))

    def _recognized(self, sock: socket.socket) -> Caller | None:
        """Who it is, where it proves that. Raises `OSError`."""
        nonce, until_s = secrets.token_bytes(_NONCE_BYTES), time.monotonic() + _PROOF_S
        sock.settimeout(_PROOF_S)
        sock.sendall(nonce)
        call = _exactly(sock, _CALL.size, until_s)
        proof = _exactly(sock, _PROOF_BYTES, until_s)
        if not hmac.compare_digest(proof, _proof(self._secret, "rank", nonce, call)):
            return None
        magic, rank, role, _ = _CALL.unpack(call)
        if magic != _MAGIC or role >= len(ROLES):
            return None
        sock.sendall(_proof(self._secret, "rank 0", nonce, call))
        sock.settimeout(None)
        _tune(sock, ROLES[role])
        return Caller(rank, ROLES[role])


def reach(address: tuple[str, int], secret: bytes, caller: Caller, within_s: float) -> socket.socket:
    """A connection with rank 0. Raises `EngineError` where there is none, or somebody else answers."""
    until_s = time.monotonic() + within_s
    where = f"rank 0 at {address[0]} port {address[1]}"
    try:
        with contextlib.ExitStack() as stack:
            sock = stack.enter_context(socket.create_connection(address, timeout=within_s))
            nonce = _exactly(sock, _NONCE_BYTES, until_s)
            own = secrets.token_bytes(_NONCE_BYTES)
            call = _CALL.pack(_MAGIC, caller.rank, ROLES.index(caller.role), own)
            sock.sendall(call + _proof(secret, "rank", nonce, call))
            answer = _exactly(sock, _PROOF_BYTES, until_s)
            if not hmac.compare_digest(answer, _proof(secret, "rank 0", nonce, call)):
                raise EngineError(f"who answers as {where} does not know the team's secret")
            sock.settimeout(None)
            _tune(sock, caller.role)
            stack.pop_all()
            return sock
    except OSError as error:
        raise EngineError(f"{where} is not reached: {error}") from None


# ---- what goes over those of steps


class Sender:
    """To several ranks, each of which gets every message, as `ring.Writer`."""

    def __init__(self, socks: Sequence[socket.socket]) -> None:
        self._socks = socks
        for sock in socks:
            sock.setblocking(False)

    def send(self, message: bytes, alive: Callable[[], None] = lambda: None) -> None:
        """Waits while a reader is too far behind; what `alive` raises meanwhile ends that."""
        if len(message) > MAX_FRAME_BYTES:
            raise ValueError(f"a message of {len(message)} bytes is over the limit of {MAX_FRAME_BYTES}")
        framed = LENGTH.pack(len(message)) + message
        for sock in self._socks:
            self._send_all(sock, memoryview(framed), alive)

    @staticmethod
    def _send_all(sock: socket.socket, left: memoryview, alive: Callable[[], None]) -> None:
        while left:
            try:
                left = left[sock.send(left) :]
            except BlockingIOError:
                alive()
                select.select([], [sock], [], _LOOK_S)
            except OSError as error:
                until_s = time.monotonic() + _LOST_S
                while time.monotonic() < until_s:
                    alive()
                    time.sleep(_LOOK_S / 10)
                raise EngineError(f"the connection with a rank on another host is lost: {error}") from None


class Receiver:
    """What one rank gets of that, as `ring.Reader`."""

    def __init__(self, sock: socket.socket, most: int = MAX_FRAME_BYTES) -> None:
        self._sock, self._most = sock, most
        self._buffer = bytearray()

    def receive(self, timeout_s: float) -> bytes | None:
        """The next message; None when none begins within that time.

        Raises `EngineError` at the end of the connection, and `ValueError` for what is no message.
        """
        if not self._buffer and not select.select([self._sock], [], [], timeout_s)[0]:
            return None
        self._fill(LENGTH.size)
        (length,) = LENGTH.unpack_from(self._buffer)
        if length > self._most:
            raise ValueError(f"rank 0 announces a message of {length} bytes, over the limit of {self._most}")
        end = LENGTH.size + length
        self._fill(end)
        message = bytes(memoryview(self._buffer)[LENGTH.size : end])
        del self._buffer[:end]
        return message

    def _fill(self, count: int) -> None:
        """Memory is taken as bytes come, not as they are announced."""
        while len(self._buffer) < count:
            try:
                data = self._sock.recv(_PIECE_BYTES)
            except OSError as error:
                raise EngineError(f"the connection with rank 0 is lost: {error}") from None
            if not data:
                raise EngineError("rank 0 has ended the connection")
            self._buffer += data
