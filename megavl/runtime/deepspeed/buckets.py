"""Buckets: optimizer groups cut between modules, each reduced as soon as the backward pass has its last gradient.

DeepSpeed lays each optimizer group into a flat buffer, and every data rank owns an equal part of it. A bucket is such a
group, so one reduce-scatter reduces it for all ranks. Without buckets the parts of a group become complete one after
the other, and each has a single owner: that takes one reduction for each rank, with the latency of a ring of all ranks
every time.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby

from torch import nn


def least_elements(ranks: int) -> int:
    """Elements from which on a bucket is closed: fewer would not fill the links of `ranks` ranks.

    Source: `DistributedDataParallelConfig.bucket_size` of Megatron-LM.
    """
    return max(40_000_000, 1_000_000 * ranks)


def bucketed(
    groups: Sequence[dict], names: Mapping[nn.Parameter, str], least: Callable[[dict], int | None]
) -> list[dict]:
    """Cut groups into buckets, which are groups themselves with the same options.

    Backward passes complete gradients from the end of the model to its beginning. Buckets are filled from the end, so
    that the last one to be complete, whose reduction nothing hides, is the smallest. Parameters of sibling layers stay
    together: those that share an input have to lie end to end.

    Args:
        groups: each with its parameters in the order of the model, after its anchors
        names: of the parameters in the order of the model; anchors have none
        least: elements from which on a bucket of this group is closed; None does not cut it

    Returns:
        The buckets in the order of their first parameters: from the last to the first they become complete.
    """
    positions = {parameter: position for position, parameter in enumerate(names)}

    def position(bucket: dict) -> int:
        return min((positions[each] for each in bucket["params"] if each in positions), default=-1)

    buckets = [group | {"params": cut} for group in groups for cut in _cut(group["params"], names, least(group))]
    return sorted(buckets, key=position)


def _cut(
    parameters: list[nn.Parameter], names: Mapping[nn.Parameter, str], least: int | None
) -> list[list[nn.Parameter]]:
    if least is None:
        return [parameters]
    anchors = [parameter for parameter in parameters if parameter not in names]
    named = [parameter for parameter in parameters if parameter in names]
    siblings = [list(each) for _, each in groupby(named, key=lambda parameter: _parent(names[parameter]))]
    buckets: list[list[nn.Parameter]] = [[]]
    for each in reversed(siblings):
        if sum(parameter.numel() for parameter in buckets[0]) >= least:
            buckets.insert(0, [])
        buckets[0][:0] = each
    buckets[0][:0] = anchors
    return buckets


def _parent(name: str) -> str:
    """Of blocks.0.attn.q_proj.weight: blocks.0.attn."""
    return name.rsplit(".", 2)[0]
