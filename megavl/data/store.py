"""Reads a dataset: `<prefix>.bin`, `<prefix>.idx` and `<prefix>.meta`."""

import os
import struct
import weakref
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from megavl.config.files import DATASET_SUFFIXES
from megavl.data.checksum import Checksum
from megavl.data.errors import DataError
from megavl.data.format import dataset_paths, token_dtype
from megavl.data.index import Index
from megavl.data.meta import MetaReader


class Store:
    """A dataset on disk; picklable, so that a worker process opens its own.

    multimodal: whether it holds an image or a prompt
    dtype:      elements of the .bin file
    meta:       what the .meta file says of it (`Meta`)
    lengths:    int32 [N] elements of each sequence
    pointers:   int64 [N] place of each sequence in the .bin file, in bytes
    modes:      int8 [N], TEXT, IMAGE or PROMPT, of each sequence
    documents:  int64 [D + 1]; document k is the sequences documents[k] to documents[k + 1]

    The arrays are maps of the file as it is. What is read through a method is checked: damage is a DataError.
    """

    def __init__(self, prefix: str) -> None:
        """Open the files and compare them with one another; nothing is read whole.

        Raises:
            DataError: a file is missing, cut off, of another format, or contradicts the others.
        """
        self.prefix = prefix
        self.paths = dataset_paths(prefix)
        missing = [path for path in self.paths if not os.path.isfile(path)]
        if missing:
            stem, suffix = os.path.splitext(prefix)
            if suffix in DATASET_SUFFIXES and os.path.isfile(prefix):
                raise DataError(f"dataset {prefix}: give the prefix of its three files, {stem}, without {suffix}")
            raise DataError(
                f"dataset {prefix}: {', '.join(missing)} not found; make the dataset with "
                f"`python tools/preprocess_data.py --input ... --output-prefix {prefix} --tokenizer ...`"
            )
        self._index, self._meta = Index(self.paths.idx), MetaReader(self.paths.meta)
        self.meta = self._meta.facts
        self.multimodal, self.dtype = self._index.multimodal, self._index.dtype
        self.lengths, self.pointers = self._index.lengths, self._index.pointers
        self.modes, self.documents = self._index.modes, self._index.documents
        self._compare()
        # Not mapped: a map of a file that is cut off while it is in use ends the process.
        self._bin = os.open(self.paths.bin, os.O_RDONLY)
        weakref.finalize(self, os.close, self._bin)

    def __reduce__(self) -> tuple:
        return Store, (self.prefix,)

    def __len__(self) -> int:
        """Documents."""
        return len(self.documents) - 1

    def sequences(self, document: int) -> range:
        """The sequences of a document.

        Raises:
            DataError: the index is damaged there.
        """
        return range(*self._index.span(document))

    def spans(self, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First sequences of some documents and those behind their last: int64 [d] each.

        Raises:
            DataError: the index is damaged there.
        """
        return self._index.spans(documents)

    def text(self, sequence: int, start: int, stop: int) -> np.ndarray:
        """Tokens `start` to `stop` of a text sequence: int64 [stop - start].

        Raises:
            DataError: the index is damaged there, or the .bin file was cut off after it was opened.
        """
        first, _ = self._index.place(sequence)
        return self._read(first + start * self.dtype.itemsize, stop - start).astype(np.int64)

    def image(self, sequence: int) -> bytes:
        """Bytes of the image file in an image sequence.

        Raises:
            DataError: as for `text`, or what is stored there is no image: its pad bytes are not 0 to 3.
        """
        payload = self._read(*self._index.place(sequence)).tobytes()
        pad = struct.unpack_from("<i", payload)[0]
        if not 0 <= pad <= 3:
            raise DataError(
                f"{self.paths.bin}: sequence {sequence} starts with {pad}, not a number of pad bytes (0 to 3)"
            )
        return payload[4 : len(payload) - pad]

    def key(self, document: int) -> str:
        """Key of a document."""
        return self.rows(document, document + 1)["key"][0].as_py()

    def source(self, document: int) -> str:
        """File that a document was read from."""
        return self.rows(document, document + 1)["source"][0].as_py()

    def rows(self, first: int, stop: int) -> pa.Table:
        """Columns `key`, `source` and `images` (`width` and `height` in pixels, `bytes`) of a range of documents."""
        return self._meta.rows(first, stop)

    def where(self, document: int) -> str:
        """How an error names a document."""
        return f"{self.prefix}: document {self.key(document)} (number {document}, from {self.source(document)})"

    def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """The index some documents at a time, as `IndexWriter.append` takes it."""
        return self._index.blocks()

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The rows some documents at a time, as `write_meta` takes them.

        Raises:
            DataError: they are not those that were written.
        """
        return self._meta.batches()

    def checksums(self) -> list[Checksum]:
        """Of the .idx file and of the parts of the .bin file. Each can be checked by itself, in any process."""
        found = [Checksum(self.paths.idx, 0, os.path.getsize(self.paths.idx), self.meta.idx_sha256)]
        start = 0
        for size_bytes, sha256 in self.meta.bin_parts:
            found.append(Checksum(self.paths.bin, start, size_bytes, sha256))
            start += size_bytes
        return found

    def verify(self) -> None:
        """Read all files whole and compare their checksums.

        Raises:
            DataError: the bytes of a file are not those that were written.
        """
        for checksum in self.checksums():
            checksum.check()
        for _ in self.batches():
            pass

    def _read(self, first: int, elements: int) -> np.ndarray:
        size = elements * self.dtype.itemsize
        data = os.pread(self._bin, size, first)
        while len(data) < size and (more := os.pread(self._bin, size - len(data), first + len(data))):
            data += more
        if len(data) < size:
            raise DataError(
                f"{self.paths.bin} ends at byte {first + len(data)}, but {size} bytes from {first} are read; it was "
                "cut off while it was in use; make the dataset again"
            )
        return np.frombuffer(data, self.dtype)

    def _compare(self) -> None:
        if (self.meta.multimodal, len(self._meta)) != (self.multimodal, len(self)):
            raise DataError(
                f"{self.paths.meta} (multimodal: {self.meta.multimodal}, {len(self._meta)} documents) and "
                f"{self.paths.idx} (multimodal: {self.multimodal}, {len(self)} documents) do not belong together; make "
                "both again"
            )
        expected = token_dtype(self.meta.vocab_size, self.multimodal)
        if self.dtype != expected:
            raise DataError(
                f"{self.paths.idx} holds {self.dtype} elements, but the vocabulary of {self.meta.vocab_size} in "
                f"{self.paths.meta} is stored as {expected}; the files do not belong together; make both again"
            )
        size, parts = os.path.getsize(self.paths.bin), sum(size for size, _ in self.meta.bin_parts)
        if not size == parts == self._index.bin_bytes:
            raise DataError(
                f"{self.paths.bin} has {size} bytes, but {self.paths.idx} describes {self._index.bin_bytes} and "
                f"{self.paths.meta} {parts}; it was cut off or belongs to another dataset; copy or make all files again"
            )
