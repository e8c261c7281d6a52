"""JSON lines: one object per line, also compressed. Blank lines are skipped; a record's number is that of its line."""

import math
import os
from collections.abc import Iterator
from functools import partial

from megavl.data.document import Document
from megavl.data.errors import DataError
from megavl.data.readers import json_object
from megavl.data.readers.files import compression, open_input, read_image
from megavl.data.readers.reader import Part, ReadOptions, too_large, whole
from megavl.data.readers.record import Place, Record, to_document
from megavl.data.template import TEMPLATES

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")

_BLOCK_BYTES = 1 << 20


def split(path: str, part_bytes: int) -> Iterator[Part]:
    """Ranges of bytes that end where a line does; a compressed file is one part. Reads the file once, to count lines.

    Raises:
        DataError: the file cannot be read.
    """
    if compression(path):
        yield from whole(path)
        return
    with open_input(path) as file:
        start, first = 0, 1
        while True:
            lines, block = 0, b"\n"
            while (left := start + part_bytes - file.tell()) > 0 and (read := file.read(min(left, _BLOCK_BYTES))):
                block = read
                lines += block.count(b"\n")
            while not block.endswith(b"\n") and (block := file.readline(_BLOCK_BYTES)):
                lines += block.count(b"\n")
            if (stop := file.tell()) == start:
                return
            yield Part(path, start, stop, first, size_bytes=stop - start)
            start, first = stop, first + lines


def read(part: Part, options: ReadOptions) -> Iterator[Document | DataError]:
    """Documents of the part's lines; for a malformed line the error that names it.

    Raises:
        DataError: the file cannot be read, or its compression is damaged.
    """
    image = partial(read_image, os.path.dirname(part.path), max_bytes=options.max_record_bytes)
    template = TEMPLATES[options.template]
    for number, line in _lines(part, options.max_record_bytes):
        place = Place(part.path, number)
        try:
            if len(line) > options.max_record_bytes:
                raise too_large(options)
            yield to_document(Record(json_object.parse(line), image, template), place)
        except DataError as error:
            yield place.refuse(error)


def _lines(part: Part, max_bytes: int) -> Iterator[tuple[int, bytes]]:
    """(number, line) of the part's lines that are not blank. A line above `max_bytes` is cut a byte behind them: the
    rest is passed over without being held."""
    number = part.first
    with open_input(part.path) as file:
        left = math.inf if compression(part.path) else part.stop - file.seek(part.start)
        try:
            while left > 0 and (line := file.readline(max_bytes + 1)):
                left -= len(line)
                is_cut = len(line) > max_bytes and not line.endswith(b"\n")
                end = line
                while not end.endswith(b"\n") and (end := file.readline(_BLOCK_BYTES)):
                    left -= len(end)
                if text := line if is_cut else line.strip():
                    yield number, text
                number += 1
        except OSError as error:
            raise DataError(
                f"{part.path}:{number}: the file cannot be read further ({error}); make it again"
            ) from error
