"""Parameters end to end in one buffer, as DeepSpeed lays them out, and the names of the parameters in a weight."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def lay_flat(module: nn.Module) -> dict[int, str]:
    """Move the parameters of a module, all of one dtype, into one buffer. Returns the name of each by its offset."""
    named = list(module.named_parameters())
    flat = torch.empty(sum(parameter.numel() for _, parameter in named), dtype=named[0][1].dtype)
    names, offset = {}, 0
    for name, parameter in named:
        names[offset] = name.removesuffix(".weight")
        parameter.data = flat[offset : offset + parameter.numel()].view_as(parameter)
        offset += parameter.numel()
    return names


def name_of(weight: Tensor, names: Mapping[int, str]) -> str:
    """Name of a parameter, or of several that are multiplied as one: "attn.q_proj + k_proj"."""
    begin = weight.storage_offset()
    first, *others = (name for offset, name in names.items() if begin <= offset < begin + weight.numel())
    return " + ".join((first, *(name.rpartition(".")[2] for name in others)))
