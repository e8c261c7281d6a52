"""Cutting: a document that does not fit a pack becomes several pieces, and no image is ever split."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from megavl.data.format import IMAGE, TEXT
from megavl.data.pack import Piece
from megavl.data.source import Source

_PIECE = np.dtype([(name, np.int64) for name in Piece._fields])


class Part(NamedTuple):
    """One part of a document: `Piece` without its place."""

    start: int
    stop: int
    supervised: int
    images: int


def cut(segments: Iterable[tuple[int, int]], budget: int, max_tiles: int) -> list[Part]:
    """Parts of a document that hold at most `budget` tokens and `max_tiles` images, in order and without gaps.

    A document is cut between two segments; only a text that is itself longer than a pack is cut inside, and then it
    fills up the part that it begins in. A part's last position still predicts the token behind the cut, so that the
    supervised tokens of all parts are those of the document.

    Args:
        segments: (tokens, mode of the store) of each segment; an image has at most `budget` tokens.
    """
    parts: list[Part] = []
    start = position = targets = images = 0
    starts_with_target = False
    for length, mode in segments:
        is_image, is_target = mode == IMAGE, mode == TEXT
        whole = length <= budget
        while length:
            room = budget - (position - start)
            if room < (length if whole else 1) or (is_image and images == max_tiles):
                parts.append(Part(start, position, targets - starts_with_target + is_target, images))
                start, targets, images, room = position, 0, 0, budget
            if position == start:
                starts_with_target = is_target
            taken = min(length, room)
            images += is_image
            targets += taken * is_target
            position += taken
            length -= taken
    parts.append(Part(start, position, targets - starts_with_target, images))
    return parts


def pieces(draws: np.ndarray, sources: Sequence[Source], budget: int, max_tiles: int) -> np.ndarray:
    """The drawn documents as pieces, in the same order: the fields of `Piece` [any].

    Args:
        draws: DRAW [any] of the sources.
        budget, max_tiles: tokens and images of a piece at most.
    """
    fits = (draws["tokens"] <= budget) & (draws["images"] <= max_tiles)
    # A single text is cut like a ruler, all such documents at once; others at the borders of their segments.
    by_segment = ~fits & (draws["segments"] > 1)
    parts = []
    for source, document in draws[by_segment][["source", "document"]].tolist():
        lengths, modes, _ = sources[source].segments(np.array([document]))
        parts.append(cut(zip(lengths.tolist(), modes.tolist(), strict=True), budget, max_tiles))
    numbers = np.where(fits, 1, -(-draws["tokens"] // budget))
    numbers[by_segment] = [len(found) for found in parts]

    of = np.repeat(draws, numbers)
    place = np.arange(len(of)) - np.repeat(np.cumsum(numbers) - numbers, numbers)
    result = np.empty(len(of), dtype=_PIECE)
    result["source"], result["document"], result["images"] = of["source"], of["document"], of["images"]
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
