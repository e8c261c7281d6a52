"""Casts of modules whose parameters are fake tensors."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor, nn


def _apply(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """`Module._apply`, which gives every parameter new data."""
    if recurse:
        for child in module.children():
            child._apply(function)
    with torch.no_grad():
        for parameter in module.parameters(recurse=False):
            parameter.data = function(parameter)
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, function(buffer))
    return module


@contextmanager
def casting_in_place() -> Iterator[None]:
    """While entered, `Module.to` gives each parameter new data, as it does with real tensors. torch would swap a fake
    parameter for another tensor, without the attributes of the first one, and cannot while something refers to it."""
    with mock.patch.object(nn.Module, "_apply", _apply):
        yield
