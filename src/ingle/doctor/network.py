"""The hubs, the clock, and the port of a server."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from pathlib import Path

from ingle.doctor.finding import Reporter
from ingle.doctor.here import Here, Question
from ingle.errors import ConfigError

_SLOW_S = 2.0
_NOT_BEFORE, _NOT_AFTER = 1767225600.0, 4102444800.0
"""The years 2026 to 2099."""
_SKEW_S, _TLS_SKEW_S = 120.0, 3600.0


def check_hubs(here: Here, report: Reporter) -> None:
    answers = here.hubs()
    if not answers:
        report.ok("not asked: HF_HUB_OFFLINE is set")
    for answer in answers:
        hub = answer.hub
        by = f", by {hub.source}" * bool(hub.source)
        through = "" if answer.proxy is None else f", through the proxy {answer.proxy}"
        where = f"{hub.name} ({hub.endpoint}{by}{through})"
        if answer.failure is not None:
            named = " and ".join(filter(None, (hub.source, answer.proxy_source)))
            helps = f"correct or unset {named}" if named else f"take {hub.mirror}"
            report.warn(
                f"{where} is not reached: {answer.failure}", f"to pull, {helps}; models that are here need no hub"
            )
        elif answer.seconds > _SLOW_S:
            report.warn(f"{where} answers slowly, in {answer.seconds:.1f} s", f"take {hub.mirror}")
        else:
            report.ok(f"{where} answers in {answer.seconds * 1e3:.0f} ms")


def check_clock(here: Here, report: Reporter) -> None:
    now = time.time()
    shown = time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(now))
    if not _NOT_BEFORE < now < _NOT_AFTER:
        report.fail(f"says {shown}", "set it (`timedatectl set-ntp true`): no certificate holds at such a time")
        return
    told = [(answer.ahead_s, answer.hub.name) for answer in here.hubs() if answer.ahead_s is not None]
    if not told:
        report.ok(f"{shown}; no hub told the time to compare with")
        return
    ahead_s, name = min(told, key=lambda each: abs(each[0]))  # one hub's own clock may be wrong
    direction = "ahead of" if ahead_s > 0 else "behind"
    text = f"{shown}, {abs(ahead_s):.0f} s {direction} {name}'s"
    if abs(ahead_s) > _TLS_SKEW_S:
        report.fail(text, "set it (`timedatectl set-ntp true`): certificates and tokens fail at a wrong time")
    elif abs(ahead_s) > _SKEW_S:
        report.warn(text, "set it (`timedatectl set-ntp true`)")
    else:
        report.ok(f"{shown}, as {name} has it")


def check_port(here: Here, report: Reporter) -> None:
    from ingle.server.listening import bind, refuse_open

    host, port, server = here.question.host, here.question.port, here.question.server
    if server.listen.uds is not None:
        _check_socket(Path(server.listen.uds).expanduser().absolute(), report)
        return
    try:
        with bind(host, port) as sock:
            refuse_open(server, sock)
        if server.listen.ssl_certfile is not None:
            from ingle.server.tls import Certificate

            Certificate(server.listen)
    except ConfigError as error:
        cause = error.__cause__
        if not isinstance(cause, OSError) or cause.errno != errno.EADDRINUSE:
            report.fail(error.what)
            return
        _report_taken(here.question, report)
        return
    report.ok(f"{host}:{port} is free" if port else "any that is free")


def _check_socket(path: Path, report: Reporter) -> None:
    if os.access(path.parent, os.W_OK | os.X_OK):
        report.ok(f"{path} may be a socket")
    else:
        missing = "is not yours to write to" if path.parent.is_dir() else "is not there"
        report.fail(f"{path}: the folder {path.parent} {missing}", "make one of your own, `mkdir -m 700 FOLDER`")


def _report_taken(question: Question, report: Reporter) -> None:
    from ingle.server.running import servers

    host, port = question.host, question.port
    own = next((server for server in servers() if server.port == port), None)
    if own is not None:
        report.warn(
            f"{host}:{port} is taken by a server of yours, of {own.models[0]} (pid {own.pid})",
            f"`ingle stop {port}` ends it; another one needs another --port",
        )
        return
    holder = _holder(port, question.root)
    by = f" by {holder}" if holder else " by another user's or container's process"
    advice = f"end it, or give another --port; `sudo ss -ltnp sport = :{port}` shows it"
    report.fail(f"{host}:{port} is taken{by}", advice)


def _target(file: Path) -> str | None:
    """Of a link; None where it has gone meanwhile, as files of a process do that goes on working."""
    try:
        return str(file.readlink())
    except OSError:
        return None


def _holder(port: int, root: Path) -> str | None:
    """Who listens on a port, of the processes that this user may look into."""
    sockets = set()
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in (root / "proc/net" / table).read_text().splitlines()[1:]:
                fields = line.split()
                if int(fields[1].rpartition(":")[2], 16) == port and fields[3] == "0A":  # listens
                    sockets.add(f"socket:[{fields[9]}]")
    for process in (root / "proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if any(_target(file) in sockets for file in (process / "fd").iterdir()):
                command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                return f"pid {process.name} ({command[:80]})"
    return None
