"""Statistics and samples on a terminal. Text of documents is data there, too: it cannot send control sequences."""

import unicodedata
from collections.abc import Iterator, Mapping, Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from megavl.data.inspect.histogram import Histogram
from megavl.data.inspect.shown import ImagePart, Role, Sample, TextPart
from megavl.data.inspect.statistics import Statistics
from megavl.data.progress import size

# Cells of the longest bar of a histogram.
_BAR = 40
# Source files that are listed, those with the most tokens first.
_SOURCES = 20
# Neighbouring tokens are told apart by their shade, in the colour of what they are to the loss.
_STYLES = {
    Role.TARGET: ("on dark_green", "on green4"),
    Role.PROMPT: ("on navy_blue", "on blue3"),
    Role.NEVER: ("on grey30", "on grey30"),
}


def summary(datasets: Sequence[Statistics]) -> RenderableType:
    """What the datasets hold: counts, histograms and sources of each, then the counts of all."""
    parts = [part for statistics in datasets for part in _details(statistics)]
    if len(datasets) > 1:
        parts += [_heading(f"{len(datasets)} datasets together"), _facts(datasets)]
    return Group(*parts)


def sample(shown: Sample, special: Mapping[int, str], borders: bool) -> RenderableType:
    """A document as text, each image as one line.

    Args:
        special: spelling of the special tokens by their ids.
        borders: show where tokens begin, and in colours what they are to the loss.
    """
    title = (
        f"{printable(shown.key)} (document {shown.document} of {shown.store.prefix}, from {printable(shown.source)})"
    )
    lines: list[RenderableType] = [Rule(Text(title, style="bold"), align="left")]
    for part in shown.parts:
        match part:
            case ImagePart():
                lines.append(Text(image(part), style="yellow"))
            case TextPart():
                prompt = part.roles[-1] is Role.PROMPT
                heading = f"[{'prompt' if prompt else 'text'} {len(part.ids):,} tokens]"
                lines += [Text(heading, style="dim"), _text(part, special, borders)]
    if shown.left_tokens:
        lines.append(Text(f"[{shown.left_tokens:,} more of {shown.tokens:,} tokens]", style="dim"))
    return Group(*lines)


def image(part: ImagePart) -> str:
    """[image 288x352 PNG 13,955 bytes, 1 x 1 tiles, 421 tokens]"""
    taken = f", {part.taken}" * bool(part.taken)
    return f"[image {part.width}x{part.height} {part.form} {part.size_bytes:,} bytes{taken}]"


def printable(text: str, keep: str = "") -> str:
    """The text with every control character spelled out, but for those to keep."""
    return "".join(
        character if character in keep or unicodedata.category(character) != "Cc" else f"\\x{ord(character):02x}"
        for character in text
    )


def _text(part: TextPart, special: Mapping[int, str], borders: bool) -> Text:
    """With borders, pieces stand between bars, which a file keeps, and a line break is shown before it is made."""
    result = Text()
    for index, (token, piece, role) in enumerate(zip(part.ids, part.pieces, part.roles, strict=True)):
        shown = printable(piece, keep="\n\t")
        if borders:
            shown = shown.replace("\n", "↵\n")
            result.append("│", style="dim")
        if token in special:
            result.append(printable(special[token]), style="bold magenta")
        elif borders:
            result.append(shown, style=_STYLES[role][index % 2])
        else:
            result.append(shown, style="cyan" if role is Role.PROMPT else "")
    return result


def _heading(text: str) -> RenderableType:
    return Padding(Rule(Text(text, style="bold"), align="left"), (1, 0))


def _facts(datasets: Sequence[Statistics]) -> Table:
    counts = {
        name.replace("_", " "): f"{sum(getattr(one, name) for one in datasets):,}"
        for name in ("documents", "tokens", "images", "sequences", "prompt_tokens", "target_tokens")
    }
    if any(one.tiles for one in datasets):
        counts |= {
            "tiles": f"{sum(one.tiles for one in datasets):,}",
            "image tokens": f"{sum(one.model_tokens for one in datasets):,}",
        }
    sizes = {
        name: size(sum(getattr(one, field) for one in datasets))
        for name, field in ((".bin file", "stored_bytes"), ("image files", "image_bytes"))
    }
    cells = [cell for name, value in (counts | sizes).items() for cell in (Text(name, style="dim"), value)]
    table = Table.grid(padding=(0, 2))
    for _ in range(3):
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True, justify="right")
    for first in range(0, len(cells), 6):
        table.add_row(*cells[first : first + 6])
    return table


def _details(statistics: Statistics) -> Iterator[RenderableType]:
    yield _heading(statistics.prefix)
    yield _facts([statistics])
    yield from _histogram("tokens per document", statistics.document_tokens)
    if statistics.images:
        yield from _histogram("images per document", statistics.document_images)
        yield from _histogram("longer side of the images, in pixels", statistics.image_sides)
    if statistics.tiles > statistics.images:
        yield from _histogram("tiles per image, overview included", statistics.image_tiles)
    yield from _sources(statistics)


def _histogram(title: str, histogram: Histogram) -> Iterator[RenderableType]:
    yield Text.assemble(
        (f"\n{title}", "bold"), f": {histogram.mean:,.1f} on average, {histogram.smallest:,} to {histogram.largest:,}"
    )
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    bins = histogram.bins()
    most = max(one.count for one in bins)
    for one in bins:
        # Not a single one of very many is invisible.
        bar = "█" * round(_BAR * one.count / most) or ("▏" if one.count else "")
        table.add_row(interval(one.first, one.last), Text(bar, style="green"), f"{one.count:,}")
    yield Padding(table, (0, 0, 0, 2))


def interval(first: int, last: int) -> str:
    """4, 7 -> "4–7"; 1, 1 -> "1"."""
    return f"{first:,}" if first == last else f"{first:,}–{last:,}"


def _sources(statistics: Statistics) -> Iterator[RenderableType]:
    ranked = sorted(statistics.sources.items(), key=lambda item: -item[1].tokens)
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("source", overflow="fold")
    counts = ("documents", "tokens", "images", "tiles")[: 4 if statistics.tiles else 3]
    for name in counts:
        table.add_column(name, justify="right", no_wrap=True)
    for name, share in ranked[:_SOURCES]:
        table.add_row(printable(name), *(f"{getattr(share, count):,}" for count in counts))
    yield Padding(table, (1, 0, 0, 0))
    if len(ranked) > _SOURCES:
        yield Text(f"and {len(ranked) - _SOURCES:,} more sources", style="dim")
