"""Datasets of which only the lengths exist: what packing sees of a store."""

from types import SimpleNamespace

import numpy as np

from megavl.data.format import IMAGE, PROMPT, TEXT


class Shape:
    """Documents given as lists of (length, mode)."""

    def __init__(self, documents, name="shape"):
        segments = [segment for document in documents for segment in document]
        self.lengths = np.array([length for length, _ in segments], dtype=np.int32)
        self.modes = np.array([mode for _, mode in segments], dtype=np.int8)
        self.documents = np.cumsum([0, *map(len, documents)])
        self.meta = SimpleNamespace(idx_sha256=name)

    def __len__(self):
        return len(self.documents) - 1

    def tokens(self, image_tokens):
        """Modes of the tokens of each document."""
        return [
            np.concatenate(
                [
                    np.full(image_tokens if mode == IMAGE else length, mode)
                    for length, mode in zip(self.lengths[first:stop], self.modes[first:stop], strict=True)
                ]
            )
            for first, stop in zip(self.documents, self.documents[1:], strict=False)
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
            (int(random.integers(2, 40)), int(mode))
            for mode in random.choice([TEXT, IMAGE, PROMPT], random.integers(1, 7), p=[0.5, 0.4, 0.1])
        ]
        for _ in range(number)
    ]
    return Shape(documents, name or f"interleaved {seed}")
