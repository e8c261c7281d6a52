"""EPUB books: each chapter of the reading order is a document.

A book is a zip archive: `META-INF/container.xml` names its package file, whose `spine` lists the chapters, XHTML pages
with images in the archive. Nothing is unpacked to disk. Chapters that the package says to skip in linear reading, its
table of contents, and pages without text and images are left out. Source: EPUB 3.3 (W3C), sections 4.2.6, 5.7.
"""

import posixpath
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from lxml import etree

from megavl.data.document import Document, Image
from megavl.data.errors import DataError
from megavl.data.readers.flow import segments
from megavl.data.readers.markup import drop_unseen, parse_xhtml, parse_xml
from megavl.data.readers.picture import picture
from megavl.data.readers.reader import Part, ReadOptions, too_large, whole
from megavl.data.readers.record import Place

SUFFIXES = (".epub",)

# What a book's files may unpack to in all; a textbook full of pictures has some 100 MB.
MAX_UNPACKED_BYTES = 2 << 30
_MAX_FILES = 100_000


@dataclass(frozen=True)
class Chapter:
    """A page of the reading order. `name` is its path in the archive, `number` its place in the spine, from 1."""

    book: "Book"
    name: str
    number: int

    @property
    def place(self) -> Place:
        """By which errors name it."""
        return Place(self.book.path, self.number)

    def tree(self) -> etree._Element | None:
        """What the page says, None where it is empty.

        Raises:
            DataError: it is missing, damaged, encrypted or not text. The message does not name the book.
        """
        root = parse_xhtml(self.book.read(self.name))
        if root is not None:
            drop_unseen(root)
        return root

    def image(self, element: etree._Element) -> Image | None:
        """The image of an `img`, by a path relative to the page; None where it is left out.

        Raises:
            DataError: it is missing, damaged or encrypted. The message does not name the book.
        """
        return picture(element, lambda name: self.book.read(_join(self.name, name)))


class Book:
    """An open archive; a context manager.

    Raises:
        DataError: the file cannot be read, is no EPUB, or unpacks to more than 2 GiB or 100,000 files.
    """

    def __init__(self, path: str, options: ReadOptions) -> None:
        self.path, self._options = path, options
        try:
            self._archive = zipfile.ZipFile(path)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); check --input") from error
        except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
            raise DataError(f"{path}: is no EPUB, which is a zip archive ({error}); leave it out") from error
        unpacked = sum(info.file_size for info in self._archive.infolist())
        if unpacked > MAX_UNPACKED_BYTES or len(self._archive.infolist()) > _MAX_FILES:
            self._archive.close()
            raise DataError(
                f"{path}: would unpack to {unpacked:,} bytes in {len(self._archive.infolist()):,} files, more than the "
                f"{MAX_UNPACKED_BYTES:,} and {_MAX_FILES:,} that a book may have; leave it out"
            )

    def __enter__(self) -> "Book":
        return self

    def __exit__(self, *_: object) -> None:
        self._archive.close()

    def chapters(self) -> Iterator[Chapter]:
        """The pages of linear reading, in order, without the table of contents.

        Raises:
            DataError: the archive's container or package file is missing or malformed.
        """
        package, root = self._package()
        items = {item.get("id"): item for item in root.iterfind("{*}manifest/{*}item")}
        for number, reference in enumerate(root.iterfind("{*}spine/{*}itemref"), start=1):
            item = items.get(reference.get("idref"))
            if item is None:
                raise DataError(
                    f"{self.path}: {package}: chapter {number} is {reference.get('idref')!r}, which is not in the "
                    "manifest; the book is damaged, leave it out"
                )
            contents = "nav" in item.get("properties", "").split()
            if reference.get("linear") != "no" and not contents and "html" in item.get("media-type", ""):
                yield Chapter(self, _join(package, item.get("href", "")), number)

    def read(self, name: str) -> bytes:
        """The bytes of a file of the archive; never more than the archive declares for it.

        Raises:
            DataError: it is missing, too large, damaged or encrypted. The message does not name the book.
        """
        try:
            info = self._archive.getinfo(name)
            if info.file_size > self._options.max_record_bytes:
                raise DataError(f"{name} {too_large(self._options)}")
            return self._archive.read(info)
        except KeyError as error:
            raise DataError(f"the book has no file {name}; it is damaged, leave it out") from error
        except (zipfile.BadZipFile, zlib.error, UnicodeError, EOFError, OSError, RuntimeError) as error:
            raise DataError(f"{name} is damaged or encrypted ({error}); leave the book out") from error

    def _package(self) -> tuple[str, etree._Element]:
        """Name and root of the package file."""
        name = "META-INF/container.xml"
        try:
            rootfile = parse_xml(self.read(name)).find("{*}rootfiles/{*}rootfile")
            if rootfile is None or not rootfile.get("full-path"):
                raise DataError("names no package file; the book is damaged, leave it out")
            name = rootfile.get("full-path")
            return name, parse_xml(self.read(name))
        except DataError as error:
            raise DataError(f"{self.path}: {name}: {error}") from error


def split(path: str, part_bytes: int) -> Iterator[Part]:
    """The file as a whole.

    Raises:
        DataError: it cannot be read.
    """
    return whole(path)


def read(part: Part, options: ReadOptions) -> Iterator[Document | DataError]:
    """A document per chapter; its key is the file's name and its place in the spine."""
    empty = True
    with Book(part.path, options) as book:
        for chapter in book.chapters():
            try:
                root = chapter.tree()
                if root is None or not (found := segments(root, chapter.image)):
                    continue
                yield Document(f"{Path(part.path).name}:{chapter.number}", part.path, found)
            except DataError as error:
                yield chapter.place.refuse(error)
            empty = False
    if empty:
        yield DataError(f"{part.path}: no chapter holds text or an image; leave the book out")


def _join(base: str, reference: str) -> str:
    """The name in the archive that a path relative to the file `base` stands for. One that leaves the archive is the
    name of no file in it."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(base), unquote(reference.partition("#")[0])))
