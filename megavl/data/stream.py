"""Stream: the endless sequence of packs of one modality, a pure function of the seed.

Documents are drawn from the sources by weight, in an order shuffled anew for every epoch of a source, and packed
window by window: a window is a fixed number of drawn documents, and no pack crosses its border. So pack n is found by
counting packs per window, without reading a token.
"""

import bisect

import numpy as np

from megavl.data import blend
from megavl.data.format import IMAGE
from megavl.data.pack import Pack, Piece, cut, first_fit
from megavl.data.shuffle import permute
from megavl.data.store import Store

# Documents per window: some thousand packs, of which the last few are less than full.
_WINDOW = 8192


class Stream:
    """Packs of the documents in some stores, numbered from 0 without end."""

    def __init__(
        self,
        stores: tuple[Store, ...],
        weights: tuple[float, ...],
        seq_len: int,
        image_tokens: int,
        key: tuple[int, ...],
    ) -> None:
        """Nothing is computed before the first pack is asked for.

        Args:
            seq_len: tokens of a pack.
            image_tokens: tokens of one image, at most `seq_len`.
            key: what the shuffles derive from, with the source and its epoch.
        """
        self._stores, self._weights, self._key = stores, weights, key
        self._seq_len, self._image_tokens = seq_len, image_tokens
        # Window w starts with pack _first[w], after _drawn[w] documents of each source.
        self._first = [0]
        self._drawn = [np.zeros(len(stores), dtype=np.int64)]
        self._cached: tuple[int, list[Pack]] = (-1, [])

    def pack(self, number: int) -> Pack:
        """The pieces of a pack, in order. Ascending numbers are cheap; a jump ahead packs the windows between."""
        while self._first[-1] <= number:
            self._window(len(self._first) - 1)
        window = bisect.bisect_right(self._first, number) - 1
        return self._window(window)[number - self._first[window]]

    def _window(self, window: int) -> list[Pack]:
        if self._cached[0] == window:
            return self._cached[1]
        drawn = self._drawn[window]
        sources = blend.draws(self._weights, drawn, _WINDOW)
        documents = np.empty(_WINDOW, dtype=np.int64)
        for source in range(len(self._stores)):
            mine = np.flatnonzero(sources == source)
            documents[mine] = self._documents(source, int(drawn[source]), len(mine))
        pieces = self._pieces(sources, documents)
        packs = [
            tuple(pieces[index] for index in chosen)
            for chosen in first_fit([piece.tokens for piece in pieces], self._seq_len)
        ]
        if window == len(self._first) - 1:
            self._first.append(self._first[-1] + len(packs))
            self._drawn.append(drawn + np.bincount(sources, minlength=len(self._stores)))
        self._cached = (window, packs)
        return packs

    def _documents(self, source: int, first: int, number: int) -> np.ndarray:
        """The documents that the draws `first` to `first + number` of a source take: every one once per epoch."""
        size = len(self._stores[source])
        epochs, places = np.divmod(np.arange(first, first + number), size)
        result = np.empty(number, dtype=np.int64)
        for epoch in np.unique(epochs).tolist():
            inside = epochs == epoch
            result[inside] = permute(places[inside], size, (*self._key, source, epoch))
        return result

    def _pieces(self, sources: np.ndarray, documents: np.ndarray) -> list[Piece]:
        """The documents as pieces, in the order of the draws; a document that is longer than a pack gives several."""
        pieces: list[list[Piece]] = [[] for _ in range(len(documents))]
        for source, store in enumerate(self._stores):
            mine = np.flatnonzero(sources == source)
            firsts, stops = store.documents[documents[mine]], store.documents[documents[mine] + 1]
            numbers = stops - firsts
            offsets = np.concatenate(([0], np.cumsum(numbers)))
            # Sequences of all these documents, one after another.
            sequences = np.repeat(firsts - offsets[:-1], numbers) + np.arange(offsets[-1])
            is_image = store.modes[sequences] == IMAGE
            lengths = np.where(is_image, self._image_tokens, store.lengths[sequences]).astype(np.int64)
            tokens = _sums(lengths, offsets)
            images = _sums(is_image.astype(np.int64), offsets)
            text = tokens - images * self._image_tokens
            # The first token of a document is never a target.
            supervised = text - ~is_image[offsets[:-1]]
            columns = (mine, documents[mine], tokens, supervised, images, offsets[:-1], offsets[1:])
            for draw, document, length, targets, pictures, start, stop in zip(
                *(column.tolist() for column in columns), strict=True
            ):
                if length <= self._seq_len:
                    pieces[draw].append(Piece(source, document, 0, length, targets, pictures))
                    continue
                segments = zip(lengths[start:stop].tolist(), is_image[start:stop].tolist(), strict=True)
                pieces[draw] += [Piece(source, document, *part) for part in cut(segments, self._seq_len)]
        return [piece for group in pieces for piece in group]


def _sums(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Sum of the values in each range offsets[i] to offsets[i + 1]."""
    total = np.concatenate(([0], np.cumsum(values)))
    return total[offsets[1:]] - total[offsets[:-1]]
