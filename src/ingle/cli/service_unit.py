"""From the flags of `ingle serve` to a unit that serves the same."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ingle.cli.flags import Given
from ingle.cli.line import spelled
from ingle.config import CONFIGURATION, EngineConfig, ServerConfig, TextConfig
from ingle.errors import ConfigError, ModelError, Refusals
from ingle.service import reach
from ingle.service.systemd import Manager
from ingle.service.unit import Credential, Unit, checked_name

if TYPE_CHECKING:
    from ingle.hub.resolve import ModelSource

_PLACED = ("model", "api_key", "api_key_file", "chat_template")
"""Fields whose values are not handed on as they were typed."""
_CARRIED = (
    *("HF_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE", "INGLE_HUB", "INGLE_CPU_TARGET", "CUDA_VISIBLE_DEVICES"),
    *("http_proxy", "https_proxy", "all_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"),
)
"""Variables of whoever installs that the service shall see too. Some hold secrets: they stand in no unit."""
_STORES = ("INGLE_HOME", "HF_HOME", "HF_HUB_CACHE")


@dataclass(frozen=True)
class ServiceOptions:
    """A service of systemd that runs `ingle serve MODEL` with the same flags, in a sandbox, as a user of its own.

    print writes the unit to stdout. install puts it where systemd finds it, enables and starts it. Flags are checked as
    by `ingle serve`, paths become absolute, keys go into a file that only its owner reads. Several services need a
    --name and a --port each.
    """

    engine: EngineConfig
    text: TextConfig = TextConfig()  # noqa: RUF009 (frozen)
    server: ServerConfig = ServerConfig()  # noqa: RUF009
    name: str = "ingle"
    """Of the service: NAME.service, its folder /var/lib/NAME, its keys in /etc/ingle/NAME.env."""
    user: str | None = None
    """User who runs it. Default: one that systemd makes up, to whom nothing else belongs."""
    user_unit: bool = False
    """A service of your own, run by your own systemd as you. No root is needed, and there is less of a sandbox."""


@dataclass(frozen=True)
class Made:
    """A unit, and what belongs to it."""

    unit: Unit
    manager: Manager
    variables: dict[str, str]
    """Of its file of variables. Secrets are among them."""
    notices: list[str] = field(default_factory=list)


def make(options: ServiceOptions, given: Given, *, running: bool) -> Made:
    """`running` says that the service runs already, and so takes the port and the memory.

    Raises `ConfigError` and `ModelError` for what the server or systemd would refuse.
    """
    name, manager = checked_name(options.name), Manager(options.user_unit)
    reader = _reader(options)
    url = _url(options.server, running)
    from ingle.engine.check import pick_device

    source, jit = _model(options, running)
    gpu = pick_device(options.engine) == "cuda"
    by_path = source is not None and _is_path(options.engine.model, source)
    python = reach.places_of_python(Path(sys.executable), [Path(sys.prefix), Path(sys.base_prefix), _package()])
    model = reach.places_of_model(source.path) if source is not None and by_path else []
    visible = () if options.user_unit else reach.hidden([*python, *model])
    if not options.user_unit:
        _check_readable(reader, python, model, visible)
    notices: list[str] = []
    unit = Unit(
        name=name,
        model=options.engine.model,
        program=str(Path(sys.executable).absolute()),
        arguments=tuple(_arguments(options, given, str(source.path) if source and by_path else options.engine.model)),
        url=url,
        port=options.server.port,
        max_connections=options.server.max_connections,
        user=options.user,
        own=options.user_unit,
        environment=_environment(options, name),
        environment_file=str(manager.variables(name)),
        visible=visible,
        writable=tuple(_writable(options, notices)),
        gpu=gpu,
        modprobe=shutil.which("nvidia-modprobe") if gpu else None,
        jit=gpu or jit,
    )
    if source is not None and not by_path and not options.user_unit:
        notices.append(
            f"the service has a store of its own, /var/lib/{name}, and pulls {source.name} into that at its first "
            f"start; to serve what is here, give it as {source.path}"
        )
    return Made(unit, manager, _variables(given), notices)


def _reader(options: ServiceOptions) -> reach.Reader:
    if options.user is None:
        return reach.Reader("a user that systemd makes up")
    if options.user_unit:
        raise ConfigError(
            f"--user {options.user} and --user-unit: a unit of your own runs as you; leave one of them out"
        )
    import pwd

    try:
        entry = pwd.getpwnam(options.user)
    except (KeyError, ValueError):
        raise ConfigError(
            f"there is no user {options.user!r:.100}: `useradd --system --shell /usr/sbin/nologin NAME` makes one, and "
            "without --user systemd does"
        ) from None
    return reach.Reader(entry.pw_name, entry.pw_uid, frozenset(os.getgrouplist(entry.pw_name, entry.pw_gid)))


def _url(server: ServerConfig, running: bool) -> str:
    if server.port == 0:
        raise ConfigError("--port 0 would give the service another address at each start: give a port, such as 8000")
    from ingle.server.launch import bind
    from ingle.server.running import url_of

    with bind(server.host, 0 if running else server.port) as sock:
        return f"{url_of(sock).rpartition(':')[0]}:{server.port}"


def _model(options: ServiceOptions, running: bool) -> tuple[ModelSource | None, bool]:
    """Where it lies, None if it has yet to be pulled; and whether code may be made while it runs."""
    from ingle.engine.check import check_model
    from ingle.engine.startup import ModelFiles
    from ingle.hub.catalog import find_entry
    from ingle.hub.resolve import resolve_model

    config = options.engine
    try:
        source = resolve_model(config.model)
    except ModelError:
        if find_entry(config.model) is None:
            raise
        return None, True
    decoder = ModelFiles.read(config, source.path).decoder
    if not running:  # else the memory that it needs is taken, by itself
        refused = [each for each in check_model(config, options.text, source.path).findings if each.refused]
        if refused:
            raise Refusals([ModelError(each.what, alternative=each.alternative) for each in refused])
    return source, decoder is None or config.parallel.cpu_kernels == "torch"


def _is_path(given: str, source: ModelSource) -> bool:
    return Path(given).expanduser().absolute() == source.path


def _package() -> Path:
    """The folder that ingle is imported from."""
    import ingle

    return Path(ingle.__file__).absolute().parents[1]


def _check_readable(reader: reach.Reader, python: list[Path], model: list[Path], visible: tuple[Path, ...]) -> None:
    for place in (Path(sys.executable), _package() / "ingle"):
        if (found := reach.first_unreadable(place, reader, visible)) is not None:
            raise ConfigError(
                f"{found} is not for {reader.name} to read, and this Python needs it: install ingle where all may "
                "read, such as /opt/ingle, or give --user or --user-unit"
            )
    for place in model:
        if (found := reach.first_unreadable(place, reader, visible)) is not None:
            raise ConfigError(
                f"{found} of the model is not for {reader.name} to read: `chmod -R a+rX` it, or give --user NAME"
            )


def _arguments(options: ServiceOptions, given: Given, model: str) -> Iterator[str | Credential]:
    yield from ("-m", "ingle", "serve", model)
    if given.config is not None:
        path = Path(given.config).expanduser().absolute()
        yield _file("--config", f"config{path.suffix.lower()}", path, options)
    for flag, words in given.settings:
        if flag.owner in CONFIGURATION and flag.field not in _PLACED:
            yield from spelled(flag, words)
    if (keys := options.server.api_key_file) is not None:
        yield _file("--api-key-file", "api-keys", Path(keys).expanduser().absolute(), options)
    template = options.text.chat_template
    if template is not None and "{" not in template and Path(template).is_file():
        yield _file("--chat-template", "chat-template.jinja", Path(template).absolute(), options)
    elif template is not None:
        yield f"--chat-template={template}"


def _file(flag: str, name: str, path: Path, options: ServiceOptions) -> str | Credential:
    """A small file, which may be for its owner's eyes only."""
    return f"{flag}={path}" if options.user_unit else Credential(flag, name, path)


def _environment(options: ServiceOptions, name: str) -> dict[str, str]:
    found = {}
    if options.user_unit:
        found = {name: str(Path(value).expanduser().absolute()) for name in _STORES if (value := os.environ.get(name))}
    else:
        state = f"/var/lib/{name}"
        home = os.environ.get("INGLE_HOME") if options.user is not None else None
        found = {"HOME": state, "INGLE_HOME": str(Path(home).absolute()) if home else state}
    package = _package()
    if Path(sys.prefix) not in package.parents:
        found["PYTHONPATH"] = str(package)
    return found


def _writable(options: ServiceOptions, notices: list[str]) -> Iterator[Path]:
    home = os.environ.get("INGLE_HOME")
    if not home or options.user_unit:
        return
    if options.user is not None:
        yield Path(home).absolute()
    else:
        notices.append(
            f"INGLE_HOME={home} is not the service's, which has /var/lib/{options.name}: with --user NAME, to whom "
            "that folder belongs, it is"
        )


def _variables(given: Given) -> dict[str, str]:
    found = {name: value for name in _CARRIED if (value := os.environ.get(name))} | given.environment
    keys = [key for flag, words in given.settings if flag.field == "api_key" for key in words]
    if any("," in key or len(key.split()) != 1 for key in keys):
        raise ConfigError("a key with a comma or a space cannot stand in a variable: give --api-key-file")
    if keys:
        found["INGLE_API_KEY"] = ",".join(keys)
    return found
