"""The work of made-up dataflows. `test_cost.py` holds that of whole models against torch."""

import pytest

from megavl.config.dataflow import Attention, BalanceLoss, Block, Branches, Parameter, Product
from megavl.config.run import ParallelConfig
from megavl.plan.flops import FlopCounter
from megavl.plan.work import Work


def weight(name: str, rows: int = 1, per: str = "token", **properties) -> Parameter:
    """2 x 3: 12 FLOPs a row."""
    return Parameter(name, (3, 2), 0, product=Product(rows, per, 2, 3), **properties)


def norm(name: str) -> Parameter:
    return Parameter(name, (2,), 0)


A, B, C = weight("a"), weight("b"), weight("c")


def counter(trained: str = "", **parallel) -> FlopCounter:
    """Over one token, one label, one pair and one tile; the parameters named in `trained` are trainable. Blocks of the
    decoder are recomputed."""
    sharded = {"vision": "sharded", "sequence": True}
    return FlopCounter(
        trains=lambda name: name in trained,
        recomputes=lambda part: part == "decoder",
        tokens=1,
        labels=1,
        pairs=1,
        tiles=1,
        micro_batch=1,
        parallel=ParallelConfig(**(sharded | parallel)),
    )


@pytest.mark.parametrize(
    ("trained", "work", "live"),
    [
        ("", Work(36), False),
        ("c", Work(36, 0, 12), True),
        ("a", Work(36, 24, 12), True),
        ("n", Work(36, 24, 0), True),
        ("abc", Work(36, 24, 36), True),
    ],
)
def test_a_gradient_flows_back_to_the_first_trainable_parameter(trained, work, live):
    assert counter(trained).work((A, norm("n"), B, C), live=False) == (work, live)


def test_branches_share_an_input_and_not_each_others_gradients():
    work, live = counter("a").work(Branches((A, (B, C))), live=False)
    assert (work, live) == (Work(36, 0, 12), True)
    assert counter("a").work((Branches((A, B)), C), live=False) == (Work(36, 12, 12), True)
    assert counter().work(Branches((A, B)), live=True) == (Work(24, 24), True)


def test_rows_per_tile():
    step = counter(vision="replicated")
    assert step.work(weight("a", rows=5, per="tile"), live=True) == (Work(60, 60, 0, 0, 120), True)
    assert counter().work(weight("a", rows=5, per="tile"), live=True) == (Work(60, 60), True)


def test_whole_weights_are_repeated_without_sequence_parallelism():
    cut = weight("b", tensor_dim=0)
    assert counter(sequence=False).work((A, cut), live=False) == (Work(24, repeated=12), False)
    assert counter(sequence=True).work((A, cut), live=False) == (Work(24), False)


def test_attention_has_two_gradients():
    assert counter().work(Attention(4, 4), live=False) == (Work(16), False)
    assert counter().work(Attention(4, 4), live=True) == (Work(16, 32), True)


def test_the_zeros_beside_narrow_values_are_overhead():
    assert counter().work(Attention(4, 2), live=False) == (Work(12, overhead=4), False)
    assert counter().work(Attention(4, 2), live=True) == (Work(12, 24, overhead=12), True)


def test_the_balance_loss_is_overhead():
    assert counter().work(BalanceLoss(8), live=False) == (Work(overhead=32), False)
    assert counter().work(BalanceLoss(8), live=True) == (Work(overhead=48), True)


@pytest.mark.parametrize(
    ("flow", "products"),
    [
        ((A, B), 1),
        ((A, (B, norm("b.bias"))), 1),
        ((A, B, norm("n.weight"), norm("n.bias")), 2),
        ((A, (norm("n"), (B, C))), 2),
        ((A, Branches((B, C))), 3),
    ],
    ids=["product", "product with bias", "norm", "nested", "branches"],
)
def test_recomputation_stops_at_the_last_product(flow, products):
    work, _ = counter("abc").work(Block("decoder", flow), live=False)
    assert work.overhead == 12 * products


@pytest.mark.parametrize(
    ("part", "live", "overhead"), [("tower", True, 0), ("decoder", False, 0), ("decoder", True, 12)]
)
def test_only_live_blocks_of_the_parts_named_are_recomputed(part, live, overhead):
    assert counter().work(Block(part, (A, B)), live) == (Work(24, 24 * live, overhead=overhead), live)
