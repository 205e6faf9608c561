#!/usr/bin/env python3
"""Libraries of npm that the page at `/` loads: fetched as they are published, with licences and digests.

python tools/vendor.py                    fetches what LIBRARIES names, and writes vendor/lock.json
python tools/vendor.py --check            says whether the files are those of the lock; needs no network
"""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
VENDOR = ROOT / "src" / "ingle" / "server" / "page" / "static" / "vendor"
LOCK = VENDOR / "lock.json"


class Library(NamedTuple):
    package: str
    version: str
    files: tuple[str, ...]
    """Of the package, as patterns; each is kept by its name alone, those below `fonts` in such a folder."""
    licence: str


LIBRARIES: Mapping[str, Library] = {
    "marked": Library("marked", "18.2.1", ("lib/marked.esm.js",), "LICENSE*"),
    "dompurify": Library("dompurify", "3.5.0", ("dist/purify.es.mjs",), "LICENSE"),
    "katex": Library("katex", "0.19.1", ("dist/katex.min.js", "dist/katex.min.css", "dist/fonts/*.woff2"), "LICENSE*"),
    "highlight": Library("@highlightjs/cdn-assets", "11.12.0", ("es/highlight.min.js",), "LICENSE"),
    "uplot": Library("uplot", "1.6.32", ("dist/uPlot.esm.js", "dist/uPlot.min.css"), "LICENSE"),
    "swagger-ui": Library("swagger-ui-dist", "5.35.0", ("swagger-ui-bundle.js", "swagger-ui.css"), "LICENSE"),
}


def main() -> int:
    if sys.argv[1:] == ["--check"]:
        problems = [*differences()]
        print("\n".join(problems) or f"{sum(map(size, kept()))} bytes, all as {LOCK.relative_to(ROOT)} says")
        return 1 if problems else 0
    if sys.argv[1:]:
        print(__doc__)
        return 2
    lock = {name: fetch(VENDOR / name, library) for name, library in LIBRARIES.items()}
    LOCK.write_text(json.dumps(lock, indent=2) + "\n")
    for problem in differences():
        print(problem)
    return 0


def fetch(folder: Path, library: Library) -> dict[str, Any]:
    """What the lock says of it, once its files lie in `folder`."""
    with tempfile.TemporaryDirectory() as place:
        named = f"{library.package}@{library.version}"
        command = ["npm", "pack", "--json", "--silent", "--pack-destination", place, named]
        (told,) = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
        (archive,) = Path(place).glob("*.tgz")
        digest = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
        if told["integrity"] != f"sha512-{digest}":
            sys.exit(f"{named}: {told['integrity']} is what npm says, sha512-{digest} what came")
        with tarfile.open(archive) as packed:
            packed.extractall(place, filter="data")
        shutil.rmtree(folder, ignore_errors=True)
        copied = [*copy(Path(place) / "package", folder, library)]
        described = json.loads((Path(place) / "package" / "package.json").read_text())
    return {
        "package": library.package,
        "version": library.version,
        "license": described["license"],
        "integrity": told["integrity"],
        "files": {str(path.relative_to(VENDOR)): sha256(path) for path in sorted(copied)},
    }


def copy(package: Path, folder: Path, library: Library) -> Iterator[Path]:
    for pattern in (*library.files, library.licence):
        found = sorted(package.glob(pattern))
        if not found:
            sys.exit(f"{library.package} {library.version} has no {pattern}")
        for path in found:
            copied = folder / ("fonts" if path.parent.name == "fonts" else "") / path.name
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copied)
            yield copied


def differences() -> Iterator[str]:
    """Between the lock, this list and what lies there, in words."""
    lock = json.loads(LOCK.read_text())
    wanted = {name: (library.package, library.version) for name, library in LIBRARIES.items()}
    if (said := {name: (entry["package"], entry["version"]) for name, entry in lock.items()}) != wanted:
        yield f"the lock has {said}, the list {wanted}"
    digests = {path: digest for entry in lock.values() for path, digest in entry["files"].items()}
    here = {str(path.relative_to(VENDOR)): sha256(path) for path in kept()}
    for path in sorted(digests.keys() | here.keys()):
        if path not in here:
            yield f"{path} is missing"
        elif path not in digests:
            yield f"{path} is in no library"
        elif digests[path] != here[path]:
            yield f"{path} has changed"


def kept() -> list[Path]:
    return [path for path in VENDOR.rglob("*") if path.is_file() and path != LOCK]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def size(path: Path) -> int:
    return path.stat().st_size


if __name__ == "__main__":
    sys.exit(main())
