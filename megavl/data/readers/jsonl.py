"""JSON lines of text and of interleaved documents.

A record is `{"text": "..."}` or `{"segments": [{"text": "..."}, {"image": "relative/path.png"}, ...]}`, each with an
optional `"id"`; image paths are relative to the file. Other keys of a record are metadata and are not read.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megavl.data.document import Document, Image, Text
from megavl.data.errors import DataError


@dataclass(frozen=True)
class Record:
    """One line, not yet parsed: reading lines is cheap and stays in one process, parsing is spread over many."""

    path: str
    line: int
    data: bytes

    @property
    def where(self) -> str:
        """`file:line`, as compilers print it."""
        return f"{self.path}:{self.line}"


def records(path: str) -> Iterator[Record]:
    """The lines of a file that are not blank, in order.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        with open(path, "rb") as lines:
            for number, data in enumerate(lines, start=1):
                if data.strip():
                    yield Record(path, number, data)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check --input") from error


def has_image(record: Record) -> bool:
    """Whether the record holds an image segment. A malformed record holds none: `parse` is what complains."""
    if b'"image"' not in record.data:
        return False
    try:
        segments = json.loads(record.data)["segments"]
        return any("image" in segment for segment in segments)
    except (ValueError, LookupError, TypeError):
        return False


def parse(record: Record) -> Document:
    """The document of a record, images read from their files.

    Raises:
        DataError: the record is malformed or an image file cannot be read; the message starts with `file:line`.
    """
    value = _decode(record)
    key = value.get("id", f"{Path(record.path).name}:{record.line}")
    if not isinstance(key, str | int) or isinstance(key, bool):
        raise DataError(f'{record.where}: "id" is {_name(key)}; give a string or an integer, or leave it out')
    match "text" in value, "segments" in value:
        case True, False:
            segments: tuple[Text | Image, ...] = (Text(_text(record, value["text"], '"text"')),)
        case False, True:
            segments = _segments(record, value["segments"])
        case True, True:
            raise DataError(f'{record.where}: has both "text" and "segments"; a record has one of them')
        case _:
            keys = ", ".join(map(repr, value)) or "none"
            raise DataError(
                f'{record.where}: has neither "text" nor "segments" (its keys: {keys}); write {{"text": "..."}} '
                'or {"segments": [{"text": "..."}, {"image": "path"}]}'
            )
    return Document(str(key), record.path, segments)


def _decode(record: Record) -> dict:
    try:
        value = json.loads(record.data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(
            f"{record.where}: is not UTF-8 (byte {record.data[error.start]:#04x} at offset {error.start} of the line); "
            "convert the file, for example with iconv"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{record.where}: is not JSON ({error}); every line must be one JSON object") from error
    if not isinstance(value, dict):
        raise DataError(f"{record.where}: is {_name(value)}, not an object; every line must be one JSON object")
    return value


def _segments(record: Record, value: object) -> tuple[Text | Image, ...]:
    if not isinstance(value, list):
        raise DataError(f'{record.where}: "segments" is {_name(value)}; give a list with at least one segment')
    if not value:
        raise DataError(f'{record.where}: "segments" is empty; give at least one segment, or remove the line')
    return tuple(_segment(record, segment, f"segment {index}") for index, segment in enumerate(value))


def _segment(record: Record, value: object, name: str) -> Text | Image:
    match value:
        case {"text": text, **rest} if not rest:
            return Text(_text(record, text, name))
        case {"image": str(path), **rest} if path and not rest:
            return Image(_file(record, path, name), path)
    raise DataError(
        f'{record.where}: {name} is {json.dumps(value)[:120]}; a segment is {{"text": "..."}} or {{"image": "path"}}'
    )


def _text(record: Record, value: object, name: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{record.where}: {name} is {_name(value)}; it must be a string")
    if not value:
        raise DataError(f"{record.where}: {name} is empty; remove it, there is nothing to learn from it")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{record.where}: {name} holds half of a surrogate pair ({value[error.start]!r} at character "
            f"{error.start}), which is no character; write the text as valid Unicode"
        ) from error
    return value


def _file(record: Record, path: str, name: str) -> bytes:
    full = Path(record.path).parent / path
    try:
        return full.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(
            f"{record.where}: {name}: image {full} cannot be read ({reason}); image paths are relative to "
            "the directory of the .jsonl file"
        ) from error


def _name(value: object) -> str:
    names = {dict: "an object", list: "a list", bool: "a boolean", type(None): "null", str: "a string"}
    name = names.get(type(value), "a number")
    return f"{name} ({json.dumps(value)[:60]})"
