import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megavl.data.pack import best_fit


def packs_of(tokens, budget, tiles=None, max_tiles=0):
    tiles = [0] * len(tokens) if tiles is None else tiles
    return best_fit(np.array(tokens), np.array(tiles), budget, max_tiles)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_every_piece_is_in_one_pack_within_both_budgets(data):
    budget, max_tiles = data.draw(st.integers(1, 60)), data.draw(st.integers(0, 5))
    pieces = data.draw(st.lists(st.tuples(st.integers(1, budget), st.integers(0, max_tiles)), max_size=80))
    tokens, tiles = [length for length, _ in pieces], [images for _, images in pieces]
    packs = packs_of(tokens, budget, tiles, max_tiles)
    assert sorted(index for pack in packs for index in pack) == list(range(len(pieces)))
    for pack in packs:
        assert sum(tokens[index] for index in pack) <= budget
        assert sum(tiles[index] for index in pack) <= max_tiles
    # Of any two packs, what the later one began with did not fit into the other: half of some budget is used.
    assert len(packs) <= 1 + 2 * max(sum(tokens) / budget, sum(tiles) / max(1, max_tiles)) * (1 + bool(max_tiles))


@pytest.mark.parametrize(
    ("tokens", "budget", "packs"),
    [
        ([6, 5, 4, 3, 9], 10, [[4], [0, 2], [1, 3]]),
        ([7, 6, 3, 4], 10, [[0, 2], [1, 3]]),  # 4 goes beside 6, where first-fit finds no room either
        ([5, 8, 2, 5], 10, [[1, 2], [0, 3]]),
        ([10, 10], 10, [[0], [1]]),
        ([8, 7, 2], 10, [[0, 2], [1]]),  # the least room that is enough
        ([], 10, []),
    ],
)
def test_by_hand(tokens, budget, packs):
    assert packs_of(tokens, budget) == packs


def test_the_budget_of_tiles_by_hand():
    assert packs_of([5, 2, 2, 1], 10, [0, 1, 1, 1], 2) == [[1, 2, 0], [3]]
    assert packs_of([5, 2, 2, 1], 10, [0, 1, 1, 1], 3) == [[1, 2, 0, 3]]


def test_a_window_of_lognormal_lengths_leaves_next_to_nothing_empty():
    tokens = np.minimum(1024, np.random.default_rng(0).lognormal(6, 1, 2048).astype(int) + 1)
    packs = packs_of(tokens, 1024)
    assert tokens.sum() / (1024 * len(packs)) > 0.997  # measured 0.9978
