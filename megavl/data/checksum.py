"""Checksums of consecutive parts of a file: files put end to end keep them, and several processes can check them."""

import hashlib
from dataclasses import dataclass

import numpy as np

from megavl.data.errors import DataError

# A file that is written by one process is checked by several from this size on.
_PART_BYTES = 1 << 30
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Checksum:
    """What the bytes `start` to `start + size_bytes` of a file hash to."""

    path: str
    start: int
    size_bytes: int
    sha256: str

    def check(self) -> None:
        """Read the bytes and compare.

        Raises:
            DataError: they are not those that were written.
        """
        digest = hashlib.sha256()
        left = self.size_bytes
        with open(self.path, "rb") as file:
            file.seek(self.start)
            while left and (block := file.read(min(left, _BLOCK_BYTES))):
                digest.update(block)
                left -= len(block)
        if digest.hexdigest() != self.sha256:
            raise DataError(
                f"{self.path}: the bytes {self.start} to {self.start + self.size_bytes} have the sha256 "
                f"{digest.hexdigest()}, but {self.sha256} was written; the file was changed or damaged; copy it or "
                "make it again"
            )


class PartHash:
    """Hashes what is written to a file, part by part."""

    def __init__(self) -> None:
        self._done: list[tuple[int, str]] = []
        self._size_bytes, self._digest = 0, hashlib.sha256()

    def update(self, data: bytes | np.ndarray) -> None:
        """The next bytes of the file."""
        self._digest.update(data)
        self._size_bytes += memoryview(data).nbytes
        if self._size_bytes >= _PART_BYTES:
            self._done, self._size_bytes, self._digest = self.parts(), 0, hashlib.sha256()

    def parts(self) -> list[tuple[int, str]]:
        """(bytes, sha256) of each part so far."""
        last = [(self._size_bytes, self._digest.hexdigest())] if self._size_bytes else []
        return self._done + last
