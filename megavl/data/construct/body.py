"""A document's tree to plain HTML whose text is exactly what a page made of it shows.

Elements are those of text; their attributes, styles and classes are dropped, as the look is the template's. What a
browser would add to the text is made text: markers of list items, quotation marks of `q`. What it would not show is
removed: control characters, soft hyphens, zero-width spaces and marks of direction.
"""

import base64
import io
import re
from collections.abc import Callable
from html import escape

from lxml import etree
from PIL import Image as Pillow

from megavl.data.decode import decode
from megavl.data.document import Image
from megavl.data.errors import DataError

_KEPT = frozenset(
    (
        *(
            "p",
            "h1",
            "h2",
            "h3",
            "h4",
            "h5",
            "h6",
            "dl",
            "dt",
            "dd",
            "table",
            "caption",
            "thead",
            "tbody",
            "tfoot",
            "tr",
        ),
        *("td", "th", "pre", "code", "blockquote", "figure", "figcaption", "hr", "br", "b", "strong", "i", "em", "u"),
        *("s", "sub", "sup", "small", "div"),
    )
)
_BLOCKS = frozenset(
    (
        *(
            "html",
            "head",
            "body",
            "address",
            "article",
            "aside",
            "center",
            "details",
            "fieldset",
            "footer",
            "header",
            "hgroup",
            "legend",
        ),
        *("main", "section", "summary"),
    )
)
_EMPTY = frozenset(("br", "hr"))
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff]")
_SPAN = re.compile(r"[1-9]\d?")
# Pixels of the longer side that a picture in a page keeps: more than any page shows.
_MAX_SIDE = 2048


def body(root: etree._Element, load: Callable[[etree._Element], Image | None]) -> str:
    """The HTML of a tree. `load` gives the image of an `img` element, None for one that is left out; an image that
    cannot be read or decoded is left out too, as it holds nothing of the text."""
    out: list[str] = []
    counts: list[int | None] = []  # open lists: number of the last item, None without numbers
    marker = ""  # of an item, due before its first text
    closing: list[str] = []
    for event, element in etree.iterwalk(root, events=("start", "end")):
        tag, text = element.tag, element.text if event == "start" else element.tail
        if event == "start":
            if tag in ("ul", "ol"):
                start = element.get("start", "")
                counts.append(None if tag == "ul" else int(start) - 1 if re.fullmatch(r"-?\d{1,9}", start) else 0)
            if tag not in ("p", "div", "li", "ul", "ol", *_BLOCKS):
                out.append(marker)
                marker = ""
            opening, end = _element(element, len(counts))
            if tag == "img":
                opening = _picture(element, load)
            out.append(opening)
            closing.append(end)
            if tag == "li":
                marker = _marker(counts)
            if tag == "q":
                out.append("\u201c")
        else:
            if tag in ("ul", "ol"):
                counts.pop()
            if tag == "li":
                marker = ""
            if tag == "q":
                out.append("\u201d")
            out.append(closing.pop())
            if element is root:
                break
        if text and (text := _UNSEEN.sub("", text.replace("\r\n", "\n"))):
            if text.strip():
                out.append(marker)
                marker = ""
            out.append(escape(text, quote=False))
    return "".join(out)


def _element(element: etree._Element, depth: int) -> tuple[str, str]:
    """(what opens it, what closes it), in so many lists."""
    tag = element.tag
    if tag in ("ul", "ol"):  # as text, only the outermost list is set apart by blank lines
        return ('<dl class="list">', "</dl>") if depth == 1 else ('<div class="list">', "</div>")
    if tag in _EMPTY:
        return f"<{tag}>", ""
    if tag == "img":
        return "", ""
    if tag == "li":  # no list element, which would close the one around it
        return '<div class="item">', "</div>"
    name = tag if tag in _KEPT else "div" if tag in _BLOCKS else "span"
    spans = "".join(
        f' {key}="{value}"'
        for key in ("colspan", "rowspan")
        if tag in ("td", "th") and _SPAN.fullmatch(value := element.get(key, ""))
    )
    return f"<{name}{spans}>", f"</{name}>"


def _marker(counts: list[int | None]) -> str:
    if not counts or counts[-1] is None:
        mark = "\u2022"
    else:
        counts[-1] += 1
        mark = f"{counts[-1]}."
    return f'<span class="marker">{mark} </span>'


def _picture(element: etree._Element, load: Callable[[etree._Element], Image | None]) -> str:
    try:
        image = load(element)
        if image is None:
            return ""
        decode(image.data)
    except DataError:
        return ""
    pixels = Pillow.open(io.BytesIO(image.data)).convert("RGBA")  # drawings are often transparent
    pixels.thumbnail((_MAX_SIDE, _MAX_SIDE), Pillow.Resampling.LANCZOS)
    file = io.BytesIO()
    pixels.save(file, "PNG")
    return f'<img src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">'
