"""What a reader of an input format is."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from megavl.data.document import Document
from megavl.data.errors import DataError


@dataclass(frozen=True)
class Part:
    """A range of one input file that a worker process reads by itself; a few numbers, however much they stand for.

    start, stop: in the format's own unit (bytes of a line format, row groups of a table, 0 and 1 of a whole file)
    first:       number of the range's first record in the file, from 1, by which errors and keys name it
    size_bytes:  of the input, for progress
    """

    path: str
    start: int
    stop: int
    first: int
    size_bytes: int


@dataclass(frozen=True)
class ReadOptions:
    """What the command line says of reading, the same for every format.

    template:         how conversations are written, a name of `megavl.data.template.TEMPLATES` (`--template`)
    max_record_bytes: a record or an image above this is refused before it is held in memory (`--max-record-bytes`)
    """

    template: str = "vl"
    max_record_bytes: int = 256 << 20


class Reader(Protocol):
    """One input format. A module of this package is one; `megavl.data.readers.registry` knows them by suffix."""

    SUFFIXES: tuple[str, ...]

    def split(self, path: str, part_bytes: int) -> Iterator[Part]:
        """Parts of a file in order, each about `part_bytes` long where the format can be cut. They depend on the file
        and on `part_bytes` alone.

        Raises:
            DataError: the file cannot be read or is of another format.
        """
        ...

    def read(self, part: Part, options: ReadOptions) -> Iterator[Document | DataError]:
        """Documents of a part in order, holding a few records in memory at a time; for a malformed record the error
        that names it (`file:record: ...`), after which the rest of the part goes on.

        Raises:
            DataError: the part cannot be read any further.
        """
        ...


def whole(path: str) -> Iterator[Part]:
    """The one part of a file whose format cannot be cut.

    Raises:
        DataError: the file cannot be read, or is empty, which no file of such a format is.
    """
    size_bytes = file_size(path)
    if not size_bytes:
        raise DataError(f"{path}: is empty, as a copy that failed leaves it; make it again, or remove it")
    yield Part(path, start=0, stop=1, first=1, size_bytes=size_bytes)


def file_size(path: str) -> int:
    """Bytes of an input file.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        return os.stat(path).st_size
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check --input") from error


def too_large(options: ReadOptions) -> DataError:
    """The reason to refuse a record or an image that is above the limit."""
    return DataError(f"is larger than --max-record-bytes {options.max_record_bytes:,}; remove it, or raise the limit")
