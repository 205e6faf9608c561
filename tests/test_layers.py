"""How the house is built: imports point down, modules stand in no circle, and what crosses a seam has a type."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import ingle

LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "version", "cgroup", "heap"),
    ("limits",),
    ("habits", "progress", "structured"),
    ("home", "config", "kv", "request"),
    ("channel", "events", "step"),
    ("facts", "kernels", "pooling"),
    ("description", "weights"),
    ("text", "model"),
    ("hub",),
    ("device",),
    ("parallel",),
    ("engine",),
    ("jobs",),
    ("verify", "server", "plan", "quantize", "service", "eval"),
    ("llm", "doctor"),
    ("cli", "__init__"),
    ("bench", "__main__"),
)
"""The packages and modules of `src/ingle`, the lowest first. Each imports from layers below its own and from itself.
`cli` starts its commands by name, `bench` among them."""

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
    upward = [
        f"{module.name} imports {target}"
        for module in modules().values()
        for target in imported(module)
        if modules()[target].part != module.part and height[modules()[target].part] >= height[module.part]
    ]
    assert upward == []


def test_no_module_stands_in_a_circle() -> None:
    graph = {module.name: imported(module) for module in modules().values()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(f"modules import each other in a circle: {' > '.join(error.args[1])}") from None


SEAMS = ("kernels", "weights", "model", "device", "engine")
"""Where a value without a type would be handed from one part of the engine to another."""

UNTYPED = {
    "model.rope.cos_sin_table": "computed by torch or by NumPy, whichever is given",
    "model.rope.cos_sin_tables": "the same",
}
"""Public names whose annotations say `Any`, and why. The list shrinks."""

LOADING = {"model.load", "engine.torch_build", "engine.build", "weights.torch_pickle"}
"""Modules that may ask what something is: they make a model of it."""

ASKS_FOR_KINDS: set[str] = set()
"""Modules that still do so beyond loading. The list shrinks."""


def annotations(module: Module) -> Iterator[tuple[str, ast.expr]]:
    """What a module's public functions, fields and constants are annotated with, by qualified name."""
    pending: list[tuple[str, ast.stmt]] = [(module.name, node) for node in module.tree.body]
    while pending:
        prefix, node = pending.pop()
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            pending += [(f"{prefix}.{node.name}", inner) for inner in node.body]
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if node.name == "__init__":
                pending += [(prefix, inner) for inner in ast.walk(node) if isinstance(inner, ast.AnnAssign)]
            if node.name == "__init__" or not node.name.startswith("_"):
                given = [inner.annotation for inner in ast.walk(node.args) if isinstance(inner, ast.arg)]
                yield from ((f"{prefix}.{node.name}", each) for each in (*given, node.returns) if each is not None)
        elif isinstance(node, ast.AnnAssign):
            name = ast.unparse(node.target).removeprefix("self.")
            if not name.startswith("_"):
                yield f"{prefix}.{name}", node.annotation
        elif isinstance(node, ast.If):
            pending += [(prefix, inner) for inner in node.body]


def says_any(annotation: ast.expr) -> bool:
    """Whether there is an `Any` in it that is no value of raw JSON."""
    match annotation:
        case ast.Constant(str(text)):
            return says_any(ast.parse(text, mode="eval").body)
        case ast.Subscript(ast.Name("dict" | "Mapping"), ast.Tuple([ast.Name("str"), ast.Name("Any")])):
            return False
        case ast.Name(name) | ast.Attribute(_, name):
            return name == "Any"
    return any(says_any(inner) for inner in ast.iter_child_nodes(annotation) if isinstance(inner, ast.expr))


def test_what_crosses_a_seam_has_a_type() -> None:
    untyped = {
        name
        for module in modules().values()
        if module.part in SEAMS
        for name, annotation in annotations(module)
        if says_any(annotation)
    }
    assert sorted(untyped - UNTYPED.keys()) == []
    assert sorted(UNTYPED.keys() - untyped) == [], "these have types now: take them off the list"


def kinds_asked_for(module: Module) -> set[str]:
    """The names of classes that a module tells apart by `isinstance`, by `type(x) is`, or in patterns."""
    asked: list[ast.AST] = []
    for node in ast.walk(module.tree):
        match node:
            case ast.Call(ast.Name("isinstance" | "issubclass"), [_, kinds]):
                asked.append(kinds)
            case ast.Compare(ast.Call(ast.Name("type")), _, kinds):
                asked += kinds
            case ast.MatchClass(kind):
                asked.append(kind)
    inner = (node for kinds in asked for node in ast.walk(kinds))
    return {
        node.id if isinstance(node, ast.Name) else node.attr
        for node in inner
        if isinstance(node, ast.Name | ast.Attribute)
    }


def test_nobody_asks_what_a_part_of_a_model_is() -> None:
    parts = {
        node.name
        for module in modules().values()
        if module.part in ("model", "weights", "device")
        for node in ast.walk(module.tree)
        if isinstance(node, ast.ClassDef)
    }
    asking = {
        module.name: kinds
        for module in modules().values()
        if module.name not in LOADING and (kinds := kinds_asked_for(module) & parts)
    }
    assert {name: kinds for name, kinds in asking.items() if name not in ASKS_FOR_KINDS} == {}
    assert sorted(ASKS_FOR_KINDS - asking.keys()) == [], "these do so no longer: take them off the list"
