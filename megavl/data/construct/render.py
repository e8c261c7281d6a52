"""Documents to pages: HTML, markdown and books in several templates (DeepSeek-VL, section 2.1, document OCR).

Each document gets one of the templates, drawn by the hash of its text, and becomes as many samples as it has pages: the
picture of a page, and exactly the text that it shows, read back from the browser. Line breaks in the text are those
between blocks, not those of the lines on the page; " | " stands for the border between the cells of a table's row. What
of a document is text, and which images it shows, are the rules of the HTML and EPUB readers.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from lxml import etree
from markdown_it import MarkdownIt

from megavl.data.construct.body import body
from megavl.data.construct.browser import Browser, Unrenderable
from megavl.data.construct.sample import Dropped, Sample
from megavl.data.construct.template import TEMPLATES
from megavl.data.document import Image, Text
from megavl.data.errors import DataError
from megavl.data.readers import epub, html
from megavl.data.readers.files import read_whole
from megavl.data.readers.flow import segments
from megavl.data.readers.markup import drop_unseen, parse_html
from megavl.data.readers.reader import ReadOptions

MARKDOWN = (".md", ".markdown")

# Characters of a document with its markup that one layout takes: some 300 pages. Pictures do not count.
MAX_CHARACTERS = 1_000_000


@dataclass(frozen=True)
class _Source:
    """A document to render. `load` gives the images of its `img` elements."""

    where: str
    tree: etree._Element
    load: Callable[[etree._Element], Image | None]


@dataclass(frozen=True)
class Render:
    """Pairs of pages and the text they show.

    templates: names of those that documents are rendered in
    dpi:       pixels per inch of the pictures
    """

    templates: tuple[str, ...] = tuple(TEMPLATES)
    dpi: int = 144
    suffixes: tuple[str, ...] = (*html.SUFFIXES, *epub.SUFFIXES, *MARKDOWN)

    def samples(self, paths: Sequence[str]) -> Iterator[Sample | Dropped]:
        with Browser(self.dpi) as browser:
            for path in paths:
                yield from self.rendered(browser, path)

    def rendered(self, browser: Browser, path: str) -> Iterator[Sample | Dropped]:
        """The pages of one file."""
        for source in _sources(path):
            yield from [source] if isinstance(source, Dropped) else self._pages(browser, source)

    def _pages(self, browser: Browser, source: _Source) -> list[Sample | Dropped]:
        text = body(source.tree, lambda _: None)
        if len(text) > MAX_CHARACTERS:
            return [Dropped(source.where, f"more than {MAX_CHARACTERS:,} characters", f"{len(text):,}")]
        number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
        template = TEMPLATES[self.templates[number % len(self.templates)]]
        try:
            pages = list(browser.pages(body(source.tree, source.load), template))
        except Unrenderable as error:
            return [Dropped(source.where, error.reason, error.detail)]
        if not pages:
            return [Dropped(source.where, "no text")]
        return [
            Sample(f"{source.where}:{page.number}", page.picture, ".png", _text(page.html, page.folio))
            for page in pages
        ]


def _sources(path: str) -> Iterator[_Source | Dropped]:
    """The documents of a file: one, or the chapters of a book."""
    options = ReadOptions()
    try:
        if path.lower().endswith(epub.SUFFIXES):
            with epub.Book(path, options) as book:
                for chapter in book.chapters():
                    yield _source(f"{path}:{chapter.number}", chapter.tree, chapter.image)
        else:
            parse = _markdown if path.lower().endswith(MARKDOWN) else html.page
            yield _source(path, partial(parse, path, options), partial(html.image, path, options))
    except DataError as error:
        yield Dropped(path, "no readable document", str(error))


def _source(
    where: str, parse: Callable[[], etree._Element | None], load: Callable[[etree._Element], Image | None]
) -> _Source | Dropped:
    try:
        tree = parse()
    except DataError as error:
        return Dropped(where, "no readable document", str(error))
    return Dropped(where, "no text") if tree is None else _Source(where, tree, load)


def _markdown(path: str, options: ReadOptions) -> etree._Element | None:
    """CommonMark with tables; HTML in it is shown as it is written."""
    try:
        text = read_whole(path, options).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"is not UTF-8 ({error}); convert the file") from error
    markup = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    root = parse_html(f'<meta charset="utf-8">{markup}'.encode())
    if root is not None:
        drop_unseen(root)
    return root


def _text(markup: str, folio: str) -> str:
    """What a page shows: its blocks, and its folio below them."""
    root = parse_html(f'<meta charset="utf-8"><div>{markup}</div>'.encode())
    found = "".join(segment.text for segment in segments(root, lambda _: None) if isinstance(segment, Text))
    return "\n\n".join(filter(None, (found, folio)))
