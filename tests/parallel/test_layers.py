"""Each parallel layer against the unsharded one: output, input gradient, weight gradients, for 2 and 3 ranks."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megavl.parallel.collectives import leave_parallel, shared_weight, split_tokens
from megavl.parallel.embedding import VocabEmbedding
from megavl.parallel.groups import TensorAxis, build_mesh
from megavl.parallel.linear import ColumnLinear, RowLinear, column_linear_with, column_linears
from megavl.parallel.shard import Cut, Shard, shard_of
from megavl.parallel.topology import Topology
from tests.parallel.calls import counted

T, D, F_WIDTH, V = 12, 6, 18, 30
# Sums over ranks change the order of additions; measured worst error 4.8e-7 on values of order 1.
TOLERANCE = {"rtol": 1e-5, "atol": 2e-6}


def tensor_axis(sequence: bool) -> TensorAxis:
    return build_mesh(Topology(pp=1, dp=1, tp=dist.get_world_size()), sequence).tp


def random(name: str, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(len(name) * 1000 + sum(shape))
    return torch.randn(shape, generator=generator)


def load(layer: torch.nn.Module, full: Tensor) -> None:
    layer.weight.data.copy_(shard_of(layer.weight).slice(full))


def my_tokens(full: Tensor, tp: TensorAxis) -> Tensor:
    return full.chunk(tp.size)[tp.rank] if tp.sequence else full


def worst(pairs: list[tuple[Tensor, Tensor]]) -> float:
    return max(((ours - theirs).abs() / (1 + theirs.abs())).max().item() for ours, theirs in pairs)


def mlp_reference() -> tuple[Tensor, ...]:
    """norm weight, up, down, input and output gradient of a two-layer region, and what autograd makes of them."""
    scale, up, down = (
        random("scale", D).requires_grad_(),
        random("up", F_WIDTH, D).requires_grad_(),
        random("down", D, F_WIDTH).requires_grad_(),
    )
    x = random("x", T, D).requires_grad_()
    y = x + F.linear(torch.tanh(F.linear(x * scale, up)), down)
    y.backward(random("dy", T, D))
    return scale, up, down, x, y


def mlp_on_ranks(sequence: bool, forget_to_enter: bool) -> float:
    """Worst difference between this rank's part of the parallel region and the reference."""
    tp = tensor_axis(sequence)
    scale, up, down, x, y = mlp_reference()
    column, row = ColumnLinear(D, F_WIDTH, tp), RowLinear(F_WIDTH, D, tp)
    load(column, up.data)
    load(row, down.data)
    local_x = my_tokens(x.data, tp).clone().requires_grad_()
    local_scale = scale.data.clone().requires_grad_()
    h = local_x * shared_weight(local_scale, tp)
    hidden = F.linear(h, column.weight) if forget_to_enter else column(h)
    local_y = local_x + row(torch.tanh(hidden))
    local_y.backward(my_tokens(random("dy", T, D), tp))
    pairs = [
        (local_y, my_tokens(y, tp)),
        (local_x.grad, my_tokens(x.grad, tp)),
        (column.weight.grad, shard_of(column.weight).slice(up.grad)),
        (row.weight.grad, shard_of(row.weight).slice(down.grad)),
        (local_scale.grad, scale.grad),
    ]
    return worst(pairs)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("sequence", [False, True])
def test_column_and_row_linear_equal_the_unsharded_region(pool, world, sequence):
    assert max(pool.run(world, mlp_on_ranks, sequence, False)) < 2e-6  # measured 4.8e-7


def test_a_region_that_is_not_entered_is_noticed(pool):
    assert max(pool.run(2, mlp_on_ranks, False, True)) > 1e-2


def my_columns(full: Tensor, tp: TensorAxis) -> Tensor:
    return full.chunk(tp.size, dim=1)[tp.rank]


def column(weight: Tensor, tp: TensorAxis) -> ColumnLinear:
    layer = ColumnLinear(*reversed(weight.shape), tp)
    load(layer, weight.data)
    return layer


def end_to_end(layers: list[ColumnLinear]) -> None:
    """Move the weights into one buffer, as DeepSpeed does."""
    flat = torch.cat([layer.weight.data.flatten() for layer in layers])
    for layer, part in zip(layers, flat.split([layer.weight.numel() for layer in layers]), strict=True):
        layer.weight.data = part.view_as(layer.weight)


def products_of_one_input(sequence: bool, adjacent: bool = False) -> tuple[float, dict, dict]:
    """Worst difference of two column-parallel products from the whole ones, and the collectives in each direction."""
    tp = tensor_axis(sequence)
    x = random("x", T, D).requires_grad_()
    first, second = (random(name, F_WIDTH, D).requires_grad_() for name in ("gate", "up"))
    upstream = [random(name, T, F_WIDTH) for name in ("dy", "dy of the second")]
    whole = [F.linear(x, first), F.linear(x, second)]
    torch.autograd.backward(whole, upstream)

    layers, mine = [column(first, tp), column(second, tp)], my_tokens(x.data, tp).clone().requires_grad_()
    if adjacent:
        end_to_end(layers)
    with counted() as forward:
        ours = column_linears(mine, layers)
    with counted() as backward:
        torch.autograd.backward(ours, [my_columns(grad, tp) for grad in upstream])
    pairs = [(mine.grad, my_tokens(x.grad, tp))]
    pairs += [(y, my_columns(y_, tp)) for y, y_ in zip(ours, whole, strict=True)]
    pairs += [
        (layer.weight.grad, shard_of(layer.weight).slice(w.grad))
        for layer, w in zip(layers, (first, second), strict=True)
    ]
    return worst(pairs), dict(forward), dict(backward)


def product_with_a_companion(sequence: bool) -> tuple[float, dict, dict]:
    """The same of one product and a companion; each rank uses its own channels of it."""
    tp = tensor_axis(sequence)
    x, companion = (random(name, T, D).requires_grad_() for name in ("x", "companion"))
    weight = random("up", F_WIDTH, D).requires_grad_()
    upstream = random("dy", T, F_WIDTH), random("dy of it", T, D)
    whole = F.linear(x, weight)
    torch.autograd.backward([whole, companion], upstream)

    layer, mine = column(weight, tp), [my_tokens(full.data, tp).clone().requires_grad_() for full in (x, companion)]
    with counted() as forward:
        y, entered = column_linear_with(mine[0], layer, mine[1])
    with counted() as backward:
        torch.autograd.backward([y, my_columns(entered, tp)], [my_columns(grad, tp) for grad in upstream])
    pairs = [(y, my_columns(whole, tp)), (entered, companion)]
    pairs += [(ours.grad, my_tokens(full.grad, tp)) for ours, full in zip(mine, (x, companion), strict=True)]
    pairs += [(layer.weight.grad, shard_of(layer.weight).slice(weight.grad))]
    return worst(pairs), dict(forward), dict(backward)


# Without sequence parallelism every rank has the input already.
ENTERING = {False: ({}, {"all-reduce": 1}), True: ({"all-gather": 1}, {"reduce-scatter": 1})}


@pytest.mark.parametrize(
    "entry",
    [products_of_one_input, partial(products_of_one_input, adjacent=True), product_with_a_companion],
    ids=["separate weights", "adjacent weights", "companion"],
)
@pytest.mark.parametrize("sequence", [False, True])
def test_a_region_is_entered_by_one_collective(pool, entry, sequence):
    for difference, *calls in pool.run(3, entry, sequence):
        assert difference < 2e-6  # measured 7.1e-7
        assert tuple(calls) == ENTERING[sequence]


def embedding_on_ranks() -> None:
    tp = tensor_axis(sequence=True)
    full = random("embedding", V, D).requires_grad_()
    tokens = torch.randint(0, V, (T,), generator=torch.Generator().manual_seed(0))
    dy = random("dy", T, D)
    F.embedding(tokens, full).backward(dy)
    layer = VocabEmbedding(V, D, tp)
    load(layer, full.data)
    y = split_tokens(layer(tokens), tp)
    torch.testing.assert_close(y, my_tokens(F.embedding(tokens, full.data), tp), rtol=0, atol=0)
    y.backward(my_tokens(dy, tp))
    torch.testing.assert_close(layer.weight.grad, shard_of(layer.weight).slice(full.grad), **TOLERANCE)


@pytest.mark.parametrize("world", [2, 3])
def test_embedding_equals_the_unsharded_lookup(pool, world):
    pool.run(world, embedding_on_ranks)


def test_every_width_that_does_not_divide_is_refused():
    three = TensorAxis(rank=0, size=4)
    with pytest.raises(ValueError, match="output width = 18 is not divisible by parallel.tensor = 4"):
        ColumnLinear(D, F_WIDTH, three)
    with pytest.raises(ValueError, match="vocab_size = 30 is not divisible"):
        VocabEmbedding(V, D, three)


def test_a_row_parallel_region_of_one_rank_is_the_plain_layer():
    layer = RowLinear(F_WIDTH, D, TensorAxis())
    load(layer, random("down", D, F_WIDTH))
    x = random("x", T, F_WIDTH)
    assert torch.equal(leave_parallel(layer(x), TensorAxis()), F.linear(x, layer.weight))


def test_shard_slices_shapes_and_offsets_agree():
    full = torch.arange(24).view(6, 4)
    shard = Shard((Cut("tp", dim=0, index=2, count=3),))
    part = shard.slice(full)
    assert part.tolist() == full[4:6].tolist()
    assert shard.full_shape(part.shape) == (6, 4)
    assert shard.offsets(part.shape) == (4, 0)
