"""The image that an `img` element of a page shows.

Read are images beside the page, by a path relative to it, and those that are in it (`data:`). Left out are those that
are named by a place on a site (a scheme, `//` or `/` in front), as nothing is fetched, and drawings in SVG, which are
no pixels. `data-src` goes before `src` where it is local: pages that load images late keep a placeholder in `src`, and
where only a placeholder is left there is no image.
"""

import base64
import binascii
import re
from collections.abc import Callable
from urllib.parse import unquote, unquote_to_bytes

from lxml import etree

from megavl.data.document import Image
from megavl.data.errors import DataError

_ON_A_SITE = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*:|/|\\")


def picture(element: etree._Element, read: Callable[[str], bytes]) -> Image | None:
    """The image of an `img`, None where it is left out.

    Args:
        read: gives the bytes of a path relative to the page, or raises DataError.

    Raises:
        DataError: a `data:` image that is not base64, a name that no file has, or what `read` raises. The message does
            not name the page.
    """
    late = (element.get("data-src") or "").strip()
    source = (element.get("src") or "").strip()
    if late and not _ON_A_SITE.match(late):
        source = late
    if source[:5].lower() == "data:":
        return None if late else _embedded(source)
    path = unquote(re.split("[?#]", source, maxsplit=1)[0])
    if not path or _ON_A_SITE.match(source) or path.lower().endswith((".svg", ".svgz")):
        return None
    if "\0" in path:
        raise DataError(f"image {source[:120]} has a NUL byte in its name, which no file has; remove it")
    return Image(read(path), path)


def _embedded(source: str) -> Image | None:
    header, _, body = source[5:].partition(",")
    kind = header.split(";")[0].strip().lower()
    if kind == "image/svg+xml":
        return None
    data = unquote_to_bytes(body)
    if header.lower().endswith("base64"):
        try:
            data = base64.b64decode(re.sub(rb"\s", b"", data), validate=True)
        except binascii.Error as error:
            raise DataError(f"an image in the page (data:{header[:60]}) is not base64 ({error}); remove it") from error
    return Image(data, f"data:{kind}")
