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

from megavl.data.document import Document
from megavl.data.errors import DataError
from megavl.data.readers.flow import segments
from megavl.data.readers.markup import drop_unseen, parse_xhtml, parse_xml
from megavl.data.readers.picture import picture
from megavl.data.readers.reader import Part

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
    def where(self) -> str:
        return f"{self.book.path}:{self.number}"

    def tree(self) -> etree._Element | None:
        """What the page says, None where it is empty.

        Raises:
            DataError: it is missing, damaged, encrypted or not text.
        """
        root = parse_xhtml(self.book.read(self.name, self.where), self.where)
        if root is not None:
            drop_unseen(root)
        return root

    def image(self, reference: str) -> bytes:
        """The bytes of an image, by a path relative to the page.

        Raises:
            DataError: it is missing, damaged or encrypted.
        """
        return self.book.read(_join(self.name, reference), self.where)


class Book:
    """An open archive.

    Raises:
        DataError: the file cannot be read, is no EPUB, or unpacks to more than 2 GiB or 100,000 files.
    """

    def __init__(self, path: str) -> None:
        self.path = path
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
        package = self._package()
        root = parse_xml(self.read(package, self.path), f"{self.path}: {package}")
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

    def read(self, name: str, where: str) -> bytes:
        """The bytes of a file of the archive; never more than the archive declares for it.

        Raises:
            DataError: it is missing, damaged or encrypted; the message starts with `where`.
        """
        try:
            return self._archive.read(name)
        except KeyError as error:
            raise DataError(f"{where}: the book has no file {name}; it is damaged, leave it out") from error
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, NotImplementedError) as error:
            raise DataError(f"{where}: {name} is damaged or encrypted ({error}); leave the book out") from error

    def _package(self) -> str:
        name = "META-INF/container.xml"
        container = parse_xml(self.read(name, self.path), f"{self.path}: {name}")
        rootfile = container.find("{*}rootfiles/{*}rootfile")
        if rootfile is None or not rootfile.get("full-path"):
            raise DataError(f"{self.path}: {name} names no package file; the book is damaged, leave it out")
        return rootfile.get("full-path")


def split(path: str, part_bytes: int) -> Iterator[Part]:
    """The book as a whole; its chapters are read one by one."""
    try:
        size = Path(path).stat().st_size
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check --input") from error
    yield Part(path, 0, 1, 1, size)


def read(part: Part) -> Iterator[Document | DataError]:
    """A document per chapter; its key is the file's name and its place in the spine."""
    empty = True
    with Book(part.path) as book:
        for chapter in book.chapters():
            try:
                document = _document(chapter)
            except DataError as error:
                yield error
                empty = False
                continue
            if document is not None:
                yield document
                empty = False
    if empty:
        yield DataError(f"{part.path}: no chapter holds text or an image; leave the book out")


def _document(chapter: Chapter) -> Document | None:
    root = chapter.tree()
    found = () if root is None else segments(root, lambda img: picture(img, chapter.where, chapter.image))
    return Document(f"{Path(chapter.book.path).name}:{chapter.number}", chapter.book.path, found) if found else None


def _join(base: str, reference: str) -> str:
    """The name in the archive that a path relative to the file `base` stands for. One that leaves the archive is the
    name of no file in it."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(base), unquote(reference.partition("#")[0])))
