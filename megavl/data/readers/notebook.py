"""Jupyter notebooks, formats 3 and 4: markdown, code, and what it printed and drew; one file, one document.

Markdown stays as it is written. Code stands between ``` fences with its language, text output between plain ones.
Images (PNG and JPEG) stand where they were drawn, without the text that repeats them (`<Figure size 640x480>`). Error
output, tracebacks, HTML and widgets are left out, as are terminal colours. Source: nbformat's format description.
"""

import base64
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megavl.data.document import Document, Image, Segment, Text
from megavl.data.errors import DataError
from megavl.data.readers.files import read_whole
from megavl.data.readers.json_object import described, parse
from megavl.data.readers.reader import Part, ReadOptions, whole
from megavl.data.readers.record import checked_text

SUFFIXES = (".ipynb",)

_COLOURS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
# A format 3 output has its data under short names beside its type, format 4 under MIME types in "data".
_IMAGES = ("image/png", "image/jpeg", "png", "jpeg")
_TEXTS = ("text/plain", "text")


@dataclass(frozen=True)
class Cell:
    """`kind` is code, markdown, raw or heading; outputs are text and images in order. `number` is from 1."""

    number: int
    kind: str
    source: str
    outputs: tuple[str | Image, ...] = ()


@dataclass(frozen=True)
class Notebook:
    """`language` is in lower case, as the kernel names it."""

    language: str
    cells: tuple[Cell, ...]


def split(path: str, part_bytes: int) -> Iterator[Part]:
    """The file as a whole.

    Raises:
        DataError: it cannot be read.
    """
    return whole(path)


def read(part: Part, options: ReadOptions) -> Iterator[Document | DataError]:
    """The notebook's document, or the error that names it."""
    try:
        found = tuple(_segments(load(part.path, options)))
        if not found:
            raise DataError("holds neither text nor an image; leave it out")
        yield Document(Path(part.path).name, part.path, found)
    except DataError as error:
        yield DataError(f"{part.path}: {error}")


def load(path: str, options: ReadOptions) -> Notebook:
    """The cells of a notebook.

    Raises:
        DataError: the file is no notebook of format 3 or 4. The message does not name it.
    """
    value = parse(read_whole(path, options))
    match value:
        case {"nbformat": 4, "cells": list(cells)}:
            pass
        case {"nbformat": 3, "worksheets": list(sheets)} if all(isinstance(sheet, dict) for sheet in sheets):
            cells = [cell for sheet in sheets for cell in _list(sheet.get("cells", []), "cells")]
        case _:
            raise DataError(
                f"is no notebook of format 3 or 4 (nbformat {described(value.get('nbformat'))}); convert it with "
                "jupyter nbconvert --to notebook, or leave it out"
            )
    language = _language(value.get("metadata"), cells)
    return Notebook(language, tuple(_cell(cell, number) for number, cell in enumerate(cells, start=1)))


def _segments(notebook: Notebook) -> Iterator[Segment]:
    """Blocks set apart by blank lines."""
    text = ""
    for block in _blocks(notebook):
        if isinstance(block, Image):
            if text:
                yield Text(text)
            yield block
            text = "\n\n"
        else:
            text += block if not text or text == "\n\n" else f"\n\n{block}"
    if text.strip():
        yield Text(text)


def _blocks(notebook: Notebook) -> Iterator[str | Image]:
    for cell in notebook.cells:
        if source := cell.source.strip("\n"):
            yield _fenced(source, notebook.language) if cell.kind == "code" else source
        for output in cell.outputs:
            yield _fenced(output, "") if isinstance(output, str) else output


def _fenced(text: str, language: str) -> str:
    """As CommonMark has it: a fence is longer than any run of backticks in what it holds."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def _language(metadata: object, cells: list) -> str:
    match metadata:
        case {"language_info": {"name": str(name)}} | {"kernelspec": {"language": str(name)}}:
            return name.lower()
    # Format 3 names it cell by cell, and older notebooks nowhere: those are of IPython's time.
    return next(
        (
            cell["language"].lower()
            for cell in cells
            if isinstance(cell, dict) and isinstance(cell.get("language"), str)
        ),
        "python",
    )


def _cell(value: object, number: int) -> Cell:
    name = f"cell {number}"
    match value:
        case {"cell_type": "code"}:
            outputs = _list(value.get("outputs", []), name)
            found = tuple(item for output in outputs for item in _output(output, name))
            return Cell(number, "code", _text(value.get("source", value.get("input", "")), name), found)
        case {"cell_type": str(kind)}:
            return Cell(number, kind, _text(value.get("source", ""), name))
    raise DataError(f'{name} is {described(value)}, but a cell is an object with a "cell_type"; leave the notebook out')


def _output(value: object, name: str) -> Iterator[str | Image]:
    match value:
        case {"output_type": "stream", "name": "stderr"} | {"output_type": "stream", "stream": "stderr"}:
            return
        case {"output_type": "display_data" | "execute_result", "data": dict(data)}:
            pass
        case {"output_type": "stream" | "display_data" | "pyout"}:
            data = value
        case _:
            return
    if kind := next((kind for kind in _IMAGES if kind in data), None):
        yield _image(_text(data[kind], name), name)
    elif kind := next((kind for kind in _TEXTS if kind in data), None):
        text = _COLOURS.sub("", _text(data[kind], name)).strip("\n")
        if text.strip():
            yield text


def _image(text: str, name: str) -> Image:
    try:
        return Image(base64.b64decode(re.sub(r"\s", "", text), validate=True), f"output of {name}")
    except ValueError as error:  # binascii.Error, or characters beyond ASCII
        raise DataError(f"{name}: an image of its output is not base64 ({error}); leave the notebook out") from error


def _text(value: object, name: str) -> str:
    """A multi-line string, which notebooks store as one string or as a list of lines."""
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        value = "".join(value)
    if not isinstance(value, str):
        raise DataError(f"{name} has {described(value)} where text belongs; leave the notebook out")
    return checked_text(value, name).replace("\r\n", "\n")


def _list(value: object, name: str) -> list:
    if not isinstance(value, list):
        raise DataError(f"{name}: {described(value)} where a list belongs; leave the notebook out")
    return value
