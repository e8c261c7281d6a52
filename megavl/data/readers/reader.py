"""What a reader of an input format is."""

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

    def read(self, part: Part) -> Iterator[Document | DataError]:
        """Documents of a part in order, holding one record in memory at a time; for a malformed record the error that
        names it, after which the rest of the part goes on.

        Raises:
            DataError: the part cannot be read any further.
        """
        ...
