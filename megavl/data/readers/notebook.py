"""Jupyter notebooks, formats 3 and 4: markdown, code, and what it printed and drew; one file, one document.

Markdown stays as it is written. Code stands between ``` fences with its language, text output between plain ones.
Images (PNG and JPEG) stand where they were drawn, without the text that repeats them (`<Figure size 640x480>`). Error
output, tracebacks, HTML and widgets are left out, as are terminal colours. Source: nbformat's format description.
"""

import base64
import binascii
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megavl.data.document import Document, Image, Segment, Text
from megavl.data.errors import DataError
from megavl.data.readers.reader import Part

SUFFIXES = (".ipynb",)

# A notebook is one record, which is in memory as a whole.
MAX_BYTES = 256 << 20

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
    """The notebook as a whole."""
    try:
        size = Path(path).stat().st_size
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check --input") from error
    yield Part(path, 0, 1, 1, size)


def read(part: Part) -> Iterator[Document | DataError]:
    """The notebook's document, or the error that names it."""
    try:
        found = tuple(_segments(load(part.path)))
        if not found:
            raise DataError(f"{part.path}: holds neither text nor an image; leave it out")
        yield Document(Path(part.path).name, part.path, found)
    except DataError as error:
        yield error


def load(path: str) -> Notebook:
    """The cells of a notebook.

    Raises:
        DataError: the file cannot be read, or is no notebook of format 3 or 4. The message starts with the path, and
            with the cell's number where there is one.
    """
    value = _json(path)
    match value:
        case {"nbformat": 4, "cells": list(cells)}:
            pass
        case {"nbformat": 3, "worksheets": list(sheets)} if all(isinstance(sheet, dict) for sheet in sheets):
            cells = [cell for sheet in sheets for cell in _list(sheet.get("cells", []), path)]
        case _:
            raise DataError(
                f"{path}: is no notebook of format 3 or 4 (nbformat {str(value.get('nbformat'))[:20]}); convert it "
                "with jupyter nbconvert --to notebook, or leave it out"
            )
    metadata = value.get("metadata")
    return Notebook(_language(metadata, cells), tuple(_cell(cell, n, path) for n, cell in enumerate(cells, start=1)))


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


def _json(path: str) -> dict:
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check --input") from error
    if len(data) > MAX_BYTES:
        raise DataError(
            f"{path}: has more than the {MAX_BYTES:,} bytes that a notebook may have, as it is held in memory; "
            "leave it out"
        )
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise DataError(f"{path}: is not JSON in UTF-8 ({error}); leave it out") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: is JSON, but no notebook, which is an object; leave it out")
    return value


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


def _cell(value: object, number: int, path: str) -> Cell:
    where = f"{path}:{number}"
    match value:
        case {"cell_type": "code"}:
            outputs = _list(value.get("outputs", []), where)
            found = tuple(item for output in outputs for item in _output(output, where))
            return Cell(number, "code", _text(value.get("source", value.get("input", "")), where), found)
        case {"cell_type": str(kind)}:
            return Cell(number, kind, _text(value.get("source", ""), where))
    raise DataError(f'{where}: is no cell, which is an object with a "cell_type"; repair the notebook or leave it out')


def _output(value: object, where: str) -> Iterator[str | Image]:
    match value:
        case {"output_type": "stream", "name": "stderr"} | {"output_type": "stream", "stream": "stderr"}:
            return
        case {"output_type": "stream"}:
            data = value
        case {"output_type": "display_data" | "execute_result", "data": dict(data)}:
            pass
        case {"output_type": "display_data" | "pyout"}:
            data = value
        case _:
            return
    if kind := next((kind for kind in _IMAGES if kind in data), None):
        yield _image(_text(data[kind], where), where)
    elif kind := next((kind for kind in _TEXTS if kind in data), None):
        text = _COLOURS.sub("", _text(data[kind], where)).strip("\n")
        if text.strip():
            yield text


def _image(text: str, where: str) -> Image:
    try:
        return Image(base64.b64decode(re.sub(r"\s", "", text), validate=True), f"output of cell {where}")
    except (binascii.Error, ValueError) as error:
        raise DataError(
            f"{where}: an image of its output is not base64 ({error}); repair or leave out the notebook"
        ) from error


def _text(value: object, where: str) -> str:
    """A multi-line string, which notebooks store as one string or as a list of lines."""
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        value = "".join(value)
    if not isinstance(value, str):
        raise DataError(f"{where}: holds {str(value)[:60]!r} where text belongs; repair the notebook or leave it out")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: holds half of a surrogate pair at character {error.start}, which is no character; leave it out"
        ) from error
    return value.replace("\r\n", "\n")


def _list(value: object, where: str) -> list:
    if not isinstance(value, list):
        raise DataError(f"{where}: holds {str(value)[:60]!r} where a list belongs; repair the notebook or leave it out")
    return value
