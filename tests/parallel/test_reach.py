"""Connections between hosts: who may have one, and what comes through it."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest

from ingle.errors import EngineError
from ingle.parallel import reach as module
from ingle.parallel.messages import Alive, FrameReader, from_rank_decoder, said
from ingle.parallel.reach import Caller, Gate, Receiver, Sender, reach

SECRET = bytes(range(32))
LONG_S = 60.0


def no_matter() -> None:
    pass


@pytest.fixture
def gate() -> Iterator[Gate]:
    with Gate("127.0.0.1", SECRET) as gate:
        yield gate


def address(gate: Gate) -> tuple[str, int]:
    return gate.address, gate.port


def hung_up(sock: socket.socket) -> bool:
    """Whether the other end does, once it has said what it has to."""
    sock.settimeout(LONG_S)
    try:
        while sock.recv(1 << 16):
            pass
    except ConnectionError:
        pass
    return True


# ---- who comes in


def test_those_who_know_the_secret(gate: Gate) -> None:
    callers = [Caller(rank, role) for rank in (1, 2) for role in module.ROLES]
    with ThreadPoolExecutor(len(callers)) as threads:
        calls = {caller: threads.submit(reach, address(gate), SECRET, caller, LONG_S) for caller in callers}
        ours = gate.admit(callers, no_matter, LONG_S)
    theirs = {caller: call.result() for caller, call in calls.items()}
    assert ours.keys() == set(callers)
    for caller, sock in ours.items():
        sock.sendall(repr(caller).encode())
        assert theirs[caller].recv(100) == repr(caller).encode()
        sock.close()
        theirs[caller].close()


def test_it_listens_at_its_address_alone() -> None:
    with Gate("127.0.0.2", SECRET) as gate:
        socket.create_connection(("127.0.0.2", gate.port), timeout=LONG_S).close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", gate.port), timeout=LONG_S)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", gate.port), timeout=LONG_S)


def test_a_wrong_secret(gate: Gate) -> None:
    with pytest.raises(EngineError, match=r"rank 0 at 127\.0\.0\.1 port \d+ is not reached: it hung up"):
        reach(address(gate), bytes(32), Caller(1, "words"), LONG_S)


def garbage(sock: socket.socket) -> None:
    sock.sendall(bytes(10_000))


def http(sock: socket.socket) -> None:
    sock.sendall(b"GET / HTTP/1.1\r\nHost: rank\r\n\r\n" * 10)


def half_a_call(sock: socket.socket) -> None:
    sock.sendall(bytes(40))
    sock.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("say", [garbage, http, half_a_call])
def test_strangers_are_hung_up_on(gate: Gate, say: Callable[[socket.socket], None]) -> None:
    with socket.create_connection(address(gate), timeout=LONG_S) as stranger:
        say(stranger)
        assert hung_up(stranger)


def test_silent_strangers_hold_nobody_up(gate: Gate) -> None:
    silent = [socket.create_connection(address(gate), timeout=LONG_S) for _ in range(module._MOST_STRANGERS - 1)]
    wanted = Caller(1, "words")
    with ThreadPoolExecutor(1) as threads:
        theirs = threads.submit(reach, address(gate), SECRET, wanted, LONG_S)
        ours = gate.admit({wanted}, no_matter, LONG_S)
    for sock in (*silent, *ours.values(), theirs.result()):
        sock.close()


def test_a_silent_stranger_is_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PROOF_S", 0.1)
    with Gate("127.0.0.1", SECRET) as gate, socket.create_connection(address(gate), timeout=LONG_S) as silent:
        assert hung_up(silent)


def test_what_was_overheard_opens_nothing(gate: Gate) -> None:
    """Neither what a rank said before nor what rank 0 answered it."""
    heard = bytearray()
    relay = socket.create_server(("127.0.0.1", 0))

    def pass_on() -> None:
        rank, _ = relay.accept()
        with rank, socket.create_connection(address(gate), timeout=LONG_S) as zero:
            rank.sendall(zero.recv(32, socket.MSG_WAITALL))
            heard.extend(rank.recv(module._CALL.size + 32, socket.MSG_WAITALL))
            zero.sendall(heard)
            heard.extend(zero.recv(32, socket.MSG_WAITALL))
            rank.sendall(heard[-32:])

    thread = threading.Thread(target=pass_on)
    thread.start()
    reach(relay.getsockname(), SECRET, Caller(1, "words"), LONG_S).close()
    thread.join()
    relay.close()
    call, answer = heard[: module._CALL.size], heard[-32:]
    for replayed in (heard[:-32], call + answer):
        with socket.create_connection(address(gate), timeout=LONG_S) as stranger:
            stranger.recv(32, socket.MSG_WAITALL)
            stranger.sendall(replayed)
            assert hung_up(stranger)


def test_whoever_answers_as_rank_0_has_to_know_it_too() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as threads:
        calling = threads.submit(reach, server.getsockname(), SECRET, Caller(1, "words"), LONG_S)
        with server.accept()[0] as sock:
            sock.sendall(bytes(32))
            call = sock.recv(module._CALL.size + 32, socket.MSG_WAITALL)
            sock.sendall(call[-32:])  # what it was sent itself
            with pytest.raises(EngineError, match=r"who answers as rank 0 .* does not know the team's secret"):
                calling.result(LONG_S)


def test_nobody_comes_twice(gate: Gate) -> None:
    """Nor a rank that is not of the team."""
    callers = [Caller(9, "words"), Caller(1, "words"), Caller(1, "words"), Caller(1, "steps")]
    theirs = []
    for number, caller in enumerate(callers):
        theirs.append(reach(address(gate), SECRET, caller, LONG_S))
        while gate._came.qsize() <= number:  # in this order
            time.sleep(0.001)
    ours = gate.admit({callers[1], callers[3]}, no_matter, LONG_S)
    assert ours.keys() == {Caller(1, "words"), Caller(1, "steps")}
    assert hung_up(theirs[0]) and hung_up(theirs[2])
    for sock in (*theirs, *ours.values()):
        sock.close()


def test_one_that_does_not_come(gate: Gate) -> None:
    with pytest.raises(EngineError, match=r"rank 3 did not reach 127\.0\.0\.1 port \d+ within 0 s: does a firewall"):
        gate.admit({Caller(3, "words")}, no_matter, 0.1)

    def dead() -> None:
        raise EngineError("rank 3 has died")

    with pytest.raises(EngineError, match="rank 3 has died"):
        gate.admit({Caller(3, "words")}, dead, LONG_S)


# ---- what comes through


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def test_every_reader_gets_every_message() -> None:
    """However it is taken apart on its way, and though one of them is slow."""
    chosen = random.Random(1)
    messages = [chosen.randbytes(chosen.choice((0, 1, 7, 100, 5_000, 2_000_000))) for _ in range(30)]
    pairs = [socket.socketpair() for _ in range(3)]
    got: list[list[bytes]] = [[], [], []]

    def read(index: int) -> None:
        receiver = Receiver(pairs[index][1])
        while len(got[index]) < len(messages):
            if (message := receiver.receive(LONG_S)) is not None:
                got[index].append(message)
            if index == 2:
                time.sleep(0.001)

    threads = [threading.Thread(target=read, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    sender = Sender([ours for ours, _ in pairs])
    for message in messages:
        sender.send(message)
    for thread in threads:
        thread.join()
    assert got == [messages] * 3
    for ours, theirs in pairs:
        ours.close()
        theirs.close()


def test_byte_by_byte(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    receiver = Receiver(theirs)
    assert receiver.receive(0.01) is None

    def drip() -> None:
        for byte in b"\x03\0\0\0abc" + b"\0\0\0\0":
            ours.sendall(bytes([byte]))

    thread = threading.Thread(target=drip)
    thread.start()
    assert receiver.receive(LONG_S) == b"abc"
    assert receiver.receive(LONG_S) == b""
    thread.join()


def test_a_message_without_end(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    ours.sendall(b"\xff\xff\xff\xff" + b"x")
    with pytest.raises(ValueError, match=r"announces a message of 4294967295 bytes, over the limit"):
        Receiver(theirs).receive(LONG_S)


def test_memory_is_taken_as_bytes_come(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    ours.sendall((1 << 30).to_bytes(4, "little") + b"x")
    ours.shutdown(socket.SHUT_WR)
    receiver = Receiver(theirs)
    with pytest.raises(EngineError, match="rank 0 has ended the connection"):
        receiver.receive(LONG_S)
    assert len(receiver._buffer) == 5


def test_death_amid_a_message(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    ours.sendall(b"\x0a\0\0\0half")
    ours.close()
    with pytest.raises(EngineError, match="rank 0 has ended the connection"):
        Receiver(theirs).receive(LONG_S)


def test_a_reader_that_does_not_read(pair: tuple[socket.socket, socket.socket]) -> None:
    asked = []

    def alive() -> None:
        asked.append(1)
        if len(asked) == 2:
            raise EngineError("it has died")

    with pytest.raises(EngineError, match="it has died"):
        Sender([pair[0]]).send(bytes(50 << 20), alive)


def test_a_reader_that_is_gone(pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOST_S", 0.1)
    pair[1].close()
    with pytest.raises(EngineError, match="the connection with a rank on another host is lost"):
        Sender([pair[0]]).send(b"step")


def test_words_that_are_none(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    reader = FrameReader(theirs, from_rank_decoder())
    whole = said(Alive())
    ours.sendall(whole + whole[:3])
    assert reader.read() == [Alive()]
    ours.sendall(whole[3:])
    assert reader.read() == [Alive()]
    ours.sendall(b"\x03\0\0\0abc")
    with pytest.raises(msgspec.MsgspecError):
        reader.read()
    reader = FrameReader(theirs, from_rank_decoder())
    ours.sendall(b"\xff\xff\xff\xff")
    with pytest.raises(ValueError, match="over the limit"):
        reader.read()


def test_no_address_of_this_machine() -> None:
    with pytest.raises(EngineError, match=r"are to reach this one at 203\.0\.113\.9, which fails: "):
        Gate("203.0.113.9", SECRET)
