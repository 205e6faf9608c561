"""`ingle service`: a server that systemd starts, watches and restarts."""

from __future__ import annotations

import json
import os
import shlex
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass

from ingle.cli.flags import Given, parse, parse_given
from ingle.cli.service_unit import CARRIED, Made, ServiceOptions, make
from ingle.errors import ConfigError, EngineError, printable
from ingle.habits.near import nearest
from ingle.service import systemd
from ingle.service.systemd import Manager
from ingle.service.unit import checked_name, url_in

_UP_S = 15.0
"""For a server to answer at all, which it does before it loads its model."""
_POLL_S = 0.3
_HEALTH_S = 5.0
_MAX_HEALTH_BYTES = 1 << 16


@dataclass(frozen=True)
class Uninstall:
    """Stop the service and remove its unit. Its keys, and the models that it pulled, stay unless --purge is given."""

    name: str = "ingle"
    """Of the service."""
    user: bool = False
    """A service of your own, as of `systemctl --user`."""
    purge: bool = False
    """Remove its keys and its folder below /var/lib too."""


@dataclass(frozen=True)
class Status:
    """Show what systemd says of the service, its address, and whether it answers. Exit status 1 if it does not."""

    name: str = "ingle"
    """Of the service."""
    user: bool = False
    """A service of your own, as of `systemctl --user`."""


COMMANDS = {
    "print": "Print the unit that runs `ingle serve` with these flags",
    "install": "Write that unit, start it now and at each boot",
    "uninstall": "Stop the service and remove its unit",
    "status": "Show whether it runs, its address and its health",
}


def main(argv: Sequence[str]) -> None:
    """`argv` without `ingle service`."""
    name, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    if name in ("-h", "--help", "help"):
        print(_help())
    elif name == "print":
        _print(rest)
    elif name == "install":
        _install(rest)
    elif name == "uninstall":
        _uninstall(rest)
    elif name == "status":
        _status(parse(Status, rest, command="service status"))
    else:
        near = nearest(name, {each: each for each in COMMANDS})
        hint = f"did you mean `ingle service {near}`?" if near else f"there are {', '.join(COMMANDS)}"
        raise ConfigError(f"there is no `ingle service {printable(name)[:100]}`; {hint}")


def _help() -> str:
    commands = "\n".join(f"  {name:<12}{summary}" for name, summary in COMMANDS.items())
    return f"""\
usage: ingle service COMMAND ...

A model as a service of systemd: started at boot, restarted when it fails, in a sandbox, its log in the journal.

commands:
{commands}

print and install take MODEL and the flags of `ingle serve`. Keys go into a file for root alone.
`ingle service COMMAND --help` shows its flags."""


def _asked(argv: Sequence[str], command: str) -> Made:
    options, given = parse_given(ServiceOptions, argv, command=f"service {command}")
    manager, name = Manager(options.user), checked_name(options.name)
    check_port = False  # of a unit that is only printed, or that runs already and so takes it
    if command == "install":
        _check(manager, command, argv, _secrets(options, given))
        check_port = not (_is_ours(manager, name) and manager.state(name) == "active")
    made = make(options, given, check_port=check_port)
    for notice in made.notices:
        print("notice:", printable(notice), file=sys.stderr)
    return made


def _secrets(options: ServiceOptions, given: Given) -> list[str]:
    access, password = options.server.access, options.server.listen.ssl_keyfile_password
    return [*access.api_key, *access.admin_api_key, *filter(None, [password]), *given.environment.values()]


def _check(manager: Manager, command: str, argv: Sequence[str], secrets: Sequence[str] = ()) -> None:
    """Raises `EngineError` without systemd, and `ConfigError`, with what to type, for who may not change its units."""
    manager.check()
    if manager.own or os.geteuid() == 0:
        return
    names = sorted(name for name in os.environ if name in CARRIED or name.startswith("INGLE_"))
    preserve = [f"--preserve-env={','.join(names)}"] if names and command == "install" else []  # which sudo forgets
    words = [_without(word, secrets) for word in argv]
    line = shlex.join(["sudo", *preserve, sys.executable, "-m", "ingle", "service", command, *words])
    raise ConfigError(f"only root may change {manager.units}: `{line}`, or add --user for a service of your own")


def _without(word: str, secrets: Sequence[str]) -> str:
    found = next((secret for secret in secrets if word == secret or word.endswith(f"={secret}")), None)
    return word if found is None else word.removesuffix(found) + "KEY"


def _is_ours(manager: Manager, name: str) -> bool:
    """Whether there is a unit of ours. Raises `ConfigError` where one of that name is somebody else's."""
    path = manager.unit(name)
    if systemd.read_own(path) is not None:
        return True
    if (other := manager.fragment(name)) is not None and other != path:
        raise ConfigError(f"there is a {path.name} already, {other}, and it is not ingle's: give another --name")
    return False


def _print(argv: Sequence[str]) -> None:
    made = _asked(argv, "print")
    print(made.unit.text(), end="")
    words = f", with {', '.join(made.variables)}, which must not stand in a unit" if made.variables else ""
    print(
        f"notice: `ingle service install` also writes {made.unit.environment_file}, for its owner alone{words}; "
        "without that file the unit does not start",
        file=sys.stderr,
    )


def _install(argv: Sequence[str]) -> None:
    made = _asked(argv, "install")
    unit, manager = made.unit, made.manager
    path, text = manager.unit(unit.name), unit.text()
    names = systemd.write_variables(manager.variables(unit.name), made.variables)
    print(f"wrote {manager.variables(unit.name)}, for its owner alone: {', '.join(names) or 'no variable yet'}")
    before = systemd.read_own(path)
    systemd.write(path, text, 0o644)
    print(f"wrote {path}" + ("" if before is None else " anew" if before != text else ", as it was"))
    manager.tell("daemon-reload")
    manager.tell("enable", unit.file_name)
    print(f"enabled {unit.file_name}: it starts " + ("when you log in" if unit.own else "at each boot"))
    manager.ask("reset-failed", unit.file_name)  # refused where it never ran
    manager.tell("restart", unit.file_name)
    print(f"started {unit.file_name}")
    _await(made)
    print(f"log:    {manager.logs(unit.name)}")
    print(f"status: ingle service status{_flags(manager, unit.name)}")
    if unit.own:
        print("to have it run while you are not logged in: loginctl enable-linger")


def _flags(manager: Manager, name: str) -> str:
    """Those by which other commands find a service."""
    return (f" --name {name}" if name != "ingle" else "") + (" --user" if manager.own else "")


def _await(made: Made) -> None:
    """Until the server answers, be it that it still loads. Raises `EngineError` when it ends instead."""
    name, manager, deadline_s = made.unit.name, made.manager, time.monotonic() + _UP_S
    while (health := _health(made.unit.url)) is None:
        state = manager.state(name)
        if state not in ("active", "activating") or manager.restarts(name):
            raise EngineError(f"{made.unit.file_name} does not stay up: {_last_words(manager, name)}")
        if time.monotonic() > deadline_s:
            print(f"it does not answer on {made.unit.url} yet; the log says how far it is")
            return
        time.sleep(_POLL_S)
    print(f"it answers on {made.unit.url}: {health[1]}")


def _last_words(manager: Manager, name: str) -> str:
    """The error that a server ended with, or where to find it."""
    found = [line for line in manager.log(name) if line.startswith("ingle:")]
    return printable(found[-1].removeprefix("ingle:").strip()[:1000]) if found else f"see `{manager.logs(name)}`"


def _uninstall(argv: Sequence[str]) -> None:
    flags = parse(Uninstall, argv, command="service uninstall")
    name, manager = checked_name(flags.name), Manager(flags.user)
    _check(manager, "uninstall", argv)
    path, variables = manager.unit(name), manager.variables(name)
    if systemd.read_own(path) is None:
        raise ConfigError(f"there is no {path}{_others(manager)}")
    manager.tell("disable", "--now", path.name)
    print(f"stopped and disabled {path.name}")
    if flags.purge and not manager.own:
        manager.tell("clean", "--what=state", path.name)
        print(f"removed /var/lib/{name}")
    systemd.remove(path)
    manager.tell("daemon-reload")
    manager.ask("reset-failed", path.name)  # refused where nothing failed
    print(f"removed {path}")
    if flags.purge:
        if systemd.remove(variables):
            print(f"removed {variables}")
        return
    kept = [str(place) for place in (variables,) if place.exists()] + ([] if manager.own else [f"/var/lib/{name}"])
    if kept:
        print(f"kept: {', '.join(kept)} (--purge removes them)")
    if (edited := path.with_name(f"{path.name}.d")).is_dir():
        print(f"kept: {edited}, changes that were made by hand")


def _others(manager: Manager) -> str:
    """The services that there are."""
    names = []
    for path in sorted(manager.units.glob("*.service")):
        try:
            if systemd.read_own(path) is not None:
                names.append(path.stem)
        except ConfigError:  # somebody else's
            continue
    return f"; ingle's are: {', '.join(names)} (--name NAME)" if names else ": `ingle service install MODEL` makes one"


def _status(flags: Status) -> None:
    name, manager = checked_name(flags.name), Manager(flags.user)
    manager.check()
    text = systemd.read_own(manager.unit(name))
    if text is None:
        raise ConfigError(f"there is no {manager.unit(name)}{_others(manager)}")
    print(printable(manager.ask("status", "--lines=5", f"{name}.service").stdout, keep="\n\t").rstrip())
    url, state = url_in(text), manager.state(name)
    if url is None:
        raise EngineError(f"{manager.unit(name)} no longer says its URL: `ingle service install` writes it anew")
    print(f"\nURL:    {url}/v1")
    health = _health(url)
    print(f"health: {'no answer' if health is None else health[1]}")
    if state != "active":
        raise EngineError(f"{name}.service is {state}: {_last_words(manager, name)}")
    if health is None or not health[0]:
        raise EngineError(f"{name}.service runs, and takes no requests{' yet' if health else ''}")


def _health(url: str) -> tuple[bool, str] | None:
    """Whether the server takes requests, and what it says; None where nobody answers."""
    unchecked = ssl.create_default_context()  # a certificate is hardly in the name of this machine's address
    unchecked.check_hostname, unchecked.verify_mode = False, ssl.CERT_NONE
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=unchecked)
    )
    try:
        with opener.open(f"{url}/health/ready", timeout=_HEALTH_S) as answer:
            return True, _said(answer.read(_MAX_HEALTH_BYTES), "ok")
    except urllib.error.HTTPError as error:
        with error:
            return False, _said(error.read(_MAX_HEALTH_BYTES), f"HTTP {error.code}")
    except (OSError, ValueError):
        return None


def _said(body: bytes, otherwise: str) -> str:
    """What an answer of `/health/ready` says, for people."""
    try:
        parsed = json.loads(body)
    except ValueError:
        return otherwise
    if not isinstance(parsed, dict):
        return otherwise
    said = parsed.get("detail") or parsed.get("status") or otherwise
    return printable(str(said))[:500]
