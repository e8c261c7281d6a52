"""HTML pages with their images, as saved from a browser or unpacked from a dump: one file, one document.

What is text: `flow`. What is left out: `markup.drop_unseen`, `markup.drop_navigation`. Which images: `picture`; they
are below the folder of the page.
"""

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from lxml import etree

from megavl.data.document import Document, Image
from megavl.data.errors import DataError
from megavl.data.readers.files import read_image, read_whole
from megavl.data.readers.flow import segments
from megavl.data.readers.markup import drop_navigation, drop_unseen, parse_html
from megavl.data.readers.picture import picture
from megavl.data.readers.reader import Part, ReadOptions, whole

SUFFIXES = (".html", ".htm", ".xhtml")


def split(path: str, part_bytes: int) -> Iterator[Part]:
    """The file as a whole.

    Raises:
        DataError: it cannot be read.
    """
    return whole(path)


def read(part: Part, options: ReadOptions) -> Iterator[Document | DataError]:
    """The page's document, or the error that names it."""
    try:
        root = page(part.path, options)
        found = () if root is None else segments(root, partial(image, part.path, options))
        if not found:
            raise DataError("holds neither text nor an image of its own; leave it out")
        yield Document(Path(part.path).name, part.path, found)
    except DataError as error:
        yield DataError(f"{part.path}: {error}")


def page(path: str, options: ReadOptions) -> etree._Element | None:
    """The tree of what a page says, without what is unseen and without navigation; None where there is nothing.

    Raises:
        DataError: the file cannot be parsed. The message does not name it.
    """
    root = parse_html(read_whole(path, options))
    if root is None:
        return None
    drop_unseen(root)
    return drop_navigation(root)


def image(path: str, options: ReadOptions, element: etree._Element) -> Image | None:
    """The image of an `img` in the page at `path`, None where it is left out.

    Raises:
        DataError: it cannot be read, or is outside the page's folder. The message does not name the page.
    """
    return picture(element, lambda name: read_image(os.path.dirname(path), name, options.max_record_bytes))
