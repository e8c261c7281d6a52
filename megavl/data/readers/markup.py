"""Markup to an element tree that holds what a reader of the page sees, and no more."""

import codecs
import re
from html.entities import html5

from lxml import etree

from megavl.data.errors import DataError

# What a browser does not show as text of the page: code, metadata, controls, embedded things, fallbacks of ruby.
UNSEEN = (
    *("title", "meta", "link", "base", "script", "style", "noscript", "template", "svg", "canvas", "audio", "video"),
    *("iframe", "object", "embed", "form", "button", "input", "select", "textarea", "dialog", "rp", "rt"),
)
_HIDDEN = (
    "//*[(@hidden or @aria-hidden='true' or contains(translate(@style, ' ', ''), 'display:none')) and not(.//math)]"
)
_NAVIGATION = (
    "//nav | //menu"
    " | //*[@role='navigation' or @role='banner' or @role='contentinfo' or @role='search' or @role='complementary']"
    " | //*[self::header or self::footer or self::aside][not(ancestor::article or ancestor::main or ancestor::section)]"
)
# Names under which the web means another encoding than the standard of that name (WHATWG Encoding, section 4.2).
_WEB_ENCODINGS = {
    "iso-8859-1": "cp1252",
    "us-ascii": "cp1252",
    "ascii": "cp1252",
    "gb2312": "gb18030",
    "gbk": "gb18030",
}
_DECLARED = re.compile(rb"""(?:charset|encoding)\s*=\s*["']?\s*([\w.:-]+)""", re.IGNORECASE)
# What HTML may hold and a tree takes from its parser, but from no one else.
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_ENTITY = re.compile(r"&(\w+;)")
_XML_ENTITIES = {"amp;", "lt;", "gt;", "quot;", "apos;"}


def parse_html(data: bytes) -> etree._Element | None:
    """The root of an HTML page as browsers would build it, None for a page without an element.

    Raises:
        DataError: the bytes are not text in their declared encoding (UTF-8 without one), or the page is nested deeper
            than 2048 elements. The message does not name the page.
    """
    text = _decode(data)
    # `huge_tree` lifts libxml2's own bound on the size, which cuts a page off without a word; the depth stays bounded.
    parser = etree.HTMLParser(encoding="utf-8", no_network=True, huge_tree=True)
    try:
        root = etree.fromstring(text.encode("utf-8"), parser)
    except etree.XMLSyntaxError:  # how lxml reports a page that has no element at all
        root = None
    if fatal := [entry for entry in parser.error_log if entry.level == etree.ErrorLevels.FATAL]:
        raise DataError(f"cannot be parsed ({fatal[0].message.strip()}, line {fatal[0].line}); leave it out")
    return root


def parse_xhtml(data: bytes) -> etree._Element | None:
    """The root of an XHTML page, element names without their namespace; a page that is not well-formed is taken as
    HTML. Entities are those of HTML.

    Raises:
        DataError: as for `parse_html`, or the page declares entities of its own.
    """
    text = _decode(data)
    if "<!ENTITY" in text:
        raise DataError("declares entities of its own, which could expand without end; leave it out")
    text = re.sub(r"^\s*<\?xml[^>]*\?>", "", text)
    text = _ENTITY.sub(lambda match: match[0] if match[1] in _XML_ENTITIES else html5.get(match[1], match[0]), text)
    try:
        root = parse_xml(text.encode("utf-8"))
    except DataError:
        return parse_html(data)
    for element in root.iter("*"):
        element.tag = etree.QName(element).localname.lower()
    return root


def parse_xml(data: bytes) -> etree._Element:
    """The root of an XML file. Neither entities nor DTDs are resolved, nothing is fetched.

    Raises:
        DataError: the file is not well-formed. The message does not name it.
    """
    try:
        return etree.fromstring(data, etree.XMLParser(resolve_entities=False, no_network=True, load_dtd=False))
    except etree.XMLSyntaxError as error:
        raise DataError(f"is not well-formed XML ({error}); repair or leave out the file") from error


def drop_unseen(root: etree._Element) -> None:
    """Remove, in place, what a browser does not show as text (`UNSEEN`, hidden elements, comments). A formula becomes
    its TeX where the page has it. An image inside SVG, as book covers have it, becomes an `img`."""
    for math in list(root.iter("math")):
        tex, tail = math.get("alttext") or "".join(math.itertext()), _NOT_XML.sub("", math.tail or "")
        math.clear()
        math.tag, math.text, math.tail = "span", _NOT_XML.sub("", tex), tail
    for svg in list(root.iter("svg")):
        for image in svg.iter("image"):
            source = image.get("href") or image.get("{http://www.w3.org/1999/xlink}href")
            if source is not None:
                source, tail = _NOT_XML.sub("", source), _NOT_XML.sub("", svg.tail or "")
                svg.clear()
                svg.tag, svg.tail = "img", tail
                svg.set("src", source)
                break
    _mark(root, _HIDDEN)
    etree.strip_tags(root, etree.Comment, etree.ProcessingInstruction)
    etree.strip_elements(root, *UNSEEN, with_tail=False)


def drop_navigation(root: etree._Element) -> etree._Element:
    """Remove, in place, what belongs to a site and not to its page, by HTML's own landmarks: `nav`, `menu`, the roles
    of navigation, banner, search, complementary and contentinfo, and every `header`, `footer` and `aside` outside
    articles, sections and `main`. Returns the page's only `main` where it has one, else the root.
    """
    _mark(root, _NAVIGATION)
    etree.strip_elements(root, *UNSEEN, with_tail=False)
    main = root.findall(".//main")
    return main[0] if len(main) == 1 else root


def _mark(root: etree._Element, path: str) -> None:
    """Make what an XPath finds an element that is dropped; the root itself is kept."""
    for element in root.xpath(path):
        if element is not root and element.tag != "body":
            element.tag = "script"


def _decode(data: bytes) -> str:
    marks = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
    declared = _DECLARED.search(data[:1024])
    name = next((name for mark, name in marks if data.startswith(mark)), None) or (
        declared[1].decode("ascii") if declared else "utf-8"
    )
    try:
        text = data.decode(_WEB_ENCODINGS.get(name.lower(), name))
    except (UnicodeError, LookupError) as error:
        raise DataError(f"is not text in {name} ({error}); convert the file to UTF-8, or leave it out") from error
    if "\0" in text:
        raise DataError(f"holds a NUL character at {text.index(chr(0))}; it is not a text file, leave it out")
    return text
