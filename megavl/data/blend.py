"""Blend: which source each document of a stream is drawn from."""

from collections.abc import Sequence

import numpy as np


def merge(weights: Sequence[float], drawn: Sequence[int], lengths: Sequence[np.ndarray]) -> np.ndarray:
    """The order in which the next documents of some sources are drawn: int64 indices into them, laid end to end.

    Weights are shares of tokens. Each draw takes the source that has had the fewest tokens for its weight, the first
    one where several have (start-time fair queueing; Goyal, Vin and Cheng, 1996). So no source is ahead of its share by
    more than a document, nor behind it by more than its share of one document of every source.

    A document is drawn when its source has had that many tokens for its weight, which is known beforehand: the draws
    are a sort. They end where the next document of a source would have to be known, so that all sources together give
    the same order however many documents are offered at a time.

    Args:
        weights: share of each source, any positive scale.
        drawn: tokens drawn from each source so far.
        lengths: int64 [any] for each source, tokens of its next documents; at least one, none of them 0.
    """
    tags, ends = [], []
    for weight, before, tokens in zip(weights, drawn, lengths, strict=True):
        reached = before + np.concatenate(([0], np.cumsum(tokens)))
        tags.append(reached[:-1] / weight)
        ends.append(reached[-1] / weight)
    all_tags = np.concatenate(tags)
    order = np.argsort(all_tags, kind="stable")
    return order[: np.searchsorted(all_tags[order], min(ends))]
