"""Blend: which source each document of a stream is drawn from."""

import numpy as np


def draws(weights: tuple[float, ...], counts: np.ndarray, number: int) -> np.ndarray:
    """Sources of the next `number` documents: int64 [number].

    Each draw takes the source that lags furthest behind its share so far, the rule of Megatron's BlendedDataset: the
    counts follow the weights from the first draws on.

    Args:
        weights: share of each source, any positive scale.
        counts: int64 [sources], documents drawn from each source so far.
    """
    if len(weights) == 1:
        return np.zeros(number, dtype=np.int64)
    shares = [weight / sum(weights) for weight in weights]
    first = int(counts.sum()) + 1
    deficits = [share * first - int(count) for share, count in zip(shares, counts, strict=True)]
    result = np.empty(number, dtype=np.int64)
    for draw in range(number):
        source = deficits.index(max(deficits))
        result[draw] = source
        deficits[source] -= 1
        deficits = [deficit + share for deficit, share in zip(deficits, shares, strict=True)]
    return result
