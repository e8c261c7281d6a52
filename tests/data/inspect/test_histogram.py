"""Histograms of lengths."""

import numpy as np

from megavl.data.inspect.histogram import Bin, Histogram


def test_every_value_is_in_its_bin():
    histogram = Histogram()
    for values in ([0, 1, 1], [3, 8, 15], [], [2**40, 16]):
        histogram.add(np.array(values, dtype=np.int64))
    bins = histogram.bins()
    assert bins[:6] == [Bin(0, 0, 1), Bin(1, 1, 2), Bin(2, 3, 1), Bin(4, 7, 0), Bin(8, 15, 2), Bin(16, 31, 1)]
    assert bins[-1] == Bin(2**40, 2**41 - 1, 1) and sum(one.count for one in bins) == histogram.count == 8
    assert (histogram.smallest, histogram.largest, histogram.sum) == (0, 2**40, 2**40 + 44)


def test_the_borders_of_a_bin_are_in_it():
    for digits in range(1, 50):
        histogram = Histogram()
        histogram.add(np.array([1 << (digits - 1), (1 << digits) - 1]))
        assert histogram.bins() == [Bin(1 << (digits - 1), (1 << digits) - 1, 2)]


def test_nothing_counted():
    assert Histogram().bins() == [] and Histogram().mean == 0
