"""Pages of a document in headless Chromium: where they break, what they show, and their pictures.

The text is laid out in CSS columns of the page's height, so that the browser itself breaks pages, between lines, with
its rules of widows and of rows and pictures that stay whole. Where a text node's characters have come to lie says which
page they are on; a page's text is read back from the piece of the document between its first character and the next
page's.
"""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass

from playwright.sync_api import BrowserContext, Error, Page, sync_playwright

from megavl.data.construct.template import Template
from megavl.data.errors import DataError

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")

# Nothing is drawn by a graphics card, nothing is fetched, and letters have the same pixels on every screen.
_FLAGS = (
    *("--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--no-first-run", "--disable-lcd-text", "--font-render-hinting=none", "--force-color-profile=srgb"),
)
_TIMEOUT_MS = 60_000
_INCH = 96  # CSS pixels

# The first character on each page, and the HTML from there to the next page's.
_PAGES = """
({columns, gap}) => {
  const flow = document.getElementById('flow');
  const box = flow.getBoundingClientRect();
  const column = (box.width - (columns - 1) * gap) / columns, step = column + gap;
  const place = rect => Math.floor((rect.left - box.left + 1) / step);
  const seen = rects => [...rects].filter(rect => rect.width > 0 && rect.height > 0);
  const fits = rect => rect.right <= box.left + place(rect) * step + column + 2
    && rect.top >= box.top - 6 && rect.bottom <= box.bottom + 6;
  for (const element of flow.querySelectorAll('*')) {
    if ([...element.getClientRects()].some(rect => rect.width > column + 2))
      return {problem: 'something wider than its column', pages: []};
  }
  const range = document.createRange();
  const from = (node, offset) => {
    range.setStart(node, offset);
    range.setEnd(node, node.length);
    return seen(range.getClientRects());
  };
  const starts = [];
  const walker = document.createTreeWalker(flow, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode;
    const rects = from(node, 0);
    if (!rects.length) continue;
    if (!rects.every(fits)) return {problem: 'text outside of its column', pages: []};
    const numbers = rects.map(rect => Math.floor(place(rect) / columns));
    for (const number of new Set(numbers)) {
      const last = starts.length ? starts[starts.length - 1].number : -1;
      if (number === last) continue;
      if (number < last) return {problem: 'a table row longer than a page', pages: []};
      let low = 0, high = node.length - 1;  // the first offset whose text begins on this page
      while (low < high) {
        const middle = (low + high) >> 1;
        const rest = from(node, middle);
        if (rest.length && Math.floor(place(rest[0]) / columns) < number) low = middle + 1; else high = middle;
      }
      starts.push({number, node, offset: low});
    }
  }
  const total = Math.max(1, Math.ceil((flow.scrollWidth + gap - 2) / (step * columns)));
  const pages = starts.map(({number, node, offset}, index) => {
    range.setStart(node, offset);
    const next = starts[index + 1];
    if (next) range.setEnd(next.node, next.offset); else range.setEnd(flow, flow.childNodes.length);
    let piece = range.cloneContents(), outer = range.commonAncestorContainer;
    if (outer.nodeType === Node.TEXT_NODE) outer = outer.parentNode;
    for (; outer !== flow; outer = outer.parentNode) {
      const shell = outer.cloneNode(false);
      shell.append(piece);
      piece = shell;
    }
    const page = document.createElement('div');
    page.append(piece);
    page.querySelectorAll('img').forEach(image => image.remove());
    return {number, html: page.innerHTML};
  });
  return {problem: null, pages, total};
}
"""
_SHOW = """
async ({offset, folio}) => {
  document.getElementById('flow').style.transform = `translateX(${-offset}px)`;
  document.getElementById('folio').textContent = folio;
  await Promise.all([...document.images].map(image => image.decode()));
}
"""
# A character that no font has is drawn as one that no font can have.
_MISSING = """
({characters, font}) => {
  const context = new OffscreenCanvas(48, 48).getContext('2d', {willReadFrequently: true});
  context.font = `24px ${font}`;
  context.textBaseline = 'top';
  const drawn = character => {
    context.clearRect(0, 0, 48, 48);
    context.fillText(character, 4, 4);
    return context.getImageData(0, 0, 48, 48).data.join();
  };
  const none = drawn('\\u{10ffff}');
  return [...characters].filter(character => drawn(character) === none);
}
"""


class Unrenderable(Exception):
    """A document of which no faithful pages can be made. `reason` is one of a few; `detail` is of this document."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class RenderedPage:
    """One page: its number from 1, the HTML of the text it shows, its folio, and its picture as a PNG file."""

    number: int
    html: str
    folio: str
    picture: bytes


class Browser:
    """A headless Chromium of this machine; a context manager. It reaches no network.

    dpi: pixels per inch of the pictures, of which a CSS pixel is 1/96

    Raises:
        DataError: no Chromium is found, or it does not start.
    """

    def __init__(self, dpi: int) -> None:
        self._scale = dpi / _INCH
        self._drawn: dict[str, set[str]] = {}  # font -> characters that it is known to have

    def __enter__(self) -> "Browser":
        self._path = executable()
        self._driver = sync_playwright().start()
        try:
            self._launch()
        except BaseException:
            self._driver.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._chromium.close()
        self._driver.stop()

    def pages(self, body: str, template: Template) -> Iterator[RenderedPage]:
        """The pages of a document that show text, in order.

        Args:
            body: HTML whose text is all visible, as `body.body` makes it.

        Raises:
            Unrenderable: no font has one of its characters, some of it does not fit its column, or the browser crashes
                or takes longer than a minute; it is started anew for the next document.
        """
        try:
            yield from self._rendered(body, template)
        except Error as error:
            self._chromium.close()
            self._launch()
            raise Unrenderable("the browser failed on it", _first_line(error)) from error

    def _launch(self) -> None:
        self._pages: dict[str, Page] = {}
        try:
            # As root Chromium has no sandbox; elsewhere it keeps it.
            self._chromium = self._driver.chromium.launch(
                executable_path=self._path, args=list(_FLAGS), chromium_sandbox=os.geteuid() != 0, timeout=_TIMEOUT_MS
            )
        except Error as error:
            raise DataError(f"{self._path} does not start: {_first_line(error)}") from error

    def _rendered(self, body: str, template: Template) -> Iterator[RenderedPage]:
        page = self._page(template)
        page.set_content(template.page(body), wait_until="load")
        self._check_characters(page, template)
        layout = page.evaluate(_PAGES, {"columns": template.columns, "gap": template.gap})
        if layout["problem"]:
            raise Unrenderable(layout["problem"])
        for found in layout["pages"]:
            folio = template.folio.format(page=found["number"] + 1, pages=layout["total"])
            page.evaluate(_SHOW, {"offset": found["number"] * (template.text_width + template.gap), "folio": folio})
            yield RenderedPage(found["number"] + 1, found["html"], folio, page.screenshot())

    def _page(self, template: Template) -> Page:
        if template.name not in self._pages:
            context: BrowserContext = self._chromium.new_context(
                viewport={"width": template.width, "height": template.height},
                device_scale_factor=self._scale,
                offline=True,
                service_workers="block",
            )
            context.set_default_timeout(_TIMEOUT_MS)
            context.route("**/*", lambda route: route.abort())
            self._pages[template.name] = context.new_page()
        return self._pages[template.name]

    def _check_characters(self, page: Page, template: Template) -> None:
        drawn = self._drawn.setdefault(template.font, set())
        new = "".join(sorted(set(page.locator("#flow").text_content()) - drawn))
        if missing := page.evaluate(_MISSING, {"characters": new, "font": template.font}):
            names = " ".join(f"U+{ord(character):04X}" for character in missing[:5])
            raise Unrenderable("characters that no font has", names)
        drawn.update(new)


def executable() -> str:
    """Path of the machine's Chromium.

    Raises:
        DataError: there is none.
    """
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        raise DataError(
            f"no Chromium on this machine (looked for {', '.join(NAMES)}), which pages are rendered with; install the "
            "Debian package chromium, and fonts for the documents' scripts, such as fonts-dejavu and fonts-wqy-microhei"
        )
    return found


def _first_line(error: Error) -> str:
    return error.message.strip().splitlines()[0]
