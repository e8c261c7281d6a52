"""What the standard library says about itself: the language reference's topics and the docstrings of its modules.

Modules are parsed, never imported, so reading them has no side effects.
"""

import ast
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Literal

# Tests, applications and tables of data: little prose, or prose that is not about the language.
_SKIPPED = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "encodings",
}
_UNDERLINE = re.compile(r"([*=\-~^\"+])\1{2,}")


@dataclass(frozen=True)
class Block:
    """One element of a document, as a page shows it. A paragraph's text has no line breaks; code keeps them."""

    kind: Literal["heading", "paragraph", "code"]
    text: str


@dataclass(frozen=True)
class Source:
    """One document. `measures` counts what the module is made of; a topic has none."""

    name: str
    blocks: tuple[Block, ...]
    measures: dict[str, int]


def markdown(blocks: tuple[Block, ...]) -> str:
    """The text of a document, and the transcript of a page: headings marked, code indented, as in a README."""
    parts = []
    for block in blocks:
        match block.kind:
            case "heading":
                parts.append(f"# {block.text}")
            case "paragraph":
                parts.append(block.text)
            case "code":
                parts.append("\n".join(f"    {line}" if line else "" for line in block.text.split("\n")))
    return "\n\n".join(parts) + "\n"


def _is_prose(text: str) -> bool:
    """Indented text is prose where it is a list item, or letters that end like a sentence."""
    text = text.strip()
    letters = sum(character.isalpha() or character.isspace() for character in text)
    return bool(re.match(r"[*-] |\d+\. ", text)) or (text[-1] in ".:?" and letters > 0.88 * len(text))


def blocks_of(text: str) -> Iterator[Block]:
    """Cut plain documentation at its blank lines: underlined lines are headings, indented ones code, the rest prose."""
    for part in re.split(r"\n\s*\n", text.expandtabs().strip("\n")):
        lines = part.split("\n")
        while len(lines) > 1 and _UNDERLINE.fullmatch(lines[1].strip()):
            yield Block("heading", lines[0].strip())
            lines = lines[2:]
        body = "\n".join(lines).strip("\n")
        if not body.strip() or _UNDERLINE.fullmatch(body.strip()):
            continue
        indent = min(len(line) - len(line.lstrip()) for line in lines if line.strip())
        if body.lstrip().startswith(">>>") or (indent >= 2 and not _is_prose(body)):
            yield Block("code", "\n".join(line[indent:].rstrip() for line in lines if line.strip()))
        else:
            yield Block("paragraph", " ".join(body.split()))


def topic_sources() -> list[Source]:
    """The chapters of the language reference that `help("with")` prints."""
    return [Source(f"topic.{name}", tuple(blocks_of(text)), {}) for name, text in sorted(topics.items())]


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    return f"def {node.name}({ast.unparse(node.args)})"


def _module_blocks(name: str, tree: ast.Module) -> Iterator[Block]:
    yield Block("heading", name)
    yield from blocks_of(ast.get_docstring(tree) or "")
    for node in tree.body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or node.name.startswith("_"):
            continue
        members = [node]
        if isinstance(node, ast.ClassDef):
            members += [m for m in node.body if isinstance(m, ast.FunctionDef) and not m.name.startswith("_")]
        for member in members:
            if doc := ast.get_docstring(member):
                is_class = isinstance(member, ast.ClassDef)
                yield Block("code", f"class {member.name}" if is_class else _signature(member))
                yield from blocks_of(doc)


def _measures(source: str, tree: ast.Module) -> dict[str, int]:
    nodes = Counter(map(type, ast.walk(tree)))
    return {
        "lines": source.count("\n"),
        "functions": nodes[ast.FunctionDef],
        "classes": nodes[ast.ClassDef],
        "imports": nodes[ast.Import] + nodes[ast.ImportFrom],
        "loops": nodes[ast.For] + nodes[ast.While],
        "returns": nodes[ast.Return],
    }


def module_files() -> list[tuple[str, Path]]:
    """(dotted name, file) of the standard library's documented modules, in the order of their names."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if parts and not _SKIPPED & set(parts) and not any(part.startswith("_") for part in parts):
            found.append((".".join(parts), path))
    return sorted(found)


def module_source(name: str, path: Path) -> Source:
    """The documentation of one module, as its own source file has it."""
    text = path.read_text(encoding="utf-8", errors="replace")
    tree = ast.parse(text)
    return Source(name, tuple(_module_blocks(name, tree)), _measures(text, tree))
