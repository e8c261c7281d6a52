"""Answers of a device and a network that are not there."""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from megavl.parallel.groups import ExpertAxis
from megavl.rehearsal.reads import Answers


def test_numbers_are_read_and_counted():
    answers = Answers()
    with FakeTensorMode(), answers:
        x = torch.zeros(3)
        assert float(x.sum()) == 1.0 and not x.isinf().any() and x.long().tolist() == [1, 1, 1]
    assert answers.reads == 5
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        torch.zeros(3).sum().item()


@pytest.mark.parametrize("rows", [12, 13, 15, 2])
def test_ranks_agree_on_equal_sizes(rows):
    """What each of four ranks sends to another is what that one receives."""
    sizes = [Answers().equal_sizes(ExpertAxis(rank, 4))(None, rows) for rank in range(4)]
    for rank, (sent, received) in enumerate(sizes):
        assert sum(sent) == rows and max(sent) - min(sent) <= 1
        assert received == [theirs[rank] for theirs, _ in sizes]
