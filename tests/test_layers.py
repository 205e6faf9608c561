"""How the house is built: imports point down, modules stand in no circle, and what crosses a seam has a type."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import ingle

LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "version", "cgroup", "heap"),
    ("home", "config", "request"),
    ("channel",),
    ("facts", "kernels"),
    ("weights",),
    ("text", "hub", "model"),
    ("device",),
    ("engine",),
    ("llm", "verify", "server"),
    ("cli", "__init__"),
    ("bench", "__main__"),
)
"""The packages and modules of `src/ingle`, the lowest first. Each imports from layers below its own and from itself.
`cli` starts its commands by name, `bench` among them."""

UPWARD = {
    ("kernels", "engine"),  # the reference attention's chunks
    ("device", "engine"),  # what a worker is told of a step
}
"""Arrows that still point up. The list shrinks."""

CIRCLES = {("model.decoder", "model.few_rows"), ("weights.experts", "weights.formats")}
"""Modules that still import each other. The list shrinks."""

ROOT = Path(ingle.__file__).parent


@dataclass(frozen=True)
class Module:
    name: str
    """Without `ingle.`; a package goes by its own name, the outermost one is `__init__`."""
    tree: ast.Module

    @property
    def part(self) -> str:
        """The package or module of `LAYERS` that this one belongs to."""
        return self.name.partition(".")[0]


@cache
def modules() -> Mapping[str, Module]:
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
        found[name] = Module(name, ast.parse(path.read_text()))
    return found


def imported(module: Module) -> set[str]:
    """All modules of ingle that a module names in imports, those within functions and for types alone included."""
    found = set()
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module.name}: relative imports hide where they point"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        inner = (name.removeprefix("ingle.") for name in names if name.startswith("ingle."))
        found.update(_known(name) for name in inner)
    return found - {module.name}


def _known(name: str) -> str:
    """The module that an imported name is, or is defined in."""
    while name not in modules():
        name = name.rpartition(".")[0] or "__init__"
    return name


def test_every_part_has_its_layer() -> None:
    listed = [part for layer in LAYERS for part in layer]
    assert sorted(listed) == sorted({module.part for module in modules().values()})


def test_imports_point_down() -> None:
    height = {part: index for index, layer in enumerate(LAYERS) for part in layer}
    upward: dict[tuple[str, str], list[str]] = {}
    for module in modules().values():
        for target in imported(module):
            part = modules()[target].part
            if part != module.part and height[part] >= height[module.part]:
                upward.setdefault((module.part, part), []).append(f"{module.name} imports {target}")
    assert {parts: names for parts, names in upward.items() if parts not in UPWARD} == {}
    assert upward.keys() == UPWARD, "arrows are gone: take them off the list"


def test_no_module_stands_in_a_circle() -> None:
    graph = {module.name: imported(module) for module in modules().values()}
    for first, second in CIRCLES:
        assert first in graph[second] and second in graph[first], "a circle is gone: take it off the list"
        graph[first] = graph[first] - {second}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(f"modules import each other in a circle: {' > '.join(error.args[1])}") from None
