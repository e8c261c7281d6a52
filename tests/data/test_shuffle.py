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
    orders += [permute(np.arange(size), size, (0, 0, 0), epoch) for epoch in (1, 2, 2**40)]
    for index, order in enumerate(orders):
        others = [other for number, other in enumerate([*orders, np.arange(size)]) if number != index]
        for other in others:
            assert (order == other).sum() < 12  # 1 is expected
            assert abs(np.corrcoef(order, other)[0, 1]) < 0.06  # four standard deviations of chance


def test_epochs_side_by_side_are_the_epochs_one_by_one():
    epochs, places = np.divmod(np.arange(5, 107), 10)
    together = permute(places, 10, (3,), epochs)
    assert together.tolist() == [
        permute(np.array([place]), 10, (3,), epoch)[0] for epoch, place in zip(epochs.tolist(), places, strict=True)
    ]
    assert sorted(together[5:15]) == list(range(10)) and together[5:15].tolist() != together[15:25].tolist()


def test_every_place_goes_everywhere_equally_often_over_the_epochs():
    size, epochs = 10, 4000
    places = np.tile(np.arange(size), epochs)
    counts = np.zeros((size, size))
    np.add.at(counts, (places, permute(places, size, (0,), np.repeat(np.arange(epochs), size))), 1)
    chi_square = ((counts - epochs / size) ** 2 / (epochs / size)).sum()
    assert chi_square < 130  # 81 degrees of freedom: mean 81, standard deviation 13; measured 86
