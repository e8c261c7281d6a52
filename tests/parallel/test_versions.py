"""Names of collectives under each supported version of torch, by stand-ins for torch.distributed."""

import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from megavl.parallel import versions
from megavl.parallel.versions import first_of

TORCH_2_13 = SimpleNamespace(all_gather_single="new", all_gather_into_tensor="deprecated")
TORCH_2_11 = SimpleNamespace(all_gather_into_tensor="old")


@pytest.mark.parametrize(("module", "chosen"), [(TORCH_2_13, "new"), (TORCH_2_11, "old")])
def test_the_newest_name_is_taken(module, chosen):
    assert first_of(module, "all_gather_single", "all_gather_into_tensor") == chosen


def test_a_torch_without_either_is_refused():
    with pytest.raises(ImportError, match="none of a, b"):
        first_of(TORCH_2_11, "a", "b")


def gathered_and_scattered() -> tuple[list, list, list]:
    """What both collectives return for the rank's number, and their warnings."""
    rank, size = dist.get_rank(), dist.get_world_size()
    whole, part = torch.empty(2 * size), torch.empty(2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        versions.all_gather_single(whole, torch.full((2,), float(rank)))
        versions.reduce_scatter_single(part, torch.arange(2.0 * size))
    return whole.tolist(), part.tolist(), [str(warning.message) for warning in caught]


def test_both_collectives_take_one_tensor_of_each_rank(pool):
    for rank, (whole, part, caught) in enumerate(pool.run(2, gathered_and_scattered)):
        assert whole == [0, 0, 1, 1]
        assert part == [2 * (2 * rank), 2 * (2 * rank + 1)]
        assert caught == []
