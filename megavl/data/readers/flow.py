"""An element tree to text and images in reading order.

Runs of white space are one space, also no-break spaces. Paragraphs, headings, lists, tables and `pre` stand between
blank lines, other blocks and `br` between line breaks. List items begin with "- " or their number, indented by their
depth; a table's row is a line with " | " between its cells, unless the table holds another one: then it is layout, and
its cells are blocks. `pre` keeps its white space. Raised and lowered numbers are those of Unicode: 10³, H₂O.
"""

import re
from collections.abc import Callable

from lxml import etree

from megavl.data.document import Image, Segment, Text

_PARAGRAPHS = frozenset(
    ("p", "h1", "h2", "h3", "h4", "h5", "h6", "ul", "ol", "dl", "pre", "table", "blockquote", "figure", "hr")
)
_BLOCKS = frozenset(
    (
        *("address", "article", "aside", "body", "caption", "center", "dd", "details", "div", "dt", "fieldset"),
        *("figcaption", "footer", "header", "hgroup", "legend", "li", "main", "section", "summary", "tr"),
    )
)
_RAISED = dict(zip(map(ord, "0123456789+-−=()n"), "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁻⁼⁽⁾ⁿ", strict=True))
_LOWERED = dict(zip(map(ord, "0123456789+-−=()"), "₀₁₂₃₄₅₆₇₈₉₊₋₋₌₍₎", strict=True))
_SPACE = re.compile("[ \t\n\f\r\xa0]+")


def segments(root: etree._Element, load: Callable[[etree._Element], Image | None]) -> tuple[Segment, ...]:
    """Text and images of a tree. `load` gives the image of an `img` element, None for one that is left out."""
    flow = _Flow()
    for event, element in etree.iterwalk(root, events=("start", "end")):
        if event == "start":
            flow.open(element)
            if element.tag == "img" and (image := load(element)) is not None:
                flow.image(image)
            flow.write(_scripted(element))
        else:
            flow.close(element)
            if element is not root:
                flow.write(element.tail)
    return flow.finish()


def _scripted(element: etree._Element) -> str | None:
    """The text that an element begins with, at the height that its characters have in Unicode where all of them do."""
    script = {"sup": _RAISED, "sub": _LOWERED}.get(element.tag)
    if script is None or not element.text or not all(ord(character) in script for character in element.text):
        return element.text
    return element.text.translate(script)


class _Flow:
    """What has been written, and what the next piece of text or image has to be set apart with."""

    def __init__(self) -> None:
        self._segments: list[Segment] = []
        self._text: list[str] = []
        self._breaks = 0  # line breaks due before the next piece
        self._space = False  # a space due before it
        self._marker = ""  # a list item's, due before its first piece
        self._bars = 0  # borders of table cells due before it
        self._lists: list[int | None] = []  # open lists: number of the last item, None without numbers
        self._tables: list[bool] = []  # open tables: whether it is layout
        self._cells = 0  # open cells of data tables, in which line breaks are spaces
        self._columns = 0  # cells of the row so far
        self._pre: list[str] | None = None  # text of the open `pre`

    def open(self, element: etree._Element) -> None:
        self._break(element.tag)
        match element.tag:
            case "ul":
                self._lists.append(None)
            case "ol":
                start = element.get("start", "")
                self._lists.append(int(start) - 1 if re.fullmatch(r"-?\d{1,9}", start) else 0)
            case "li" if not self._cells:
                self._marker = self._next_marker()
            case "pre":
                self._pre = []
            case "table":
                self._tables.append(element.find(".//table") is not None)
            case "tr":
                self._columns = self._bars = 0
            case "td" | "th" if self._tables:
                if self._tables[-1]:
                    self._break("p")
                else:
                    self._bars += self._columns > 0
                    self._columns += 1
                    self._cells += 1

    def close(self, element: etree._Element) -> None:
        match element.tag:
            case "ul" | "ol":
                self._lists.pop()
            case "li":
                self._marker = ""
            case "pre":
                self._finish_pre()
            case "table":
                self._tables.pop()
            case "tr":
                self._bars = 0
            case "td" | "th" if self._tables:
                if self._tables[-1]:
                    self._break("p")
                else:
                    self._cells -= 1
        if element.tag != "br":
            self._break(element.tag)

    def write(self, text: str | None) -> None:
        if not text:
            return
        if self._pre is not None:
            self._pre.append(text)
            return
        text = _SPACE.sub(" ", text)
        self._space |= text.startswith(" ")
        if body := text.strip(" "):
            self._lead()
            self._text.append(body)
            self._space = text.endswith(" ")

    def image(self, image: Image) -> None:
        if self._pre:
            self._pre, text = [], "".join(self._pre)
            self._verbatim(text)
        self._lead()
        self._end_text()
        self._segments.append(image)

    def finish(self) -> tuple[Segment, ...]:
        self._end_text()
        return tuple(self._segments)

    def _break(self, tag: str) -> None:
        if self._pre is not None:
            if tag == "br":
                self._pre.append("\n")
            return
        if tag == "br":
            breaks = min(self._breaks + 1, 2)
        elif tag in ("ul", "ol") and self._lists:  # a list within a list is not set apart
            breaks = 1
        elif tag in _PARAGRAPHS:
            breaks = 2
        else:
            breaks = int(tag in _BLOCKS)
        if breaks and self._cells:
            self._space = True
        elif not self._marker:  # what opens an item goes on behind its marker
            self._breaks = max(self._breaks, breaks)

    def _next_marker(self) -> str:
        if not self._lists or self._lists[-1] is None:
            return "- "
        self._lists[-1] += 1
        return f"{self._lists[-1]}. "

    def _lead(self) -> None:
        """Write what is due before a piece."""
        if self._text or self._segments:
            if self._breaks:
                self._text.append("\n" * self._breaks)
            if self._bars:
                self._text.append(" |" * self._bars + " ")
            elif self._space and not self._breaks and not self._marker:
                self._text.append(" ")
        if self._breaks or self._marker:
            depth = len(self._lists) - bool(self._marker)
            self._text.append("  " * depth + self._marker)
        self._breaks, self._bars, self._space, self._marker = 0, 0, False, ""

    def _verbatim(self, text: str) -> None:
        if text.strip():
            self._lead()
            self._text.append(text.removeprefix("\n").rstrip())

    def _finish_pre(self) -> None:
        text, self._pre = "".join(self._pre or ()), None
        self._verbatim(text)

    def _end_text(self) -> None:
        # White space alone, as between two images, is nothing to learn.
        if (text := "".join(self._text)).strip():
            self._segments.append(Text(text))
        self._text = []
