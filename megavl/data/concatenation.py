"""Concatenation: what laying documents end to end and cutting at every pack would do to them, for comparison.

It fills every pack and is what Megatron's GPTDataset does; megavl's packs keep documents and images whole.
"""

import numpy as np

from megavl.data.format import IMAGE
from megavl.data.source import Source


def cuts(source: Source, number: int, seq_len: int) -> tuple[int, int]:
    """(documents, images) that a cut after every `seq_len` tokens goes through, among the first draws of a source."""
    segments = source.segments(source.draws(0, number)["document"])
    borders, is_image = np.concatenate(([0], np.cumsum(segments.tokens))), segments.modes == IMAGE
    images = _crossed(borders[:-1][is_image], borders[1:][is_image], seq_len)
    return _crossed(borders[segments.offsets[:-1]], borders[segments.offsets[1:]], seq_len), images


def _crossed(starts: np.ndarray, stops: np.ndarray, seq_len: int) -> int:
    return int(np.count_nonzero(starts // seq_len != (stops - 1) // seq_len))
