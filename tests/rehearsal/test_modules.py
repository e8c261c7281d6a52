"""Casts of fake modules."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from megavl.rehearsal.modules import casting_in_place


def cast() -> nn.Linear:
    layer = nn.Linear(4, 4)
    layer.register_buffer("total", torch.zeros(2))
    layer.weight.shard = "a mark"
    return layer.bfloat16()


def test_parameters_keep_their_attributes():
    with FakeTensorMode(), casting_in_place():
        layer = cast()
    assert layer.weight.dtype == layer.total.dtype == torch.bfloat16
    assert layer.weight.shard == "a mark"


def test_torch_alone_does_not_cast_them():
    with FakeTensorMode(), pytest.raises(RuntimeError, match="Couldn't swap Linear.weight"):
        cast()
