import pytest

from megavl.config.run import ParallelConfig
from megavl.config.stages import split_layers


def test_even():
    assert split_layers(32, ParallelConfig(pipeline=8)) == tuple(range(4 * s, 4 * s + 4) for s in range(8))
    assert split_layers(24, ParallelConfig(pipeline=2, virtual_stages=3)) == tuple(
        range(4 * s, 4 * s + 4) for s in range(6)
    )
    assert split_layers(5, ParallelConfig()) == (range(5),)


def test_given():
    assert split_layers(6, ParallelConfig(pipeline=3, stages=(1, 3, 2))) == (range(1), range(1, 4), range(4, 6))


def test_refused():
    with pytest.raises(ValueError, match="24 items of the model list do not divide over 5 stages"):
        split_layers(24, ParallelConfig(pipeline=5))
    with pytest.raises(ValueError, match=r"\[3, 4\] has 2 stages with 7 items; needed are 2 stages with 6 items"):
        split_layers(6, ParallelConfig(pipeline=2, stages=(3, 4)))
    with pytest.raises(ValueError, match="needed are 4 stages"):
        split_layers(6, ParallelConfig(pipeline=2, virtual_stages=2, stages=(3, 3)))
