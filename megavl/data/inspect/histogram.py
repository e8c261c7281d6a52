"""Histogram: how often values of which size occur, in a fixed number of bins whatever the values."""

from typing import NamedTuple

import numpy as np

# Bin b holds the values of b binary digits: 0, 1, 2 to 3, 4 to 7, ...
_BINS = 64


class Bin(NamedTuple):
    """`count` values from `first` to `last`, both included."""

    first: int
    last: int
    count: int


class Histogram:
    """Counts of non-negative integers in bins whose width doubles, with their exact number, sum and extremes."""

    def __init__(self) -> None:
        self.count, self.sum = 0, 0
        self.smallest, self.largest = 0, 0
        self._counts = np.zeros(_BINS, dtype=np.int64)

    def add(self, values: np.ndarray) -> None:
        """Count more values: int [n]."""
        if not len(values):
            return
        least, most = int(values.min()), int(values.max())
        self.smallest = min(self.smallest, least) if self.count else least
        self.largest = max(self.largest, most)
        self.count += len(values)
        self.sum += int(values.sum(dtype=np.int64))
        # The exponent of a whole number is how many binary digits it has.
        self._counts += np.bincount(np.frexp(values.astype(np.float64))[1], minlength=_BINS)

    @property
    def mean(self) -> float:
        """0 where nothing was counted."""
        return self.sum / self.count if self.count else 0.0

    def bins(self) -> list[Bin]:
        """From the first bin that holds a value to the last, empty ones between them included."""
        filled = np.flatnonzero(self._counts)
        if not len(filled):
            return []
        return [
            Bin((1 << digits) >> 1, max(0, (1 << digits) - 1), int(self._counts[digits]))
            for digits in range(int(filled[0]), int(filled[-1]) + 1)
        ]
