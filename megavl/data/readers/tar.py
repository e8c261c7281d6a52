"""Tar archives, read from front to back: POSIX ustar and pax, and GNU's long names. Nothing is extracted.

Python's tarfile takes a damaged header for the end of the archive, and holds extended headers and a list of all members
in memory, whatever their size and number. Here damage is an error and memory is bounded.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

REGULAR, DIRECTORY = "a regular file", "a directory"

_BLOCK_BYTES = 512
_END = bytes(_BLOCK_BYTES)
_SKIP_BYTES = 1 << 20
# Of an extended header, which holds a name or a size that does not fit into the header itself.
_MAX_EXTENDED_BYTES = 1 << 16
_KINDS = {
    b"\0": REGULAR,
    b"0": REGULAR,
    b"7": REGULAR,
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"5": DIRECTORY,
    b"6": "a pipe",
}


class DamagedTar(Exception):
    """The bytes are no tar archive, or none from here on."""


@dataclass(frozen=True)
class Member:
    """What a header says. A byte of the name that is not UTF-8 is a surrogate; `kind` is REGULAR, DIRECTORY, or in
    words what else it is."""

    name: str
    kind: str
    size_bytes: int


class Tar:
    """An archive: iterate over its members, and `read` the one at hand, or go on without."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._content = self._padding = 0  # bytes of the member at hand that are still to come

    def __iter__(self) -> Iterator[Member]:
        """Members in order.

        Raises:
            DamagedTar: a header is damaged, or the archive ends before its end mark.
            OSError: the compression is damaged.
        """
        ended = False
        extended: dict[bytes, bytes] = {}
        while header := self._header():
            ended = header == _END
            if ended:
                continue  # two of these are the mark, and another archive may follow it
            _verify(header)
            flag = header[156:157]
            self._begin(_number(header[124:136]))
            if flag in (b"x", b"g", b"L", b"K"):
                extended |= self._extended(flag)
                continue
            name = extended.get(b"path", _name(header)).decode("utf-8", "surrogateescape")
            kind = DIRECTORY if name.endswith("/") else _KINDS.get(flag, "of an unknown kind")
            if any(key.startswith(b"GNU.sparse") for key in extended):
                kind = "a sparse file"
            if kind != REGULAR and flag in _KINDS:
                self._begin(0)  # whatever the header says
            elif b"size" in extended:
                self._begin(_decimal(extended[b"size"]))
            extended = {}
            yield Member(name, kind, self._content)
        if not ended:
            raise DamagedTar("it ends before its end mark")

    def read(self) -> bytes:
        """Content of the member at hand.

        Raises:
            DamagedTar: the archive ends in it.
            OSError: the compression is damaged.
        """
        data = self._file.read(self._content)
        if len(data) < self._content:
            raise DamagedTar("it ends inside a member")
        self._content = 0
        return data

    def _begin(self, size_bytes: int) -> None:
        self._content, self._padding = size_bytes, -size_bytes % _BLOCK_BYTES

    def _header(self) -> bytes:
        left = self._content + self._padding
        while left:
            skipped = len(self._file.read(min(left, _SKIP_BYTES)))
            if not skipped:
                raise DamagedTar("it ends inside a member")
            left -= skipped
        self._begin(0)
        header = self._file.read(_BLOCK_BYTES)
        if len(header) % _BLOCK_BYTES:
            raise DamagedTar("it ends inside a header")
        return header

    def _extended(self, flag: bytes) -> dict[bytes, bytes]:
        if self._content > _MAX_EXTENDED_BYTES:
            raise DamagedTar(f"an extended header has {self._content:,} bytes, more than {_MAX_EXTENDED_BYTES:,}")
        data = self.read()
        if flag == b"x":
            return dict(_attributes(data))
        # What is said of all members (g) and the targets of links (K) do not matter here.
        return {b"path": data.rstrip(b"\0")} if flag == b"L" else {}


def _attributes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Those of a pax header: `LENGTH KEY=VALUE\\n`, where the length is that of all of it."""
    while data:
        length, space, _ = data.partition(b" ")
        stop = _decimal(length)
        if not space or not len(length) + 1 < stop <= len(data) or data[stop - 1 : stop] != b"\n":
            raise DamagedTar(f"an extended header is damaged ({data[:40]!r})")
        key, _, value = data[len(length) + 1 : stop - 1].partition(b"=")
        yield key, value
        data = data[stop:]


def _name(header: bytes) -> bytes:
    name, prefix = header[:100].partition(b"\0")[0], header[345:500].partition(b"\0")[0]
    # GNU's headers have other things in the place of the prefix.
    return prefix + b"/" + name if prefix and header[257:263] == b"ustar\0" else name


def _verify(header: bytes) -> None:
    total = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    if _number(header[148:156]) != total:
        raise DamagedTar(f"this is no header of a tar archive ({header[:40]!r}; its checksum is wrong)")


def _number(field: bytes) -> int:
    """Octal digits, or where they do not suffice, binary."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    if digits.strip(b"01234567"):
        raise DamagedTar(f"this is no header of a tar archive ({field!r} is where a number belongs)")
    return int(digits or b"0", 8)


def _decimal(digits: bytes) -> int:
    if not digits.isdigit() or len(digits) > 19:
        raise DamagedTar(f"an extended header has {digits[:40]!r} where a number belongs")
    return int(digits)
