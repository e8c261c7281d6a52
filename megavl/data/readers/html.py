"""HTML pages with their images, as saved from a browser or unpacked from a dump: one file, one document.

What is text: `flow`. What is left out: `markup.drop_unseen`, `markup.drop_navigation`. Which images: `picture`; they
are below the folder of the page.
"""

from collections.abc import Iterator
from pathlib import Path

from lxml import etree

from megavl.data.document import Document
from megavl.data.errors import DataError
from megavl.data.readers.flow import segments
from megavl.data.readers.markup import MAX_BYTES, drop_navigation, drop_unseen, parse_html
from megavl.data.readers.picture import picture
from megavl.data.readers.reader import Part

SUFFIXES = (".html", ".htm", ".xhtml")


def split(path: str, part_bytes: int) -> Iterator[Part]:
    """The file as a whole: a page is not cut."""
    try:
        size = Path(path).stat().st_size
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check --input") from error
    yield Part(path, 0, 1, 1, size)


def read(part: Part) -> Iterator[Document | DataError]:
    """The page's document, or the error that names it."""
    try:
        yield _document(Path(part.path))
    except DataError as error:
        yield error


def page(path: Path) -> etree._Element | None:
    """The tree of what a page says: without what is unseen, and without navigation.

    Raises:
        DataError: the file cannot be read or parsed.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check --input") from error
    root = parse_html(data, str(path))
    if root is None:
        return None
    drop_unseen(root)
    return drop_navigation(root)


def image_below(path: Path, reference: str) -> bytes:
    """The bytes of a file below the folder of the page at `path`.

    Raises:
        DataError: the reference leaves the folder, also by a link, or the file cannot be read.
    """
    folder = path.parent.resolve()
    try:
        full = (folder / reference).resolve()
        data = full.read_bytes() if full.is_relative_to(folder) else None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(
            f"{path}: image {reference} cannot be read ({reason}); image paths are relative to the page's folder"
        ) from error
    if data is None:
        raise DataError(f"{path}: image {reference} lies outside the page's folder; only files below it are read")
    return data


def _document(path: Path) -> Document:
    root = page(path)
    found = (
        () if root is None else segments(root, lambda img: picture(img, str(path), lambda to: image_below(path, to)))
    )
    if not found:
        raise DataError(f"{path}: holds neither text nor an image of its own; leave it out")
    return Document(path.name, str(path), found)
