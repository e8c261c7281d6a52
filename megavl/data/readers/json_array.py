"""One JSON array of records in a file, as LLaVA's data is shipped. A record's number is its place, from 1.

The array is never held as a whole: a window of text moves over the file, as wide as the record in it.
"""

import codecs
import json
import os
import re
from collections.abc import Iterator
from functools import partial
from typing import Any, BinaryIO

from megavl.data.document import Document
from megavl.data.errors import DataError
from megavl.data.readers import json_object
from megavl.data.readers.files import open_input, read_image
from megavl.data.readers.reader import Part, ReadOptions, too_large, whole
from megavl.data.readers.record import Place, Record, to_document
from megavl.data.template import TEMPLATES

SUFFIXES = (".json", ".json.gz", ".json.zst")

_BLOCK_BYTES = 1 << 18
_SPACE = re.compile(r"[ \t\r\n]*")


def split(path: str, part_bytes: int) -> Iterator[Part]:
    """The file as a whole: where a record begins is not known without reading all before it.

    Raises:
        DataError: the file cannot be read.
    """
    return whole(path)


def read(part: Part, options: ReadOptions) -> Iterator[Document | DataError]:
    """Documents of the array's objects; for a malformed one the error that names it.

    Raises:
        DataError: the file is no JSON array, or is not JSON from some record on, or its compression is damaged.
    """
    image = partial(read_image, os.path.dirname(part.path), max_bytes=options.max_record_bytes)
    template = TEMPLATES[options.template]
    number = 1
    try:
        with open_input(part.path) as file:
            for value in _elements(_Window(file), options):
                place = Place(part.path, number)
                try:
                    if isinstance(value, DataError):
                        raise value
                    yield to_document(Record(json_object.checked(value), image, template), place)
                except DataError as error:
                    yield place.refuse(error)
                number += 1
    except (_Malformed, OSError) as error:
        raise DataError(f"{part.path}:{number}: the file cannot be read further: {error}; make it again") from error


class _Malformed(Exception):
    """The text is not a JSON array, so that no further record can be found."""


class _Window:
    """The characters of a file from where its reader stands. A byte that is not UTF-8 becomes a surrogate."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
        self.text = ""
        self.start = 0

    def grow(self) -> bool:
        """Read on, at least as much as is there, so that a record is tried few times; whether there was more."""
        left = self.text[self.start :]
        block = self._file.read(max(_BLOCK_BYTES, len(left)))
        self.text, self.start = left + self._decoder.decode(block, final=not block), 0
        return bool(block)

    def next(self) -> str:
        """The next character that is not white space, where the window then begins; empty at the end of the file."""
        while True:
            self.start = _SPACE.match(self.text, self.start).end()
            if self.start < len(self.text):
                return self.text[self.start]
            if not self.grow():
                return ""


def _elements(window: _Window, options: ReadOptions) -> Iterator[Any]:
    """Values of the array; a DataError in the place of one that cannot be one record, but ends where it should."""
    if window.next() != "[":
        raise _Malformed("it does not begin with [ (a .json file is one array of records; one per line is .jsonl)")
    window.start += 1
    delimiter = window.next()
    while delimiter != "]":
        yield _element(window, options)
        delimiter = window.next()
        if delimiter not in (",", "]"):
            raise _Malformed(f"{delimiter or 'the end of the file'} is where , or ] belongs")
        if delimiter == ",":
            window.start += 1
    window.start += 1
    if window.next():
        raise _Malformed("it goes on behind the array")


def _element(window: _Window, options: ReadOptions) -> Any:
    window.next()
    while True:
        try:
            value, end = json_object.parse_next(window.text, window.start)
            reason = "it ends without ]"
            # A number is known to be whole by what is behind it.
            if end < len(window.text):
                break
        except json.JSONDecodeError as error:
            reason = f"{error.msg} at character {error.pos - window.start} of the record"
        except (ValueError, RecursionError) as error:
            raise _Malformed(str(error)) from error
        if len(window.text) - window.start > options.max_record_bytes:
            raise _Malformed(f"no JSON value ends within --max-record-bytes {options.max_record_bytes:,} ({reason})")
        if not window.grow():
            raise _Malformed(reason)
    source, window.start = window.text[window.start : end], end
    if len(source) > options.max_record_bytes:
        return too_large(options)
    try:
        source.encode("utf-8")
    except UnicodeEncodeError as error:
        byte = ord(source[error.start]) & 0xFF
        return DataError(f"is not UTF-8 (byte {byte:#04x} at character {error.start} of the record); convert the file")
    return value
