"""Keys that several documents share, in memory that does not grow with the dataset.

Hashes of the keys are dealt into files by their value, so that equal keys are in one file; each is then read by itself.
"""

import hashlib
import math
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from typing import BinaryIO

import numpy as np

from megavl.data.store import Store
from megavl.data.verify.found import LIMIT, Found

# Documents that are read at a time, keys that one file is to hold, and those of them that are read at a time. A process
# may open some 1000 files, so from a billion documents on, the files hold more.
_BLOCK = 1 << 16
_PARTITION = 1 << 21
_FILES = 512
_BUFFER = 1 << 12
_RECORDS = 1 << 18
_RECORD = np.dtype([("hash", "<u8"), ("document", "<i8")])


def check_keys(store: Store, found: Found) -> None:
    """Count the keys that more than one document has, compared by 64 bits of a hash.

    Raises:
        DataError: the rows are damaged.
        OSError: the folder for temporary files is full; 16 bytes per document go there.
    """
    with ExitStack() as stack:
        files = [
            stack.enter_context(tempfile.TemporaryFile(buffering=_BUFFER))
            for _ in range(min(_FILES, math.ceil(len(store) / _PARTITION)))
        ]
        for first in range(0, len(store), _BLOCK):
            _deal(_records(store, first, min(first + _BLOCK, len(store))), files)
        for file in files:
            firsts, counts = _repeated(_read(file))
            messages = [
                f"the key {store.key(first)!r} of document {first} is that of {count} documents"
                for first, count in zip(firsts[:LIMIT].tolist(), counts[:LIMIT].tolist(), strict=True)
            ]
            found.more(len(firsts), messages)


def _records(store: Store, first: int, stop: int) -> np.ndarray:
    keys = store.rows(first, stop)["key"].to_pylist()
    digests = b"".join(hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys)
    records = np.empty(stop - first, _RECORD)
    records["hash"], records["document"] = np.frombuffer(digests, "<u8"), np.arange(first, stop)
    return records


def _deal(records: np.ndarray, files: list[BinaryIO]) -> None:
    places = records["hash"] % np.uint64(len(files))
    order = np.argsort(places, kind="stable")
    borders = np.searchsorted(places[order], np.arange(1, len(files), dtype=np.uint64))
    for file, part in zip(files, np.split(records[order], borders), strict=True):
        file.write(part.tobytes())


def _read(file: BinaryIO) -> Iterator[np.ndarray]:
    file.seek(0)
    while len(records := np.frombuffer(file.read(_RECORDS * _RECORD.itemsize), _RECORD)):
        yield records


def _repeated(blocks: Iterator[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(first document, documents) of each key that is repeated, in the order of the documents.

    What is kept of the blocks read so far is a row per distinct key, however often one is repeated.
    """
    hashes, firsts, counts = np.empty(0, "<u8"), np.empty(0, np.int64), np.empty(0, np.int64)
    for records in blocks:
        hashes = np.concatenate((hashes, records["hash"]))
        firsts = np.concatenate((firsts, records["document"]))
        counts = np.concatenate((counts, np.ones(len(records), np.int64)))
        order = np.argsort(hashes, kind="stable")
        hashes, firsts, counts = hashes[order], firsts[order], counts[order]
        groups = np.flatnonzero(np.concatenate(([True], hashes[1:] != hashes[:-1])))
        # The sort is stable, so a group begins with its first document.
        hashes, firsts, counts = hashes[groups], firsts[groups], np.add.reduceat(counts, groups)
    repeated = counts > 1
    order = np.argsort(firsts[repeated])
    return firsts[repeated][order], counts[repeated][order]
