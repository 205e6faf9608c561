"""`ingle launch`: start a program of others with its models at a running server.

A program is told by its command line and its environment alone, and keeps what it writes in a folder of ingle's: the
settings, keys and sessions that its user has elsewhere are neither changed nor read, where the program lets one choose.
The server's key is handed on by the environment, which other users do not see, and written nowhere.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import ssl
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from ingle.cli.flags import parse
from ingle.errors import ConfigError, EngineError, printable
from ingle.habits.near import nearest
from ingle.home import home
from ingle.server.running import UNIX, is_called, servers

_ANSWER_S = 10.0
_MAX_BYTES = 1 << 20
_NO_KEY = "none"
"""Sent to a server that asks for no key, by programs that insist on one."""


@dataclass(frozen=True)
class Launch:
    """Start an agent or a chat page of others with the model of a running server. Words after -- are the program's."""

    program: str
    """Which one: codex, claude, opencode or open-webui."""
    model: str | None = None
    """The model, where several are served."""
    url: str | None = None
    """Of the server, such as http://gpu-box:8000; else one of yours on this machine. INGLE_API_KEY holds its key."""


class Card(msgspec.Struct):
    """What `/v1/models` says of a model."""

    id: str
    max_model_len: int | None = None


class _Cards(msgspec.Struct):
    data: list[Card]


@dataclass(frozen=True)
class Target:
    """What a program is pointed at."""

    url: str
    """Without `/v1`."""
    model: str
    context: int | None
    """Tokens of the longest sequence, if the server says so."""
    key: str

    @property
    def most_tokens(self) -> int | None:
        """Of an answer: what is asked for beyond would leave too little for the question."""
        return None if self.context is None else min(32_000, self.context // 4)


@dataclass(frozen=True)
class Program:
    name: str
    """As people call it."""
    install: str
    num_tokens: int
    """Of its first request, before its user has said anything: instructions and tools."""
    environment: Callable[[Target, Path], Mapping[str, str | None]]
    """Variables to set, and those to unset, given the program's folder."""
    arguments: Callable[[Target], Sequence[str]] = lambda target: ()
    """Before what its user hands over."""
    files: Mapping[str, str] = field(default_factory=dict)
    """What its folder has to hold before its first start."""


def _codex_settings(target: Target) -> Sequence[str]:
    provider = {"name": "ingle", "base_url": f"{target.url}/v1", "env_key": "INGLE_API_KEY", "wire_api": "responses"}
    settings: dict[str, object] = {
        "model_provider": "ingle",
        "model": target.model,
        "web_search": "disabled",  # which only OpenAI's own servers have
        "check_for_update_on_startup": False,
        "analytics.enabled": False,
    }
    if target.context is not None:
        settings["model_context_window"] = target.context
    table = ",".join(f"{name}={_toml(value)}" for name, value in provider.items())
    lines = [f"model_providers.ingle={{{table}}}", *(f"{name}={_toml(value)}" for name, value in settings.items())]
    return [word for line in lines for word in ("-c", line)]


def _toml(value: object) -> str:
    """A string, a number or a truth value, which TOML writes as JSON does."""
    return json.dumps(value, ensure_ascii=False)


def _codex(target: Target, folder: Path) -> Mapping[str, str | None]:
    return {"CODEX_HOME": str(folder), "INGLE_API_KEY": target.key}


def _claude(target: Target, folder: Path) -> Mapping[str, str | None]:
    roles = ("ANTHROPIC_MODEL", "CLAUDE_CODE_SUBAGENT_MODEL")
    sizes = tuple(f"ANTHROPIC_DEFAULT_{size}_MODEL" for size in ("FABLE", "OPUS", "SONNET", "HAIKU"))
    elsewhere = ("BEDROCK", "VERTEX", "FOUNDRY", "MANTLE", "GATEWAY", "ANTHROPIC_AWS")
    found: dict[str, str | None] = {
        "CLAUDE_CONFIG_DIR": str(folder),
        "ANTHROPIC_BASE_URL": target.url,
        "ANTHROPIC_AUTH_TOKEN": target.key,
        "ANTHROPIC_API_KEY": None,  # it would ask which of the two to take
        "ANTHROPIC_CUSTOM_HEADERS": None,
        "CLAUDE_CODE_OAUTH_TOKEN": None,
        "CLAUDE_CODE_ATTRIBUTION_HEADER": "0",  # a line of the system text that is new each time
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        **dict.fromkeys((*roles, *sizes), target.model),
        **dict.fromkeys((f"CLAUDE_CODE_USE_{cloud}" for cloud in elsewhere), None),
    }
    if target.context is not None:
        found["CLAUDE_CODE_AUTO_COMPACT_WINDOW"] = str(target.context)
        found["CLAUDE_CODE_MAX_OUTPUT_TOKENS"] = str(target.most_tokens)
    return found


def _opencode(target: Target, folder: Path) -> Mapping[str, str | None]:
    model: dict[str, object] = {"name": target.model, "tool_call": True}
    if target.context is not None:
        model["limit"] = {"context": target.context, "output": target.most_tokens}
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "name": "ingle",
        "options": {"baseURL": f"{target.url}/v1", "apiKey": "{env:INGLE_API_KEY}"},
        "models": {target.model: model},
    }
    config = {
        "$schema": "https://opencode.ai/config.json",
        "provider": {"ingle": provider},
        "enabled_providers": ["ingle"],
        "model": f"ingle/{target.model}",
        "small_model": f"ingle/{target.model}",
        "autoupdate": False,
        "share": "disabled",
    }
    return {
        "OPENCODE_CONFIG_CONTENT": json.dumps(config, ensure_ascii=False),  # stronger than all of its files
        "OPENCODE_DISABLE_MODELS_FETCH": "1",
        "OPENCODE_DB": str(folder / "opencode.db"),
        "INGLE_API_KEY": target.key,
    }


def _open_webui(target: Target, folder: Path) -> Mapping[str, str | None]:
    return {
        "DATA_DIR": str(folder),
        "OPENAI_API_BASE_URL": f"{target.url}/v1",
        "OPENAI_API_BASE_URLS": None,
        "OPENAI_API_KEY": target.key,
        "OPENAI_API_KEYS": None,
        "DEFAULT_MODELS": target.model,
        "ENABLE_OLLAMA_API": "False",
        "ENABLE_PERSISTENT_CONFIG": "False",  # else the address of its first start holds for ever
        "WEBUI_AUTH": "False",  # nobody but this machine's users reaches it, see --host
        "WEBUI_SECRET_KEY": secrets.token_hex(24),  # else it writes one into the folder that it is started in
        "ENABLE_VERSION_UPDATE_CHECK": "False",
        "DO_NOT_TRACK": "true",
        "SCARF_NO_ANALYTICS": "true",
        "ANONYMIZED_TELEMETRY": "false",
    }


PROGRAMS: Mapping[str, Program] = {
    "codex": Program("Codex", "npm install -g @openai/codex", 10_000, _codex, _codex_settings),
    "claude": Program(
        "Claude Code",
        "npm install -g @anthropic-ai/claude-code",
        20_000,
        _claude,
        files={".claude.json": '{"hasCompletedOnboarding": true}'},  # else it begins with an account
    ),
    "opencode": Program("OpenCode", "npm install -g opencode-ai", 9_000, _opencode),
    "open-webui": Program(
        "Open WebUI",
        "pip install open-webui",
        0,
        _open_webui,
        lambda target: ("serve", "--host", "127.0.0.1"),
    ),
}
_ALSO = {"claude-code": "claude", "openwebui": "open-webui", "webui": "open-webui", "open_webui": "open-webui"}


def main(argv: Sequence[str]) -> None:
    """Becomes the program."""
    words = list(argv)
    cut = words.index("--") if "--" in words else len(words)
    try:
        flags = parse(Launch, words[:cut], command="launch")
    except ConfigError as error:
        if error.what.startswith("unexpected argument") and cut == len(words):
            raise ConfigError(error.what, alternative="what is the program's comes after --") from None
        raise
    command = _named(flags.program)
    program = PROGRAMS[command]
    path = shutil.which(command)
    if path is None:
        raise EngineError(f"{command} is not installed: `{program.install}`, and then this again")
    target = _target(flags)
    folder = _folder(command, program)
    if target.context is not None and target.context < 2 * program.num_tokens:
        print(
            f"notice: {program.name} begins with some {program.num_tokens} tokens of its own, and {target.model} is "
            f"served with {target.context}: `ingle serve MODEL --max-model-len 64k`, if the model can, leaves it room",
            file=sys.stderr,
        )
    print(f"{program.name}: {target.model} at {target.url}; its own settings are in {folder}", file=sys.stderr)
    environment = _changed(os.environ, {**program.environment(target, folder), **_past_proxies(target.url)})
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execve(path, [command, *program.arguments(target), *words[cut + 1 :]], environment)
    except OSError as error:
        raise EngineError(f"{path} does not start: {error.strerror}") from error


def _named(name: str) -> str:
    """Raises `ConfigError`."""
    name = _ALSO.get(name, name)
    if name in PROGRAMS:
        return name
    near = nearest(name, {each: each for each in PROGRAMS})
    hint = f"did you mean `ingle launch {near}`?" if near else f"there are {', '.join(PROGRAMS)}"
    raise ConfigError(f"{printable(name)[:100]!r} is no program that ingle knows how to launch; {hint}")


def _target(flags: Launch) -> Target:
    """Raises `ConfigError` and `EngineError`."""
    key = os.environ.get("INGLE_API_KEY")
    if flags.url is not None:
        return _served(_address(flags.url), flags.model, key)
    found = servers()
    model = flags.model
    wanted = [each for each in found if model is None or any(is_called(name, model) for name in each.models)]
    if not wanted:
        example = flags.model or "MODEL"
        others = f"; running: {', '.join(server.models[0] for server in found)}" if found else ""
        raise EngineError(
            f"no server{f' for {flags.model!r}' if flags.model else ''} runs: `ingle serve {example}` in another "
            f"terminal starts one, or name one by --url{others}"
        )
    if len(wanted) > 1:
        listed = ", ".join(f"{server.models[0]} at {server.url}" for server in wanted)
        say = "--url" if flags.model is not None else "--model or --url"
        raise ConfigError(f"{len(wanted)} servers run, say which by {say}: {listed}")
    return _served(_address(wanted[0].url), flags.model, key)


def _address(url: str) -> str:
    """Raises `ConfigError`."""
    if url.startswith((UNIX, "/")):
        raise ConfigError(f"{printable(url)[:200]} is a Unix socket, and these programs speak TCP: serve with --port")
    url = url if "://" in url else f"http://{url}"
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"--url must be a server's address such as http://127.0.0.1:8000, got {url!r:.200}")
    return url.rstrip("/").removesuffix("/v1")


def _served(url: str, model: str | None, key: str | None) -> Target:
    """Asks the server, so that what does not work is told before the program starts."""
    cards = _cards(url, key)
    found = [card for card in cards if model is None or is_called(card.id, model)]
    if not found:
        raise EngineError(f"{url} has no model {model!r}; it has {', '.join(card.id for card in cards) or 'none'}")
    return Target(url, found[0].id, found[0].max_model_len, key or _NO_KEY)


def _cards(url: str, key: str | None) -> list[Card]:
    request = urllib.request.Request(f"{url}/v1/models", headers={"Authorization": f"Bearer {key}"} if key else {})
    opener = urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if _is_here(url) else []))
    try:
        with opener.open(request, timeout=_ANSWER_S) as answer:
            return msgspec.json.decode(answer.read(_MAX_BYTES), type=_Cards).data
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 401:
                of = "another key than INGLE_API_KEY" if key else "a key: set INGLE_API_KEY"
                raise EngineError(f"{url} asks for {of}") from error
            raise EngineError(f"{url} takes no requests: {_said(error)}") from error
    except (OSError, ValueError, msgspec.DecodeError) as error:
        reason = getattr(error, "reason", error)
        trust = (
            "; SSL_CERT_FILE names certificates to trust" if isinstance(reason, ssl.SSLCertVerificationError) else ""
        )
        raise EngineError(f"{url} does not answer as a server of models: {reason}{trust}") from error


class _Detail(msgspec.Struct):
    message: str


class _Refused(msgspec.Struct):
    error: _Detail


def _said(error: urllib.error.HTTPError) -> str:
    try:
        return msgspec.json.decode(error.read(_MAX_BYTES), type=_Refused).error.message
    except (OSError, msgspec.DecodeError):
        return f"HTTP {error.code}"


def _folder(command: str, program: Program) -> Path:
    """The program's own, for its owner alone. Raises `EngineError`."""
    folder = home() / "launch" / command
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name, text in program.files.items():
            if not (folder / name).exists():
                (folder / name).write_text(text)
    except OSError as error:
        raise EngineError(f"{program.name} needs a folder of its own, and {folder} cannot be: {error}") from error
    return folder


def _is_here(url: str) -> bool:
    return urllib.parse.urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")


def _past_proxies(url: str) -> Mapping[str, str]:
    """A proxy that the environment names does not reach this machine."""
    host = urllib.parse.urlsplit(url).hostname
    if not _is_here(url) or host is None or not urllib.request.getproxies_environment():
        return {}
    listed = [os.environ.get(name) for name in ("no_proxy", "NO_PROXY")]
    value = ",".join([*filter(None, listed[:1] if listed[0] else listed[1:]), host])
    return {"no_proxy": value, "NO_PROXY": value}


def _changed(environment: Mapping[str, str], changes: Mapping[str, str | None]) -> dict[str, str]:
    kept = {name: value for name, value in environment.items() if name not in changes}
    return kept | {name: value for name, value in changes.items() if value is not None}
