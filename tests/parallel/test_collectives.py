"""Every collective forward and backward, on two ranks with numbers of their own."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megavl.parallel import collectives
from megavl.parallel.groups import Axis

ROWS = 4


def inputs(rank: int) -> tuple[Tensor, Tensor]:
    """What a rank puts in, and the gradient of all that may come out: [ROWS, 1] and [2 * ROWS, 1]."""
    return torch.arange(ROWS)[:, None] + 10.0 * rank, torch.arange(2 * ROWS)[:, None] + 100.0 * (rank + 1)


def through(name: str) -> tuple[Tensor, Tensor]:
    """Result and gradient of this rank."""
    axis = Axis(dist.get_rank(), dist.get_world_size(), dist.group.WORLD)
    x, upstream = inputs(axis.rank)
    x.requires_grad_()
    y = getattr(collectives, name)(x, axis)
    y.backward(upstream[: len(y)])
    return y.detach(), x.grad


def mine(x: Tensor, rank: int) -> Tensor:
    return x.chunk(2)[rank]


(X0, G0), (X1, G1) = inputs(0), inputs(1)
HALF = ROWS // 2
# (result, gradient) of rank r.
TABLE = {
    "copy": lambda r: ((X0, X1)[r], (G0 + G1)[:ROWS]),
    "reduce": lambda r: (X0 + X1, (G0, G1)[r][:ROWS]),
    "split": lambda r: (mine((X0, X1)[r], r), torch.cat((G0[:HALF], G1[:HALF]))),
    "gather": lambda r: (torch.cat((X0, X1)), mine(G0 + G1, r)),
    "reduce_scatter": lambda r: (mine(X0 + X1, r), torch.cat((G0[:HALF], G1[:HALF]))),
    "join": lambda r: (torch.cat((X0, X1)), mine((G0, G1)[r], r)),
}


def all_of_them() -> dict[str, tuple[Tensor, Tensor]]:
    return {name: through(name) for name in TABLE}


def test_results_and_gradients(pool):
    for rank, found in enumerate(pool.run(2, all_of_them)):
        for name, (result, gradient) in found.items():
            expected, expected_gradient = TABLE[name](rank)
            assert torch.equal(result, expected), name
            assert torch.equal(gradient, expected_gradient), name


@pytest.mark.parametrize("name", TABLE)
def test_an_axis_of_one_rank_changes_nothing(name):
    x, _ = inputs(0)
    assert getattr(collectives, name)(x, Axis()) is x
