"""From the flags of `ingle serve` to a unit that serves the same."""

from __future__ import annotations

import math
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ingle.cli.flags import Given
from ingle.cli.line import spelled
from ingle.cli.sources import SECRETS
from ingle.config import CONFIGURATION, EngineConfig, ServerConfig, TextConfig
from ingle.errors import ConfigError
from ingle.service import reach, systemd
from ingle.service.systemd import Manager
from ingle.service.unit import STOP_S, Credential, Unit, checked_name

_FILES = {
    "api_key_file": "api-keys",
    "ssl_certfile": "certificate.pem",
    "ssl_keyfile": "key.pem",
    "ssl_ca_certs": "authorities.pem",
}
"""Fields that name a small file, which may be for its owner's eyes only, and what the service's copy is called."""
_PLACED = ("model", "chat_template", "disk_cache", *SECRETS, *_FILES)
"""Fields whose values are not handed on as they were typed."""
CARRIED = (
    *("HF_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE", "MODELSCOPE_API_TOKEN", "MODELSCOPE_ENDPOINT", "INGLE_HUB"),
    *("INGLE_CPU_TARGET", "CUDA_VISIBLE_DEVICES"),
    *("http_proxy", "https_proxy", "all_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"),
)
"""Variables of whoever installs that the service shall see too. Some hold secrets: they stand in no unit."""
_LET_IN = ("INGLE_API_KEY", "INGLE_API_KEYS", "INGLE_ALLOW_OPEN")
"""Variables with which a service may listen where strangers reach it."""
_STORES = ("INGLE_HOME", "HF_HOME", "HF_HUB_CACHE", "MODELSCOPE_CACHE")


@dataclass(frozen=True)
class ServiceOptions:
    """A service of systemd that runs `ingle serve MODEL` with the same flags, in a sandbox, as a user of its own.

    print writes the unit to stdout. install puts it where systemd finds it, enables and starts it.

    Flags are checked as by `ingle serve`, paths become absolute, keys go into a file that only its owner reads.

    Several services: give each its --name and --port.
    """

    engine: EngineConfig
    text: TextConfig = TextConfig()  # noqa: RUF009 (frozen)
    server: ServerConfig = ServerConfig()  # noqa: RUF009
    name: str = "ingle"
    """Of the service: NAME.service, its folder /var/lib/NAME, its keys in /etc/ingle/NAME.env."""
    run_as: str | None = None
    """User who runs it, who may then use the store named by INGLE_HOME. Default: one that systemd makes up."""
    user: bool = False
    """A service of your own, as of `systemctl --user`, run as you. No root is needed; there is less of a sandbox."""


@dataclass(frozen=True)
class Made:
    """A unit, and what belongs to it."""

    unit: Unit
    manager: Manager
    variables: dict[str, str]
    """Of its file of variables. Secrets are among them."""
    notices: list[str] = field(default_factory=list)


def make(options: ServiceOptions, given: Given, *, check_port: bool) -> Made:
    """`check_port`: whether its port has to be free now.

    Raises `ConfigError` and `ModelError` for what the server or systemd would refuse.
    """
    from ingle.engine.check import pick_device

    name, manager = checked_name(options.name), Manager(options.user)
    reader = _reader(options)
    url = _url(options.server, check_port, systemd.sets_any(manager.variables(name), _LET_IN))
    path, store, notices = _model(options), None, list[str]()
    if path is None and not options.user:
        notices.append(
            f"the service has a store of its own, /var/lib/{name}, into which it pulls {options.engine.model} at its "
            "first start; to serve what this machine has, give the path, which `ingle show` tells"
        )
    if (home := os.environ.get("INGLE_HOME")) and not options.user:
        if options.run_as is not None:
            store = _absolute(home)
        else:
            notices.append(f"INGLE_HOME={home} holds with --run-as NAME, to whom that folder belongs, and not without")
    gpu = pick_device(options.engine) == "cuda"
    unit = Unit(
        name=name,
        model=options.engine.model,
        program=str(Path(sys.executable).absolute()),
        arguments=(
            *_arguments(options, given, options.engine.model if path is None else str(path)),
            *_disk_cache(options, Path(f"/var/lib/{name}"), store),
        ),
        url=url,
        port=options.server.port,
        run_as=options.run_as,
        own=options.user,
        environment=_environment(options.user, f"/var/lib/{name}", store),
        environment_file=str(manager.variables(name)),
        visible=() if options.user else _visible(reader, path),
        store=store,
        gpu=gpu,
        stop_s=STOP_S - 5 + max(5, math.ceil(options.server.health.shutdown_timeout)),
        modprobe=shutil.which("nvidia-modprobe") if gpu else None,
    )
    return Made(unit, manager, _variables(given), notices)


def _reader(options: ServiceOptions) -> reach.Reader:
    if options.run_as is None:
        return reach.Reader("a user that systemd makes up")
    if options.user:
        raise ConfigError(f"--run-as {options.run_as} and --user: a service of your own runs as you; leave one out")
    import pwd

    try:
        entry = pwd.getpwnam(options.run_as)
    except (KeyError, ValueError):
        raise ConfigError(
            f"there is no user {options.run_as!r:.100}: `useradd --system --shell /usr/sbin/nologin NAME` makes one, "
            "and without --run-as systemd does"
        ) from None
    return reach.Reader(entry.pw_name, entry.pw_uid, frozenset(os.getgrouplist(entry.pw_name, entry.pw_gid)))


def _url(server: ServerConfig, check_port: bool, has_key: bool) -> str:
    """`has_key`: whether the service's own variables may let it be reached."""
    if server.port == 0:
        raise ConfigError("--port 0 would give the service another address at each start: give a port, such as 8000")
    from ingle.server.listening import bind, refuse_open
    from ingle.server.running import url_of

    if server.listen.uds is not None:
        raise ConfigError("--uds: a service listens on an address and a port: leave the flag out")
    scheme = "http"
    if server.listen.ssl_certfile is not None:
        from ingle.server.tls import Certificate

        Certificate(server.listen)
        scheme = "https"
    with bind(server.host, server.port if check_port else 0) as sock:
        if not has_key:
            refuse_open(server, sock)
        return f"{url_of(sock, scheme).rpartition(':')[0]}:{server.port}"


def _model(options: ServiceOptions) -> Path | None:
    """Of a model that was given by its path. Raises `ModelError` for one that is nowhere."""
    from ingle.hub.resolve import ModelSource, resolve_or_locate

    name = options.engine.model
    found = resolve_or_locate(name)
    if not isinstance(found, ModelSource):
        return None  # to be pulled
    path = found.path
    return _absolute(path) if Path(name).expanduser().absolute() == path else None


def _absolute(path: Path | str) -> Path:
    """Without `..`, for which systemd takes no path, and with links as they are: what they lead to may change."""
    found = Path(path).expanduser().absolute()
    return found.resolve() if ".." in found.parts else found


def _visible(reader: reach.Reader, model: Path | None) -> tuple[Path, ...]:
    """What the service has to be shown. Raises `ConfigError` for what its user may not read all the same."""
    of_model = reach.of_model(model) if model is not None else set()
    visible = reach.hidden(reach.of_python() | of_model)
    _check_python(reader, visible)
    for place in sorted(of_model):
        if (found := reach.first_unreadable(place, reader, visible)) is not None:
            raise ConfigError(
                f"{found} of the model is not for {reader.name} to read: `chmod -R a+rX` it, or give --run-as NAME"
            )
    return visible


def _check_python(reader: reach.Reader, visible: tuple[Path, ...]) -> None:
    for place in (Path(sys.executable), reach.package() / "ingle"):
        if (found := reach.first_unreadable(place, reader, visible)) is not None:
            raise ConfigError(
                f"{found} is not for {reader.name} to read, and this Python needs it: install ingle where all may "
                "read, such as /opt/ingle, or give --run-as or --user"
            )


def _arguments(options: ServiceOptions, given: Given, model: str) -> Iterator[str | Credential]:
    yield from ("-m", "ingle", "serve", model)
    if given.config is not None:
        path = _absolute(given.config)
        yield _file("--config", f"config{path.suffix.lower()}", path, options)
    for flag, words in given.settings:
        if flag.owner in CONFIGURATION and flag.field not in _PLACED:
            yield from spelled(flag, words)
    for name, copy in _FILES.items():
        given_path = getattr(options.server.access, name, None) or getattr(options.server.listen, name, None)
        if given_path is not None:
            yield _file(f"--{name.replace('_', '-')}", copy, _absolute(given_path), options)
    template = options.text.chat_template
    if template is not None and "{" not in template and Path(template).is_file():
        yield _file("--chat-template", "chat-template.jinja", _absolute(template), options)
    elif template is not None:
        yield f"--chat-template={template}"


def _disk_cache(options: ServiceOptions, state: Path, store: Path | None) -> Iterator[str]:
    """Raises `ConfigError` for a folder that the sandbox lets nobody write to."""
    if options.engine.cache.disk_cache is None:
        return
    folder = _absolute(options.engine.cache.disk_cache)
    if not options.user and not any(place is not None and folder.is_relative_to(place) for place in (state, store)):
        raise ConfigError(
            f"--disk-cache {folder}: the service writes below {state} alone: give --disk-cache {state / 'prompt-cache'}"
        )
    yield f"--disk-cache={folder}"


def _file(flag: str, name: str, path: Path, options: ServiceOptions) -> str | Credential:
    """A small file, which may be for its owner's eyes only."""
    return f"{flag}={path}" if options.user else Credential(flag, name, path)


def _environment(own: bool, state: str, store: Path | None) -> dict[str, str]:
    if own:
        found = {name: str(_absolute(value)) for name in _STORES if (value := os.environ.get(name))}
    else:  # caches of libraries too lie below the home
        found = {"HOME": state, "INGLE_HOME": str(store or state)}
    package = reach.package()
    if not package.is_relative_to(sys.prefix):
        found["PYTHONPATH"] = str(package)
    return found


def _variables(given: Given) -> dict[str, str]:
    found = {name: value for name in CARRIED if (value := os.environ.get(name))} | given.environment
    for secret in SECRETS:
        keys = [key for flag, words in given.settings if flag.field == secret for key in words]
        if secret == "ssl_keyfile_password" and keys:
            found["INGLE_SSL_KEYFILE_PASSWORD"] = keys[-1]
            continue
        if any("," in key or len(key.split()) != 1 for key in keys):
            raise ConfigError("a key with a comma or a space cannot stand in a variable: give --api-key-file")
        if keys:
            found[f"INGLE_{secret.upper()}"] = ",".join(keys)
    return found
