"""The rules of the house, as functions of a source tree. Each returns its violations, one readable line apiece.

Imports are read from the syntax tree, so an import inside a function counts like one at the top of a file.
"""

import ast
import graphlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Which rooms a room may import besides itself. A dotted entry admits one module of a room.
MAY_IMPORT = {
    "batch": {"config"},
    "config": set(),
    "parallel": set(),
    "ops": set(),
    "model": {"config", "parallel", "ops", "batch"},
    "data": {"config", "batch"},
    "plan": {"config", "parallel.topology"},
    "checkpoint": {"config", "parallel"},
    "evaluate": {"model", "data", "config", "batch"},
    "runtime": {"model", "data", "plan", "checkpoint", "config", "parallel", "ops", "batch"},
    "rehearsal": {"runtime", "model", "plan", "config", "parallel", "ops", "batch"},
}
FORBIDDEN_NAMES = {"utils", "util", "helpers", "misc"}
ENVIRONMENT_READER = Path("megavl/runtime/env.py")
DEEPSPEED_ROOM = Path("megavl/runtime/deepspeed")
# It compares megavl with transformers under DeepSpeed alone.
DEEPSPEED_PEER = Path("tools/benchmarks/trainers.py")


@dataclass(frozen=True)
class Import:
    """`importer` is a path from the root of the tree; `module` is absolute and dotted."""

    importer: Path
    line: int
    module: str

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.module}"


def sources(root: Path, *folders: str) -> Iterator[tuple[Path, ast.Module]]:
    """(path from the root, syntax tree) of every Python file in the folders."""
    for folder in folders:
        for path in sorted((root / folder).rglob("*.py")):
            yield path.relative_to(root), ast.parse(path.read_text(encoding="utf-8"), str(path))


def module_name(path: Path) -> str:
    """megavl/config/run.py -> megavl.config.run; a package is its folder."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(root: Path, path: Path, tree: ast.Module) -> Iterator[Import]:
    """Every import in a file: statements at any depth, relative ones, and import_module("...")."""
    for node in ast.walk(tree):
        match node:
            case ast.Import():
                found = [alias.name for alias in node.names]
            case ast.ImportFrom():
                base = node.module or ""
                if node.level:
                    # A file's package is its folder, also for __init__.py.
                    package = path.parent.parts[: len(path.parent.parts) - node.level + 1]
                    base = ".".join([*package, *filter(None, [node.module])])
                names = [f"{base}.{alias.name}" for alias in node.names]
                found = [name if _exists(root, name) else base for name in names]
            case ast.Call(func=ast.Name(id="__import__" | "import_module"), args=[ast.Constant(value=str(name)), *_]):
                found = [name]
            case ast.Call(func=ast.Attribute(attr="import_module"), args=[ast.Constant(value=str(name)), *_]):
                found = [name]
            case _:
                continue
        yield from (Import(path, node.lineno, name) for name in dict.fromkeys(found))


def _exists(root: Path, module: str) -> bool:
    path = root.joinpath(*module.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def _all_imports(root: Path, *folders: str) -> Iterator[Import]:
    for path, tree in sources(root, *folders):
        yield from imports(root, path, tree)


def wrong_direction(root: Path) -> list[str]:
    """Imports that go up a floor, or across it."""
    found = []
    for edge in _all_imports(root, "megavl"):
        parts = edge.importer.with_suffix("").parts
        if not edge.module.startswith("megavl.") or parts[1] == "__init__":
            continue
        room, target = parts[1], edge.module.removeprefix("megavl.")
        if room not in MAY_IMPORT:
            found.append(
                f"{edge.importer}: {room} is not a room of the house; give it its floor in {Path(__file__).name}"
            )
            continue
        admitted = {room} | MAY_IMPORT[room]
        if not any(target == name or target.startswith(f"{name}.") for name in admitted):
            found.append(f"{edge}; {room} may import {', '.join(sorted(MAY_IMPORT[room])) or 'no other room'}")
    return found


def doors_imported(root: Path) -> list[str]:
    """Imports of launch/ or tools/ from the package: a door is used by people, not by rooms."""
    return [str(edge) for edge in _all_imports(root, "megavl") if edge.module.split(".")[0] in ("launch", "tools")]


def cycles(root: Path) -> list[str]:
    """Modules that import each other, directly or through others."""
    graph: dict[str, set[str]] = {}
    for edge in _all_imports(root, "megavl"):
        importer = module_name(edge.importer)
        if edge.module.startswith("megavl") and edge.module != importer:
            graph.setdefault(importer, set()).add(edge.module)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return [" -> ".join(error.args[1])]
    return []


def deepspeed_elsewhere(root: Path) -> list[str]:
    """Imports of deepspeed outside its room."""
    return [
        str(edge)
        for edge in _all_imports(root, "megavl", "launch", "tools")
        if edge.module.split(".")[0] == "deepspeed"
        and not (edge.importer.is_relative_to(DEEPSPEED_ROOM) or edge.importer == DEEPSPEED_PEER)
    ]


def private_writes_elsewhere(root: Path) -> list[str]:
    """Assignments to a private attribute of an object other than `self`, or to an item of one, outside DeepSpeed's
    room. Such a write depends on the inside of a library, or of another class of ours."""
    found = []
    for path, tree in sources(root, "megavl", "launch", "tools"):
        if path.is_relative_to(DEEPSPEED_ROOM):
            continue
        for node in ast.walk(tree):
            match node:
                case ast.Assign(targets=targets):
                    pass
                case ast.AugAssign(target=target) | ast.AnnAssign(target=target):
                    targets = [target]
                case _:
                    continue
            for target in targets:
                attribute = target.value if isinstance(target, ast.Subscript) else target
                match attribute:
                    case ast.Attribute(value=ast.Name(id="self" | "cls")) if attribute is target:
                        continue
                    case ast.Attribute(attr=name) if is_private(name) and name not in _own_private(tree):
                        found.append(f"{path}:{node.lineno} writes {ast.unparse(attribute)}")
    return found


def is_private(name: str) -> bool:
    """Whether a name is private; those with two underscores are Python's own."""
    return name.startswith("_") and not name.startswith("__")


def _own_private(tree: ast.Module) -> set[str]:
    """Private attributes that the classes of a file assign to `self`."""
    return {
        target.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign | ast.AnnAssign)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == "self"
    }


def environment_read_elsewhere(root: Path) -> list[str]:
    """Uses of the process environment outside the one file that reads it."""
    found = []
    for path, tree in sources(root, "megavl", "launch", "tools"):
        for node in ast.walk(tree):
            match node:
                case ast.Attribute(value=ast.Name(id="os"), attr="environ" | "environb" | "getenv" | "putenv" as name):
                    used = f"os.{name}"
                case ast.ImportFrom(module="os", names=names) if any("env" in alias.name for alias in names):
                    used = "names of os"
                case _:
                    continue
            if path != ENVIRONMENT_READER:
                found.append(f"{path}:{node.lineno} uses {used}; the environment is read in {ENVIRONMENT_READER} only")
    return found


def ambient_state(root: Path) -> list[str]:
    """`global` statements: state that no caller passes."""
    return [
        f"{path}:{node.lineno} global {', '.join(node.names)}"
        for path, tree in sources(root, "megavl", "launch", "tools")
        for node in ast.walk(tree)
        if isinstance(node, ast.Global)
    ]


def empty_names(root: Path) -> list[str]:
    """Files and folders whose name says nothing of what is in them."""
    return [
        str(path)
        for path, _ in sources(root, "megavl", "launch", "tools", "tests")
        if FORBIDDEN_NAMES & set(path.with_suffix("").parts)
    ]


RULES = (
    wrong_direction,
    doors_imported,
    cycles,
    deepspeed_elsewhere,
    private_writes_elsewhere,
    environment_read_elsewhere,
    ambient_state,
    empty_names,
)
