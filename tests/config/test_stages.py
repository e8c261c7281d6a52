import pytest

from megavl.config.run import ParallelConfig
from megavl.config.stages import split_layers


def test_even():
    assert split_layers(32, ParallelConfig(pipeline=8, stages=None)) == tuple(range(4 * s, 4 * s + 4) for s in range(8))
    assert split_layers(24, ParallelConfig(pipeline=2, virtual_stages=3, stages=None)) == tuple(
        range(4 * s, 4 * s + 4) for s in range(6)
    )
    assert split_layers(5, ParallelConfig(stages=None)) == (range(5),)


def test_given():
    assert split_layers(6, ParallelConfig(pipeline=3, stages=(1, 3, 2))) == (range(1), range(1, 4), range(4, 6))


def test_refused():
    """The rules of a run show the same sentences (tests/config/test_rules.py)."""
    with pytest.raises(
        ValueError, match="24 items .* which are not divisible by .* = 5 stages: .*=\\[4, 5, 5, 5, 5\\]"
    ):
        split_layers(24, ParallelConfig(pipeline=5, stages=None))
    with pytest.raises(
        ValueError, match=r"\[3, 4\] has 2 entries with the sum 7, but there are .* = 2 stages .* 6 items"
    ):
        split_layers(6, ParallelConfig(pipeline=2, stages=(3, 4)))
    with pytest.raises(ValueError, match=r"= 2 \* 2 = 4 stages"):
        split_layers(6, ParallelConfig(pipeline=2, virtual_stages=2, stages=(3, 3)))
