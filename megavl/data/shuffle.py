"""Shuffled order of an epoch without a table: a keyed permutation that is computed where it is needed.

A Feistel network permutes the numbers below a power of four; a result that is too large is permuted again until it
falls inside (cycle walking; Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). A table of a billion
documents would take 8 GB on every rank.
"""

import numpy as np

_ROUNDS = 6


def permute(indices: np.ndarray, size: int, key: tuple[int, ...], epochs: np.ndarray | int = 0) -> np.ndarray:
    """Where permutations of 0..size-1 send the indices: int64, of the shape of `indices` (each below `size`).

    The key, non-negative integers, and the epoch choose the permutation; equal ones give the same everywhere.

    Args:
        epochs: of all indices, or int64 of their shape.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    states = np.random.SeedSequence(key).generate_state(_ROUNDS, np.uint64)
    # Each epoch has its own round keys: splitmix64, which goes up by this odd constant.
    steps = np.broadcast_to(epochs, indices.shape).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    result = _feistel(indices.astype(np.uint64), half, states, steps)
    while (outside := result >= size).any():
        result[outside] = _feistel(result[outside], half, states, steps[outside])
    return result.astype(np.int64)


def _feistel(values: np.ndarray, half: np.uint64, states: np.ndarray, steps: np.ndarray) -> np.ndarray:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for state in states:
        left, right = right, left ^ (_mix(right ^ _mix(state + steps)) & mask)
    return left << half | right


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea and Flood, 2014): every input bit changes half of the output bits."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
