"""Document OCR pairs: blocks of a document laid out on a page, rendered, with the transcript of what is on it.

The 7B reads pages at 1024 px; a model small enough for a CPU reads them at 64 to 128. So a page holds a few sentences,
in the largest type that fits.
"""

import random
import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import matplotlib
from corpus.library import Block
from PIL import Image, ImageDraw, ImageFont

_FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
_MONOSPACE = "DejaVuSansMono.ttf"
# Not after "i.e." or "e.g.", where no capital follows.
_SENTENCE_END = re.compile(r"(?<=[.?!]) (?=[A-Z])")
_TYPE_SIZES_PX = (46, 40, 34, 30, 26, 23, 20)


@dataclass(frozen=True)
class Template:
    """How a page looks. Colours are RGB; `bar` is the ground of the heading, None for a rule under it."""

    body: str
    heading: str
    size: tuple[int, int]
    paper: tuple[int, int, int] = (255, 255, 255)
    ink: tuple[int, int, int] = (20, 20, 20)
    code_paper: tuple[int, int, int] = (236, 239, 243)
    bar: tuple[int, int, int] | None = None
    margin: int = 16


TEMPLATES = (
    Template("DejaVuSerif.ttf", "DejaVuSerif-Bold.ttf", (288, 352)),
    Template("DejaVuSans.ttf", "DejaVuSans-Bold.ttf", (320, 320), bar=(31, 78, 121)),
    Template("DejaVuSans.ttf", "DejaVuSans-Bold.ttf", (384, 272), paper=(253, 246, 227), code_paper=(238, 232, 213)),
    Template("STIXGeneral.ttf", "STIXGeneralBol.ttf", (304, 336), paper=(248, 248, 245), margin=22),
    Template(
        "DejaVuSansMono.ttf",
        "DejaVuSansMono-Bold.ttf",
        (352, 304),
        paper=(29, 31, 33),
        ink=(230, 230, 225),
        code_paper=(48, 51, 56),
        bar=(129, 60, 40),
    ),
    Template("DejaVuSerif.ttf", "DejaVuSans-Bold.ttf", (320, 256), ink=(60, 30, 20), margin=12),
)


@cache
def _font(name: str, size_px: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(_FONTS / name), size_px)


@cache
def _word_px(font: ImageFont.FreeTypeFont, word: str) -> float:
    return font.getlength(word)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width_px: float) -> list[str] | None:
    """Greedy lines of at most `width_px`, or None where one word is wider."""
    space, lines, used = _word_px(font, " "), [], 0.0
    for word in text.split():
        length = _word_px(font, word)
        if length > width_px:
            return None
        if lines and used + space + length <= width_px:
            lines[-1] += " " + word
            used += space + length
        else:
            lines.append(word)
            used = length
    return lines


@dataclass(frozen=True)
class _Line:
    text: str
    kind: str
    y: int


def _set_type(blocks: tuple[Block, ...], template: Template, size_px: int) -> list[_Line] | None:
    """Lines with their place on the page, or None where the blocks do not fit at this type size."""
    width, height = template.size
    leading, lines, y = round(1.25 * size_px), [], template.margin
    for block in blocks:
        name = {"heading": template.heading, "paragraph": template.body, "code": _MONOSPACE}[block.kind]
        # Code is set one size smaller, as books do: its lines cannot be broken.
        font = _font(name, round(0.8 * size_px) if block.kind == "code" else size_px)
        room = width - 2 * template.margin
        if block.kind == "code":
            wrapped = block.text.split("\n")
            if any(_word_px(font, line) > room for line in wrapped):
                return None
        else:
            wrapped = _wrap(block.text, font, room)
            if wrapped is None:
                return None
        for text in wrapped:
            lines.append(_Line(text, block.kind, y))
            y += leading
        y += leading // 2
    return lines if y - leading // 2 <= height - template.margin else None


def render(blocks: tuple[Block, ...], template: Template) -> Image.Image | None:
    """The page, RGB, in the largest type in which all blocks fit; None where they fit in none."""
    fitting = ((size, _set_type(blocks, template, size)) for size in _TYPE_SIZES_PX)
    size_px, lines = next(((size, lines) for size, lines in fitting if lines), (0, None))
    if lines is None:
        return None
    width, _ = template.size
    page = Image.new("RGB", template.size, template.paper)
    draw = ImageDraw.Draw(page)
    leading = round(1.25 * size_px)
    for line in lines:
        ink, top, bottom = template.ink, line.y, line.y + leading
        match line.kind:
            case "heading":
                font = _font(template.heading, size_px)
                if template.bar:
                    draw.rectangle((0, top - leading // 4, width, bottom + leading // 8), template.bar)
                    ink = (255, 255, 255)
                else:
                    draw.line((template.margin, bottom, width - template.margin, bottom), template.ink, width=2)
            case "code":
                font = _font(_MONOSPACE, round(0.8 * size_px))
                draw.rectangle((template.margin // 2, top, width - template.margin // 2, bottom), template.code_paper)
            case _:
                font = _font(template.body, size_px)
        draw.text((template.margin, top), line.text, fill=ink, font=font)
    return page


def _sentences(text: str, characters: int) -> str:
    """The first whole sentences of `text` that have at most `characters`; "" where the first is longer."""
    if len(text) <= characters:
        return text
    ends = [match.start() for match in _SENTENCE_END.finditer(text, 0, characters)]
    return text[: ends[-1]] if ends else ""


def _short(block: Block, characters: int) -> str:
    """As much of a block as a small page can hold; "" where it can hold none."""
    match block.kind:
        case "heading":
            return block.text if len(block.text) <= 24 else ""
        case "paragraph":
            return _sentences(block.text, characters)
        case "code":
            lines = block.text.split("\n")
            return block.text if len(lines) <= 5 and max(map(len, lines)) <= 30 else ""


def passages(blocks: tuple[Block, ...], characters: int) -> list[tuple[Block, ...]]:
    """Cut a document into passages of up to `characters`, for one page each.

    A heading or the signature of a function begins a passage, and none is nothing else.
    """
    found, current = [], []
    for block in blocks:
        short = _short(block, characters)
        opens = block.kind == "heading" or block.text.startswith(("def ", "class "))
        if current and (opens or sum(len(other.text) for other in current) + len(short) > characters):
            found.append(current)
            current = []
        if short:
            current.append(replace(block, text=short))
    found.append(current)
    return [tuple(passage) for passage in found if any(block.kind == "paragraph" for block in passage)]


def draw_page(blocks: tuple[Block, ...], rng: random.Random) -> Image.Image | None:
    """A page in a template drawn from `rng`, or None where the passage does not fit it."""
    return render(blocks, rng.choice(TEMPLATES))
