"""Datasets of which only the lengths and the sizes of images exist: what packing sees of a store."""

from types import SimpleNamespace

import numpy as np
import pyarrow as pa

from megavl.config.tiles import Tiling
from megavl.data.format import IMAGE, PROMPT, TEXT
from tests.data.conftest import MODEL, TILED_MODEL
from tests.models import changed


def tiled(**changes):
    """Tiles of 4 features and 32 pixels, with fields of their section changed."""
    return Tiling(changed(TILED_MODEL, tiling=changes))


# 16 tokens for each image.
WHOLE = Tiling(MODEL)
TILED = tiled()


class Shape:
    """Documents given as lists of (length, mode), or (size in pixels, mode) of an image."""

    prefix = "shape"

    def __init__(self, documents, name="shape"):
        segments = [segment for document in documents for segment in document]
        self.lengths = np.array([1 if mode == IMAGE else length for length, mode in segments], dtype=np.int32)
        self.modes = np.array([mode for _, mode in segments], dtype=np.int8)
        self.documents = np.cumsum([0, *map(len, documents)])
        self.meta = SimpleNamespace(idx_sha256=name)
        self.sizes = [[size for size, mode in document if mode == IMAGE] for document in documents]

    def __len__(self):
        return len(self.documents) - 1

    def spans(self, documents):
        return self.documents[documents], self.documents[documents + 1]

    def batches(self):
        """As the .meta file has them, some documents at a time."""
        rows = [[{"width": width, "height": height} for width, height in sizes] for sizes in self.sizes]
        images = pa.list_(pa.struct([("width", pa.int32()), ("height", pa.int32())]))
        for first in range(0, len(rows), 25):
            yield pa.record_batch({"images": pa.array(rows[first : first + 25], images)})

    def segments(self, tiling, document):
        """(tokens, tiles, mode) of the segments of a document, one at a time."""
        sizes, result = iter(self.sizes[document]), []
        for sequence in range(*self.documents[document : document + 2]):
            mode = int(self.modes[sequence])
            if mode == IMAGE:
                grid = tiling.grid(*next(sizes), len(self.sizes[document]))
                result.append((len(tiling.layout(grid)), grid.tiles, mode))
            else:
                result.append((int(self.lengths[sequence]), 0, mode))
        return result

    def tokens(self, tiling):
        """Modes of the tokens of each document."""
        return [
            np.concatenate([np.full(length, mode) for length, _, mode in self.segments(tiling, document)])
            for document in range(len(self))
        ]


def texts(number, seed, scale=40.0, name=None):
    """Lognormal texts, as corpora have them."""
    lengths = np.random.default_rng(seed).lognormal(np.log(scale), 1.0, number)
    return Shape([[(max(2, int(length)), TEXT)] for length in lengths], name or f"texts {seed}")


def interleaved(number, seed, name=None):
    """One to six segments, each text, prompt or image."""
    random = np.random.default_rng(seed)
    documents = [
        [
            (tuple(random.integers(8, 120, 2).tolist()) if mode == IMAGE else int(random.integers(2, 40)), int(mode))
            for mode in random.choice([TEXT, IMAGE, PROMPT], random.integers(1, 7), p=[0.5, 0.4, 0.1])
        ]
        for _ in range(number)
    ]
    return Shape(documents, name or f"interleaved {seed}")
