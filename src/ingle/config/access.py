"""Who may reach a server, with which keys and by which way."""

from __future__ import annotations

import ipaddress
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

from ingle.errors import ConfigError

_MAX_FILE_BYTES = 1 << 20
_MAX_NAME = 64
_MAX_KEYS = 10_000
_NAME = re.compile(r"[A-Za-z0-9][\w.@-]*", re.ASCII)
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s]+")
_PREFIX = re.compile(r"(/[\w.~-]+)+", re.ASCII)
_MAX_SOCKET_BYTES = 107
"""Of a path that names a socket, on Linux."""

ClientCertificates = Literal["auto", "none", "optional", "required"]


@dataclass(frozen=True)
class ApiKey:
    """A key, and what its holder may do."""

    key: str = field(repr=False)
    name: str = ""
    """What logs, metrics and shares of the engine know its holder by."""
    owner: str = ""
    """Whose files, batches and answers it opens; the name if it was given one, else all who have none share them."""
    is_admin: bool = False
    """Whether it opens what changes the server or tells about it, too."""
    requests_per_minute: float = math.inf
    tokens_per_minute: float = math.inf
    """Of prompts and answers together."""


@dataclass(frozen=True)
class AccessConfig:
    """Who may use a server, and from where."""

    api_key: tuple[str, ...] = field(default=(), repr=False)
    """Keys that clients must send as `Authorization: Bearer KEY`. Default: none is asked for. Others on this machine
    see them in `ps`: --api-key-file and INGLE_API_KEY keep them out of it."""
    api_key_file: str | None = None
    """File with such keys, one a line; empty lines and those that begin with # do not count. Behind a key may stand
    name=ALICE, rpm=60 (requests a minute), tpm=100k (tokens a minute) and admin. Read again when it changes."""
    admin_api_key: tuple[str, ...] = field(default=(), repr=False)
    """Keys that also open what changes the server or tells about it. Default: nobody may change a server that asks for
    keys, and each key shows its metrics."""
    allow_open: bool = False
    """Let a server that the network reaches ask for no key. Default: it does not start."""
    allowed_hosts: tuple[str, ...] = ()
    """Host names that requests may be sent to, besides localhost and the server's own address; *.example.com for all
    names below it, * for any. Default: no others for a server on loopback, any for one that asks for a key, and
    otherwise addresses and names that only local networks know."""
    cors_origin: tuple[str, ...] = ()
    """Sites whose pages may call the server, such as https://chat.example.com; * in it for any word, http://localhost:*
    for any port, * alone for every site. Default: none, and requests that a browser sends for other sites are
    refused."""

    def __post_init__(self) -> None:
        for flag, words in (
            ("--api-key", self.api_key),
            ("--admin-api-key", self.admin_api_key),
            ("--allowed-hosts", self.allowed_hosts),
            ("--cors-origin", self.cors_origin),
        ):
            if not all(word.strip() for word in words):
                raise ConfigError(f"{flag} has an empty value: leave the flag out, or give it one")
        self.cors_origins()
        self.all_keys()

    def cors_origins(self) -> tuple[str, ...]:
        """As browsers spell them. Raises `ConfigError`."""
        origins = tuple(origin.strip().lower().rstrip("/") for origin in self.cors_origin)
        for origin in origins:
            if origin not in ("*", "null") and not _ORIGIN.fullmatch(origin):
                raise ConfigError(
                    f"--cors-origin {origin!r:.100} is not an origin: give scheme, host and, where there is one, port, "
                    "such as https://chat.example.com or http://localhost:3000"
                )
        return origins

    def all_keys(self) -> tuple[ApiKey, ...]:
        """All of them. One without a name is called by its place, `key-1`. Raises `ConfigError` for what is no file of
        keys, for too many, and for a key that is given twice."""
        given = [ApiKey(key) for key in self.api_key]
        if self.api_key_file is not None:
            given += _keys_in(self.api_key_file)
        given += [ApiKey(key, is_admin=True) for key in self.admin_api_key]
        if len(given) > _MAX_KEYS:
            raise ConfigError(
                f"{len(given)} keys are too many: each request is compared with all, so {_MAX_KEYS} may be"
            )
        return tuple(_named(given))


@dataclass(frozen=True)
class ListenConfig:
    """By which way a server is reached, beside address and port."""

    uds: str | None = None
    """Path of a Unix socket to listen on, in place of address and port."""
    uds_mode: str = "600"
    """Who may use that socket, as chmod writes it: 600 its owner, 660 its group too, 666 everybody here."""
    ssl_certfile: str | None = None
    """Certificate for TLS, with those between it and its authority, in PEM. Read again when it changes."""
    ssl_keyfile: str | None = None
    """Its private key, in PEM. Default: the one in --ssl-certfile."""
    ssl_keyfile_password: str | None = field(default=None, repr=False)
    """Of an encrypted key; INGLE_SSL_KEYFILE_PASSWORD keeps it out of `ps`."""
    ssl_ca_certs: str | None = None
    """Certificates of authorities, in PEM: clients have to show a certificate of one of them."""
    ssl_cert_reqs: ClientCertificates = "auto"
    """Whether clients have to show one. auto: with --ssl-ca-certs they have."""
    root_path: str | None = None
    """Prefix of all paths behind a proxy that leaves it on or takes it off, such as /llm."""
    trusted_proxies: tuple[str, ...] = ()
    """Addresses or networks of proxies whose X-Forwarded-For and X-Forwarded-Proto are believed. Default: none."""

    def __post_init__(self) -> None:
        self.socket_mode()
        if self.uds is not None:
            _check_socket(self.uds)
        if self.prefix and not _PREFIX.fullmatch(self.prefix):
            raise ConfigError(f"--root-path {self.root_path!r:.100} is not a path such as /llm")
        for proxy in self.proxies:
            _check_proxy(proxy)
        if self.ssl_cert_reqs not in get_args(ClientCertificates):
            allowed = ", ".join(get_args(ClientCertificates))
            raise ConfigError(f"--ssl-cert-reqs {self.ssl_cert_reqs!r:.20} is not one of {allowed}")
        self._check_tls()

    def _check_tls(self) -> None:
        if self.ssl_certfile is None:
            for name in ("ssl_keyfile", "ssl_keyfile_password", "ssl_ca_certs", "ssl_cert_reqs"):
                if getattr(self, name) not in (None, "auto", "none"):
                    raise ConfigError(f"--{name.replace('_', '-')} needs --ssl-certfile, the server's certificate")
        elif self.ssl_cert_reqs in ("optional", "required") and self.ssl_ca_certs is None:
            raise ConfigError(
                f"--ssl-cert-reqs {self.ssl_cert_reqs} needs --ssl-ca-certs: whose certificates are taken"
            )

    @property
    def prefix(self) -> str:
        """As it stands before paths, or nothing."""
        inner = (self.root_path or "").strip("/")
        return f"/{inner}" if inner else ""

    @property
    def proxies(self) -> tuple[str, ...]:
        """Also of words with commas, as uvicorn takes them."""
        return tuple(each.strip() for word in self.trusted_proxies for each in word.split(",") if each.strip())

    @property
    def client_certificates(self) -> ClientCertificates:
        """Not `auto`."""
        if self.ssl_cert_reqs != "auto":
            return self.ssl_cert_reqs
        return "none" if self.ssl_ca_certs is None else "required"

    def socket_mode(self) -> int:
        """Raises `ConfigError`."""
        if not re.fullmatch(r"0?o?[0-7]{3}", self.uds_mode):
            raise ConfigError(f"--uds-mode {self.uds_mode!r:.20} is not a mode such as 600, 660 or 666")
        return int(self.uds_mode[-3:], 8)


def _check_socket(uds: str) -> None:
    if not uds.strip():
        raise ConfigError("--uds has an empty value: leave the flag out, or give the path of a socket")
    try:
        path = Path(uds).expanduser().absolute()
    except RuntimeError as error:  # of a user that does not exist
        raise ConfigError(f"--uds {uds}: {error}") from None
    if len(str(path).encode()) > _MAX_SOCKET_BYTES:
        raise ConfigError(
            f"--uds {uds:.60}… is longer than the {_MAX_SOCKET_BYTES} bytes that the path of a socket may have"
        )


def _check_proxy(proxy: str) -> None:
    try:
        if proxy != "*":
            ipaddress.ip_network(proxy)
    except ValueError:
        raise ConfigError(
            f"--trusted-proxies {proxy!r:.60} is neither an address nor a network, such as 10.0.0.7 or 10.0.0.0/8, "
            "nor * for all"
        ) from None


def _named(given: list[ApiKey]) -> Iterator[ApiKey]:
    seen: dict[str, ApiKey] = {}
    numbers = {True: 0, False: 0}
    for each in given:
        if (before := seen.get(each.key)) is not None:
            if before.is_admin != each.is_admin:
                raise ConfigError("one key is given both as --api-key and as --admin-api-key: give two")
            if before == each:
                continue  # as when the environment and a file have it
            raise ConfigError(f"one key is given twice, with other words behind it (name={before.name or each.name})")
        seen[each.key] = each
        numbers[each.is_admin] += 1
        kind = "admin" if each.is_admin else "key"
        name = each.name or f"{kind}-{numbers[each.is_admin]}"
        yield replace(each, name=name, owner=each.name)


def _keys_in(path: str) -> list[ApiKey]:
    where = f"--api-key-file {path}"
    try:
        with Path(path).expanduser().open("rb") as file:
            text = file.read(_MAX_FILE_BYTES + 1)
        lines = text.decode().splitlines()
    except (OSError, UnicodeDecodeError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or "not text"
        raise ConfigError(f"{where}: {reason}") from None
    if len(text) > _MAX_FILE_BYTES:
        raise ConfigError(f"{where}: larger than {_MAX_FILE_BYTES} bytes, which is no list of keys")
    keys = []
    for number, line in enumerate(lines, 1):
        words = line.split()
        if words and not words[0].startswith("#"):
            try:
                keys.append(_key(words))
            except ValueError as error:
                raise ConfigError(f"{where}, line {number}: {error}") from None
    if not keys:
        raise ConfigError(f"{where}: no key in it")
    return keys


def _key(words: list[str]) -> ApiKey:
    """Of a line. Raises `ValueError`, which does not quote what may be a key."""
    name, is_admin, rates = "", False, {"rpm": math.inf, "tpm": math.inf}
    for word in words[1:]:
        what, _, value = word.partition("=")
        if word == "admin":
            is_admin = True
        elif what == "name" and _NAME.fullmatch(value) and len(value) <= _MAX_NAME:
            name = value
        elif what == "name":
            raise ValueError(f"a name is up to {_MAX_NAME} letters, digits and any of . _ @ - behind name=")
        elif what in rates:
            rates[what] = _rate(what, value)
        elif what.startswith("#"):
            break
        else:
            raise ValueError("behind a key may stand name=NAME, rpm=NUMBER, tpm=NUMBER, admin, and a # with a remark")
    return ApiKey(words[0], name, "", is_admin, rates["rpm"], rates["tpm"])


def _rate(what: str, value: str) -> float:
    match = re.fullmatch(r"(\d{1,12}(?:\.\d{1,6})?)([km]?)", value.lower())
    if match is None or not float(match[1]):
        raise ValueError(f"{what}={value[:20]} is no number above 0, such as {what}=60 or {what}=100k")
    return float(match[1]) * {"": 1, "k": 1e3, "m": 1e6}[match[2]]
