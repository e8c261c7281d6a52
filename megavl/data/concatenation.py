"""Concatenation: what laying documents end to end and cutting at every pack would do to them, for comparison.

It fills every pack and is what Megatron's GPTDataset does; megavl's packs keep documents and images whole.
"""

import numpy as np

from megavl.data.format import IMAGE
from megavl.data.source import Source


def cuts(source: Source, number: int, seq_len: int) -> tuple[int, int]:
    """(documents, images) that a cut after every `seq_len` tokens goes through, among the first draws of a source."""
    lengths, modes, offsets = source.segments(source.draws(0, number)["document"])
    borders = np.concatenate(([0], np.cumsum(lengths)))
    images = _crossed(borders[:-1][modes == IMAGE], borders[1:][modes == IMAGE], seq_len)
    return _crossed(borders[offsets[:-1]], borders[offsets[1:]], seq_len), images


def _crossed(starts: np.ndarray, stops: np.ndarray, seq_len: int) -> int:
    return int(np.count_nonzero(starts // seq_len != (stops - 1) // seq_len))
