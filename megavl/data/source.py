"""Source: one dataset as an endless sequence of documents, in an order that is shuffled anew for every epoch."""

import itertools
from typing import NamedTuple

import numpy as np

from megavl.config.tiles import Tiling
from megavl.data.format import IMAGE, TEXT
from megavl.data.grids import image_grids
from megavl.data.shuffle import permute
from megavl.data.store import Store

# One drawn document. supervised: targets in it; segments: sequences of the store.
_FIELDS = ("source", "document", "tokens", "supervised", "images", "tiles", "segments")
DRAW = np.dtype([(name, np.int64) for name in _FIELDS])


class Segments(NamedTuple):
    """The sequences of some documents, one after another: those of document i are offsets[i] to offsets[i + 1].

    tokens:  int64 [S], as the model sees them
    tiles:   int64 [S], of an image
    modes:   int8 [S]
    grids:   uint8 [S], of an image, index into `Tiling.grids`
    offsets: int64 [documents + 1]
    """

    tokens: np.ndarray
    tiles: np.ndarray
    modes: np.ndarray
    grids: np.ndarray
    offsets: np.ndarray


class Source:
    """Draws of a dataset of D documents: draw n is a document of epoch n // D, in which each comes once.

    mean_tokens: of a document, as the model sees it
    has_images:  whether any document has one
    """

    def __init__(self, store: Store, number: int, tiling: Tiling, key: tuple[int, ...]) -> None:
        """Adds up the lengths of the dataset.

        Args:
            number: of this source, among those of its stream.
            key: what the orders of its epochs derive from.

        Raises:
            DataError: the sizes of its images are not those of its files.
        """
        self._store, self._number, self._tiling, self._key = store, number, tiling, key
        self._grids = image_grids(store, tiling)
        self.has_images = bool(self._grids.images.any())
        text = int(np.sum(store.lengths, where=store.modes != IMAGE, dtype=np.int64))
        self.mean_tokens = (text + int(self._grids.images @ tiling.tokens)) / len(store)

    def draws(self, first: int, number: int) -> np.ndarray:
        """The draws `first` to `first + number`: DRAW [number]."""
        documents = self._documents(first, number)
        tokens, tiles, modes, _, offsets = self.segments(documents)
        is_text = modes == TEXT
        result = np.empty(number, dtype=DRAW)
        result["source"], result["document"], result["segments"] = self._number, documents, np.diff(offsets)
        result["tokens"], result["tiles"] = _sums(tokens, offsets), _sums(tiles, offsets)
        # The first token of a document is never a target.
        result["supervised"] = _sums(tokens * is_text, offsets) - is_text[offsets[:-1]]
        result["images"] = _sums(modes == IMAGE, offsets)
        return result

    def segments(self, documents: np.ndarray) -> Segments:
        """The segments of some documents."""
        firsts = self._store.documents[documents]
        numbers = self._store.documents[documents + 1] - firsts
        offsets = np.concatenate(([0], np.cumsum(numbers)))
        sequences = np.repeat(firsts - offsets[:-1], numbers) + np.arange(offsets[-1])
        modes = self._store.modes[sequences]
        is_image, grids = modes == IMAGE, self._grids.of_sequence[sequences]
        tokens = np.where(is_image, self._tiling.tokens[grids], self._store.lengths[sequences])
        return Segments(tokens, self._tiling.tiles[grids] * is_image, modes, grids, offsets)

    def grids(self, documents: np.ndarray) -> list[bytes]:
        """Of each document the grids of its images, in order: an index into `Tiling.grids` each."""
        _, _, modes, grids, offsets = self.segments(documents)
        is_image = modes == IMAGE
        of_images = grids[is_image].tobytes()
        borders = np.concatenate(([0], np.cumsum(is_image)))[offsets].tolist()
        return [of_images[first:stop] for first, stop in itertools.pairwise(borders)]

    def _documents(self, first: int, number: int) -> np.ndarray:
        epochs, places = np.divmod(np.arange(first, first + number), len(self._store))
        return permute(places, len(self._store), self._key, epochs)


def _sums(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Sum of the values in each range offsets[i] to offsets[i + 1]."""
    total = np.concatenate(([0], np.cumsum(values, dtype=np.int64)))
    return total[offsets[1:]] - total[offsets[:-1]]
