"""The .idx file, byte for byte Megatron's: the sequences of a .bin file, where they are, and where documents end."""

import contextlib
import hashlib
import os
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from megavl.data.errors import DataError
from megavl.data.format import IMAGE, TEXT

_MAGIC = b"MMIDIDX\x00\x00"
_LEGACY_MAGIC = b"TNTIDX\x00\x00"
_VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
# uint8, ..., uint16 by the codes of the format; 6 and 7 are floating point, which no token is.
_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_COLUMNS = {"lengths": "<i4", "pointers": "<i8", "documents": "<i8", "modes": "i1"}
_CODES = {np.dtype(name): code for code, name in _DTYPES.items()}
# Entries of a column that are in memory at a time.
_BLOCK = 1 << 16


class IndexWriter:
    """Collects the columns of an index; a context manager.

    They are in unnamed files beside the output: memory does not grow with the dataset, and nothing is left of them when
    the process ends, however it ends.
    """

    def __init__(self, directory: Path) -> None:
        """Nothing is written before the `with` block is entered."""
        self._directory, self._open = directory, contextlib.ExitStack()
        self.sequences = self.documents = self.tokens = self.images = 0

    def append(self, lengths: np.ndarray, modes: np.ndarray, ends: np.ndarray) -> None:
        """The sequences of some documents.

        Args:
            lengths: int32 [n] elements of each sequence.
            modes: int8 [n].
            ends: int64 [d]; document k ends before the sequence ends[k], counted from the first of this call.
        """
        self._lengths.write(lengths.astype("<i4"))
        self._modes.write(modes.astype("i1"))
        self._ends.write((ends + self.sequences).astype("<i8"))
        self.sequences += len(lengths)
        self.documents += len(ends)
        self.images += int((modes == IMAGE).sum())
        self.tokens += int(lengths[modes != IMAGE].sum())

    def write(self, path: str, dtype: np.dtype, multimodal: bool) -> str:
        """Write the index file.

        Args:
            dtype: of the elements of the .bin file.
            multimodal: whether it has the modes of the sequences.

        Returns:
            sha256 of the file.
        """
        digest = hashlib.sha256()
        with open(path, "wb") as file:
            for block in self._content(dtype, multimodal):
                digest.update(block)
                file.write(block)
        return digest.hexdigest()

    def __enter__(self) -> "IndexWriter":
        self._lengths = self._open.enter_context(tempfile.TemporaryFile(dir=self._directory))
        self._modes = self._open.enter_context(tempfile.TemporaryFile(dir=self._directory))
        self._ends = self._open.enter_context(tempfile.TemporaryFile(dir=self._directory))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._open.close()

    def _content(self, dtype: np.dtype, multimodal: bool) -> Iterator[bytes | np.ndarray]:
        yield _HEADER.pack(_MAGIC, _VERSION, _CODES[dtype], self.sequences, self.documents + 1)
        yield from _blocks(self._lengths, "<i4")
        place = 0
        for lengths in _blocks(self._lengths, "<i4"):
            ends = place + np.cumsum(lengths, dtype="<i8") * dtype.itemsize
            yield np.concatenate(([place], ends[:-1]))
            place = int(ends[-1])
        yield np.zeros(1, dtype="<i8")
        yield from _blocks(self._ends, "<i8")
        if multimodal:
            yield from _blocks(self._modes, "i1")


class Index:
    """Reads an index through memory maps.

    dtype:      elements of the .bin file
    multimodal: whether the file has modes
    lengths:    int32 [N] elements of each sequence
    pointers:   int64 [N] place of each sequence in the .bin file, in bytes
    documents:  int64 [D + 1]; document k is the sequences documents[k] to documents[k + 1]
    modes:      int8 [N], TEXT, IMAGE or PROMPT
    bin_bytes:  size of the .bin file, by its last sequence
    """

    def __init__(self, path: str) -> None:
        """Look at what costs no reading of the columns: the header, the size and both ends of the documents.

        Raises:
            DataError: it is no index, or cut off, or of a version or an element type that this reader does not know.
        """
        self.path = path
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            header = file.read(_HEADER.size)
        if header.startswith(_LEGACY_MAGIC):
            raise DataError(
                f"{path} has the legacy format of Megatron's lazy and cached datasets (magic TNTIDX); "
                "make the dataset again with tools/preprocess_data.py"
            )
        if len(header) < _HEADER.size or not header.startswith(_MAGIC):
            raise DataError(f"{path} is not the index of an indexed dataset: it starts with {header[:9]!r}")
        _, version, code, sequences, entries = _HEADER.unpack(header)
        if version != _VERSION:
            raise DataError(f"{path} has version {version} of the index format; this reader knows version {_VERSION}")
        if code not in _DTYPES:
            raise DataError(f"{path} holds elements of dtype code {code}; tokens have one of {sorted(_DTYPES)}")
        if sequences == 0 or entries < 2:
            raise DataError(f"{path} describes an empty dataset; remove it from the sources or make it again")
        text_size = _HEADER.size + 12 * sequences + 8 * entries
        if size not in (text_size, text_size + sequences):
            raise DataError(
                f"{path} has {size} bytes, but {sequences} sequences and {entries} document indices take "
                f"{text_size} (text) or {text_size + sequences} (multimodal); it was cut off; copy or make it again"
            )
        self.dtype, self.multimodal = np.dtype(_DTYPES[code]), size > text_size
        offsets = np.cumsum([_HEADER.size, 4 * sequences, 8 * sequences, 8 * entries]).tolist()
        self._offsets = dict(zip(_COLUMNS, offsets, strict=True))
        self.lengths, self.pointers = self._map("lengths", sequences), self._map("pointers", sequences)
        self.documents = self._map("documents", entries)
        # A text index has no modes: a view of one zero, read as often as there are sequences.
        zeros = np.broadcast_to(np.int8(TEXT), (sequences,))
        self.modes = self._map("modes", sequences) if self.multimodal else zeros
        self.bin_bytes = int(self.pointers[-1]) + int(self.lengths[-1]) * self.dtype.itemsize
        if self.documents[0] != 0 or self.documents[-1] != sequences:
            raise DataError(
                f"{path}: its documents cover the sequences {self.documents[0]} to {self.documents[-1]}, not 0 to "
                f"{sequences}; the writer did not end its last document; make the dataset again"
            )

    def place(self, sequence: int) -> tuple[int, int]:
        """(first byte in the .bin file, elements) of a sequence.

        Raises:
            DataError: it does not end where the next one begins.
        """
        first, length = int(self.pointers[sequence]), int(self.lengths[sequence])
        is_last = sequence == len(self.lengths) - 1
        stop = self.bin_bytes if is_last else int(self.pointers[sequence + 1])
        if not 0 <= first < stop <= self.bin_bytes or first + length * self.dtype.itemsize != stop:
            raise DataError(
                f"{self.path}: sequence {sequence} is {length} elements from byte {first}, but it ends at byte {stop} "
                f"of {self.bin_bytes}; {_DAMAGED}"
            )
        return first, length

    def spans(self, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First sequences of some documents and those behind their last: int64 [d] each.

        Raises:
            DataError: a document has no sequence, or sequences that are not there.
        """
        first, stop = self.documents[documents], self.documents[documents + 1]
        for document in documents[(first < 0) | (first >= stop) | (stop > len(self.lengths))]:
            self.span(int(document))  # says what is wrong with the first one
        return first, stop

    def span(self, document: int) -> tuple[int, int]:
        """The same of one document, some twenty times as fast."""
        first, stop = int(self.documents[document]), int(self.documents[document + 1])
        if not 0 <= first < stop <= len(self.lengths):
            raise DataError(
                f"{self.path}: document {document} is the sequences {first} to {stop} of {len(self.lengths)}; "
                f"{_DAMAGED}"
            )
        return first, stop

    def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(lengths, modes, ends) of some documents at a time, as `IndexWriter.append` takes them."""
        # Read and not mapped: the pages of a map would stay in memory.
        for first in range(0, len(self.documents) - 1, _BLOCK):
            borders = self._read("documents", first, min(first + _BLOCK + 1, len(self.documents)))
            start, stop = int(borders[0]), int(borders[-1])
            modes = self._read("modes", start, stop) if self.multimodal else self.modes[start:stop]
            yield self._read("lengths", start, stop), modes, borders[1:] - start

    def _map(self, column: str, size: int) -> np.ndarray:
        # An ordinary array on the map: np.memmap itself is slow to take elements from.
        return np.memmap(self.path, _COLUMNS[column], "r", self._offsets[column], (size,)).view(np.ndarray)

    def _read(self, column: str, first: int, stop: int) -> np.ndarray:
        dtype = np.dtype(_COLUMNS[column])
        return np.fromfile(self.path, dtype, stop - first, offset=self._offsets[column] + first * dtype.itemsize)


_DAMAGED = "the index is damaged; copy or make it again"


def _blocks(file: BinaryIO, dtype: str) -> Iterator[np.ndarray]:
    file.seek(0)
    while len(block := np.frombuffer(file.read(_BLOCK * np.dtype(dtype).itemsize), dtype)):
        yield block
