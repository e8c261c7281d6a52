import numpy as np
import pytest

from megavl.data.blend import draws


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 1.0), (0.7, 0.2, 0.1), (3, 5, 1, 11)])
def test_counts_follow_the_weights_after_any_number_of_draws(weights):
    sources = draws(weights, np.zeros(len(weights), dtype=np.int64), 1000)
    counts = np.cumsum(np.eye(len(weights))[sources], axis=0)
    shares = np.outer(np.arange(1, 1001), np.array(weights) / sum(weights))
    assert np.abs(counts - shares).max() < 1.0 + 1e-9 if len(weights) > 1 else not sources.any()


def test_draws_go_on_from_counts():
    weights = (0.5, 0.3, 0.2)
    whole = draws(weights, np.zeros(3, dtype=np.int64), 500)
    first = draws(weights, np.zeros(3, dtype=np.int64), 123)
    rest = draws(weights, np.bincount(first, minlength=3), 377)
    assert [*first, *rest] == whole.tolist()


def test_the_first_draws_by_hand():
    assert draws((2, 1), np.zeros(2, dtype=np.int64), 6).tolist() == [0, 1, 0, 0, 1, 0]
