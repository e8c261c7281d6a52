"""Products at the beginning of a parallel region: the order of launches, and values with frozen operands."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from megavl.config.model import DecoderConfig
from megavl.model.block import Block
from megavl.parallel import collectives
from megavl.parallel.entry import entry_products
from megavl.parallel.groups import ExpertAxis, TensorAxis
from tests.model import tiny
from tests.models import HYBRID, MLA_SOFTMAX
from tests.pool import fake_world

T, D, WIDTH, COMPANION = 12, 6, 8, 4
COPIES = {"cat", "clone", "copy_"}


class Launches(TorchDispatchMode):
    """Names of products and copies, and what `started` and `waited` add."""

    def __init__(self):
        super().__init__()
        self.order: list[str] = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.overloadpacket.__name__
        if name == "mm" or name in COPIES:
            self.order.append(name)
        return operator(*args, **(kwargs or {}))


@contextmanager
def noted(launches: Launches) -> Iterator[None]:
    """Notes the name of a collective that returns when it is done, and start and end of an asynchronous one."""

    def noting(name: str, collective: Callable) -> Callable:
        def call(*args, async_op: bool = False, **options):
            launches.order.append(f"start {name}" if async_op else name)
            return collective(*args, async_op=async_op, **options)

        return call

    def wait(under_way: collectives.AsyncResult) -> Tensor:
        launches.order.append("wait")
        return under_way.result

    with (
        mock.patch.object(collectives, "all_gather_single", noting("all-gather", collectives.all_gather_single)),
        mock.patch.object(
            collectives, "reduce_scatter_single", noting("reduce-scatter", collectives.reduce_scatter_single)
        ),
        mock.patch.object(dist, "all_reduce", noting("all-reduce", dist.all_reduce)),
        mock.patch.object(collectives.AsyncResult, "wait", wait),
        launches,
    ):
        yield


def order(
    sequence: bool = False,
    gathers_again: bool = False,
    weights: int = 1,
    trained: bool = True,
    companion: bool = False,
    compiling: bool = False,
) -> tuple[list[str], list[str]]:
    """Launches forward and backward on one of two ranks, on fake tensors."""
    if dist.get_world_size() == 1:
        fake_world(2, 0)
    tp = TensorAxis(0, 2, dist.group.WORLD, sequence=sequence, gathers_again=gathers_again)
    rows, forward, backward = T // 2 if sequence else T, Launches(), Launches()
    with FakeTensorMode(), mock.patch.object(torch.compiler, "is_compiling", lambda: compiling):
        # Under `*` they are the outputs of a graph, as in a block.
        x, beside = (torch.empty(rows, width, requires_grad=True) * 1 for width in (D, COMPANION))
        those = [torch.empty(WIDTH, D, requires_grad=trained) for _ in range(weights)]
        with noted(forward):
            products, entered = entry_products(x, those, tp, beside if companion else None)
        outputs = [*products, *([entered] if companion else [])]
        grads = [torch.empty(output.shape) for output in outputs]
        inputs = [x, *([beside] if companion else []), *(those if trained else [])]
        with noted(backward):
            torch.autograd.grad(outputs, inputs, grads)
    return forward.order, backward.order


def orders(*cases: dict) -> list[tuple[list[str], list[str]]]:
    return [order(**case) for case in cases]


GATHER, REDUCE, SCATTER = "all-gather", "start all-reduce", "start reduce-scatter"
EXPECTED = [
    ({}, ["mm"], ["mm", REDUCE, "mm", "wait"]),
    ({"weights": 2}, ["mm"] * 2, ["mm"] * 2 + [REDUCE] + ["mm"] * 2 + ["wait"]),
    ({"trained": False}, ["mm"], ["mm", REDUCE, "wait"]),
    ({"companion": True}, ["mm"], ["mm", "cat", REDUCE, "mm", "wait"]),
    ({"sequence": True}, [GATHER, "mm"], ["mm", SCATTER, "mm", "wait"]),
    ({"sequence": True, "companion": True}, ["cat", GATHER, "mm"], ["mm", "cat", SCATTER, "mm", "wait"]),
    (
        {"sequence": True, "gathers_again": True},
        [GATHER, "mm"],
        ["start all-gather", "mm", SCATTER, "wait", "mm", "wait"],
    ),
    ({"sequence": True, "gathers_again": True, "trained": False}, [GATHER, "mm"], ["mm", SCATTER, "wait"]),
    # Negative control: in a compiled graph the collective follows both products.
    ({"sequence": True, "compiling": True}, [GATHER, "mm"], ["mm", "mm", "reduce-scatter"]),
]


def test_collectives_run_behind_products(pool):
    cases, forward, backward = zip(*EXPECTED, strict=True)
    (found,) = pool.run(1, orders, *cases)
    for case, ours, expected in zip(cases, found, zip(forward, backward, strict=True), strict=True):
        order = ours[0], [each for each in ours[1] if each != "clone"] if case.get("compiling") else ours[1]
        assert order == expected, case


def order_of_a_block(config: DecoderConfig, gathers_again: bool) -> list[str]:
    """Backward pass of a block under sequence parallelism, on fake tensors."""
    if dist.get_world_size() == 1:
        fake_world(2, 0)
    tp = TensorAxis(0, 2, dist.group.WORLD, sequence=True, gathers_again=gathers_again)
    launches, fake, layout = Launches(), FakeTensorMode(), tiny.layout(config, (7, 5))
    tensors = {name: fake.from_tensor(value) for name, value in vars(layout).items() if isinstance(value, Tensor)}
    layout = replace(layout, **tensors)
    with fake:
        block = Block(config, 0, tp, ExpertAxis(), tiny.OPS)
        h = torch.empty(T // 2, config.width, requires_grad=True)
        out = block(h, layout)
        with noted(launches):
            out.sum().backward()
    return launches.order


def orders_of_blocks() -> list[list[str]]:
    return [order_of_a_block(config.decoder, again) for config in (HYBRID, MLA_SOFTMAX) for again in (False, True)]


def test_every_entry_of_a_block_is_hidden(pool):
    """MHA enters by q, k, v, latent attention by q and by the latent, the MLP by gate and up."""
    (found,) = pool.run(1, orders_of_blocks)
    for order, (entries, again) in zip(found, [(2, False), (2, True), (3, False), (3, True)], strict=True):
        assert (order.count(SCATTER), order.count("start all-gather")) == (entries, entries * again)
        assert "reduce-scatter" not in order
        launches = [each for each in order if each not in COPIES]
        for start in (index for index, each in enumerate(launches) if each == SCATTER):
            behind = launches[start + 1 + again :]
            assert launches[start - 1] == "mm" and launches[start + 1 : start + 1 + again] == ["wait"] * again
            assert behind[0] == "mm" and next(each for each in behind if each != "mm") == "wait"


def values(sequence: bool, needed: tuple[bool, ...]) -> float:
    """Worst error of outputs and gradients in fp64 against the plain path; `needed` are those of x, the companion and
    two weights."""
    rank, size = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(rank)
    rows = T // size if sequence else T
    shapes = [(rows, D), (rows, COMPANION), (WIDTH, D), (WIDTH, D)]
    operands = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    if not sequence:  # every rank has the same tokens
        for operand in operands[:2]:
            dist.broadcast(operand, 0)
    upstream = [torch.randn(T, width, generator=generator, dtype=torch.float64) for width in (WIDTH, WIDTH, COMPANION)]

    def passes(compiling: bool, again: bool = False) -> list[Tensor]:
        tp = TensorAxis(rank, size, dist.group.WORLD, sequence=sequence, gathers_again=again)
        leaves = [each.clone().requires_grad_(need) for each, need in zip(operands, needed, strict=True)]
        x, beside, *weights = leaves
        with mock.patch.object(torch.compiler, "is_compiling", lambda: compiling):
            products, entered = entry_products(x, weights, tp, beside)
            pairs = zip([*products, entered], upstream, strict=True)
            outputs, grads = zip(*(pair for pair in pairs if pair[0].requires_grad), strict=True)
            wanted = [leaf for leaf in leaves if leaf.requires_grad]
            found = torch.autograd.grad(outputs, wanted, grads, materialize_grads=True)
        return [*products, entered, *found]

    plain = passes(compiling=True)
    ours = [passes(compiling=False), passes(compiling=False, again=True)]
    assert len(plain) == len(ours[0]) == 3 + sum(needed)
    return max((a - b).abs().max().item() for found in ours for a, b in zip(found, plain, strict=True))


def all_values() -> list[float]:
    yes, no = True, False
    needed = [(yes,) * 4, (yes, yes, no, no), (yes, no, yes, no), (no, yes, no, yes), (no, no, yes, yes)]
    return [values(sequence, each) for sequence in (False, True) for each in needed]


def test_any_operand_may_be_frozen(pool):
    for errors in pool.run(2, all_values):
        assert max(errors) < 1e-13  # measured 7.1e-15
