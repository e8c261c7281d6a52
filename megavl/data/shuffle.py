"""Shuffled order of an epoch without a table: a keyed permutation that is computed where it is needed.

A Feistel network permutes the numbers below a power of four; a result that is too large is permuted again until it
falls inside (cycle walking; Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). A table of a billion
documents would take 8 GB on every rank.
"""

import numpy as np

_ROUNDS = 6


def permute(indices: np.ndarray, size: int, key: tuple[int, ...]) -> np.ndarray:
    """Where a permutation of 0..size-1 sends the indices: int64, of the shape of `indices` (each below `size`).

    The key, non-negative integers, chooses the permutation; equal keys and sizes give the same one everywhere.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    keys = np.random.SeedSequence(key).generate_state(_ROUNDS, np.uint64)
    result = _feistel(indices.astype(np.uint64), half, keys)
    while (outside := result >= size).any():
        result[outside] = _feistel(result[outside], half, keys)
    return result.astype(np.int64)


def _feistel(values: np.ndarray, half: np.uint64, keys: np.ndarray) -> np.ndarray:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return left << half | right


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea and Flood, 2014): every input bit changes half of the output bits."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
