"""Source: one dataset as an endless sequence of documents, in an order that is shuffled anew for every epoch."""

import numpy as np

from megavl.data.format import IMAGE, TEXT
from megavl.data.shuffle import permute
from megavl.data.store import Store

# One drawn document. supervised: targets in it; segments: sequences of the store.
DRAW = np.dtype([(name, np.int64) for name in ("source", "document", "tokens", "supervised", "images", "segments")])


class Source:
    """Draws of a dataset of D documents: draw n is a document of epoch n // D, in which each comes once.

    mean_tokens: of a document, as the model sees it
    """

    def __init__(self, store: Store, number: int, image_tokens: int, key: tuple[int, ...]) -> None:
        """Adds up the lengths of the dataset.

        Args:
            number: of this source, among those of its stream.
            key: what the orders of its epochs derive from.
        """
        self._store, self._number, self._image_tokens, self._key = store, number, image_tokens, key
        is_image = store.modes == IMAGE
        text = int(np.sum(store.lengths, where=~is_image, dtype=np.int64))
        self.mean_tokens = (text + int(np.count_nonzero(is_image)) * image_tokens) / len(store)

    def draws(self, first: int, number: int) -> np.ndarray:
        """The draws `first` to `first + number`: DRAW [number]."""
        documents = self._documents(first, number)
        lengths, modes, offsets = self.segments(documents)
        is_text = modes == TEXT
        result = np.empty(number, dtype=DRAW)
        result["source"], result["document"], result["segments"] = self._number, documents, np.diff(offsets)
        result["tokens"] = _sums(lengths, offsets)
        # The first token of a document is never a target.
        result["supervised"] = _sums(lengths * is_text, offsets) - is_text[offsets[:-1]]
        result["images"] = _sums(modes == IMAGE, offsets)
        return result

    def segments(self, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(tokens, modes, offsets) of the segments of some documents, one after another: the segments of document i are
        offsets[i] to offsets[i + 1]."""
        firsts = self._store.documents[documents]
        numbers = self._store.documents[documents + 1] - firsts
        offsets = np.concatenate(([0], np.cumsum(numbers)))
        sequences = np.repeat(firsts - offsets[:-1], numbers) + np.arange(offsets[-1])
        modes = self._store.modes[sequences]
        lengths = np.where(modes == IMAGE, self._image_tokens, self._store.lengths[sequences]).astype(np.int64)
        return lengths, modes, offsets

    def _documents(self, first: int, number: int) -> np.ndarray:
        epochs, places = np.divmod(np.arange(first, first + number), len(self._store))
        return permute(places, len(self._store), self._key, epochs)


def _sums(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Sum of the values in each range offsets[i] to offsets[i + 1]."""
    total = np.concatenate(([0], np.cumsum(values, dtype=np.int64)))
    return total[offsets[1:]] - total[offsets[:-1]]
