import numpy as np
import pytest

from megavl.data.shuffle import permute


@pytest.mark.parametrize("size", [*range(1, 40), 255, 256, 257, 1000, 65537])
def test_it_is_a_permutation_whatever_the_size(size):
    assert np.sort(permute(np.arange(size), size, (1, 2))).tolist() == list(range(size))


def test_places_can_be_asked_one_by_one_and_in_any_order():
    whole = permute(np.arange(1000), 1000, (5,))
    some = np.array([999, 3, 3, 500])
    assert permute(some, 1000, (5,)).tolist() == whole[some].tolist()


def test_other_keys_give_unrelated_orders():
    size = 4096
    orders = [permute(np.arange(size), size, key) for key in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0))]
    for index, order in enumerate(orders):
        others = [other for number, other in enumerate([*orders, np.arange(size)]) if number != index]
        for other in others:
            assert (order == other).sum() < 12  # 1 is expected
            assert abs(np.corrcoef(order, other)[0, 1]) < 0.06  # four standard deviations of chance


def test_every_place_goes_everywhere_equally_often():
    size, keys = 10, 4000
    counts = np.zeros((size, size))
    for key in range(keys):
        counts[np.arange(size), permute(np.arange(size), size, (key,))] += 1
    chi_square = ((counts - keys / size) ** 2 / (keys / size)).sum()
    assert chi_square < 130  # 81 degrees of freedom: mean 81, standard deviation 13; measured 86
