"""PDF pages: the picture of a page and its text layer.

The text is what PDFium reads of the page's visible area, in the order of the file, with its line breaks; a hyphen that
it knows to be of a line break is removed together with the break. Pages are left out that have no text layer (scans),
little of it (covers, plates), or one whose glyphs are not mapped to characters.
"""

import io
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pypdfium2

from megavl.data.construct.sample import Dropped, Sample

# Pixels of a page's picture: an A0 poster at 144 dpi has 31 million.
MAX_PIXELS = 50_000_000
# Share of a page's characters that may be unmapped, shown as replacement or private-use characters.
_MAX_UNMAPPED = 0.02
_POINTS_PER_INCH = 72
# What PDFium puts where a word is hyphenated at the end of a line.
_HYPHEN = "\ufffe"


@dataclass(frozen=True)
class Pdf:
    """Pairs of pages and their text.

    dpi:       pixels per inch of the pictures
    min_chars: characters other than white space that a page needs
    """

    dpi: int = 144
    min_chars: int = 50
    suffixes: tuple[str, ...] = (".pdf",)

    def samples(self, paths: Sequence[str]) -> Iterator[Sample | Dropped]:
        for path in paths:
            try:
                document = pypdfium2.PdfDocument(Path(path).read_bytes())
            except OSError as error:
                yield Dropped(path, "cannot be read", str(error.strerror))
                continue
            except pypdfium2.PdfiumError as error:
                encrypted = "password" in str(error).lower()
                yield Dropped(path, "encrypted" if encrypted else "damaged", str(error))
                continue
            with document:
                for number in range(1, len(document) + 1):
                    try:
                        yield self._page(f"{path}:{number}", document, number - 1)
                    except pypdfium2.PdfiumError as error:
                        yield Dropped(f"{path}:{number}", "damaged", str(error))

    def _page(self, where: str, document: pypdfium2.PdfDocument, index: int) -> Sample | Dropped:
        page = document[index]
        scale = self.dpi / _POINTS_PER_INCH
        width, height = (round(side * scale) for side in page.get_size())
        if width * height > MAX_PIXELS:
            return Dropped(where, f"more than {MAX_PIXELS:,} pixels", f"{width} x {height}")
        text = _clean(page.get_textpage().get_text_bounded())
        characters = sum(not character.isspace() for character in text)
        if not characters:
            return Dropped(where, "no text layer")
        if characters < self.min_chars:
            return Dropped(where, f"fewer than {self.min_chars} characters", str(characters))
        unmapped = sum(character == "\ufffd" or unicodedata.category(character) in ("Co", "Cn") for character in text)
        if unmapped > _MAX_UNMAPPED * characters:
            return Dropped(where, "text layer without characters", f"{unmapped} of {characters}")
        picture = io.BytesIO()
        page.render(scale=scale).to_pil().convert("RGB").save(picture, "PNG")
        return Sample(where, picture.getvalue(), ".png", text)


def _clean(text: str) -> str:
    text = text.replace("\r\n", "\n").replace(f"{_HYPHEN}\n", "").replace(_HYPHEN, "")
    text = "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs"))
    return "\n".join(line.rstrip() for line in text.split("\n")).strip()
