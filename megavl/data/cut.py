"""Cutting: a document that does not fit a pack becomes several pieces, and no image is ever split."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from megavl.data.format import IMAGE, TEXT
from megavl.data.pack import Piece
from megavl.data.source import Source

_PIECE = np.dtype([(name, np.int64) for name in Piece._fields if name != "grids"])


class Part(NamedTuple):
    """One part of a document: `Piece` without its place."""

    start: int
    stop: int
    supervised: int
    images: int
    tiles: int


def cut(segments: Iterable[tuple[int, int, int]], budget: int, max_tiles: int) -> list[Part]:
    """Parts of a document that hold at most `budget` tokens and `max_tiles` tiles, in order and without gaps.

    A document is cut between two segments; only a text that is itself longer than a pack is cut inside, and then it
    fills up the part that it begins in. A part's last position still predicts the token behind the cut, so that the
    supervised tokens of all parts are those of the document.

    Args:
        segments: (tokens, tiles, mode of the store) of each segment; an image keeps both budgets.
    """
    parts: list[Part] = []
    start = position = targets = images = held = 0
    starts_with_target = False
    for length, tiles, mode in segments:
        is_image, is_target = mode == IMAGE, mode == TEXT
        whole = length <= budget
        while length:
            room = budget - (position - start)
            if room < (length if whole else 1) or held + tiles > max_tiles:
                parts.append(Part(start, position, targets - starts_with_target + is_target, images, held))
                start, targets, images, held, room = position, 0, 0, 0, budget
            if position == start:
                starts_with_target = is_target
            taken = min(length, room)
            images += is_image
            held += tiles
            targets += taken * is_target
            position += taken
            length -= taken
    parts.append(Part(start, position, targets - starts_with_target, images, held))
    return parts


def pieces(draws: np.ndarray, sources: Sequence[Source], budget: int, max_tiles: int) -> np.ndarray:
    """The drawn documents as pieces, in the same order: the fields of `Piece` but for its grids [any].

    Args:
        draws: DRAW [any] of the sources.
        budget, max_tiles: tokens and tiles of a piece at most.
    """
    fits = (draws["tokens"] <= budget) & (draws["tiles"] <= max_tiles)
    # A single text is cut like a ruler, all such documents at once; others at the borders of their segments.
    by_segment = ~fits & (draws["segments"] > 1)
    parts = []
    for source, document in draws[by_segment][["source", "document"]].tolist():
        segments = sources[source].segments(np.array([document]))
        columns = (column.tolist() for column in (segments.tokens, segments.tiles, segments.modes))
        parts.append(cut(zip(*columns, strict=True), budget, max_tiles))
    numbers = np.where(fits, 1, -(-draws["tokens"] // budget))
    numbers[by_segment] = [len(found) for found in parts]

    of = np.repeat(draws, numbers)
    place = np.arange(len(of)) - np.repeat(np.cumsum(numbers) - numbers, numbers)
    result = np.empty(len(of), dtype=_PIECE)
    for name in ("source", "document", "images", "tiles"):
        result[name] = of[name]
    result["start"] = place * budget
    result["stop"] = np.minimum(result["start"] + budget, of["tokens"])
    # Of a text that is learned, only the last position of the last part predicts nothing.
    of_cut_text = (result["stop"] - result["start"] - (result["stop"] == of["tokens"])) * (of["supervised"] > 0)
    result["supervised"] = np.where(np.repeat(numbers == 1, numbers), of["supervised"], of_cut_text)
    if parts:
        rows = np.repeat(by_segment, numbers)
        for name, column in zip(Part._fields, np.concatenate(parts).T, strict=True):
            result[name][rows] = column
    return result
