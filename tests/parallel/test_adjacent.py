"""Adjacent weights as one: the separate products in fp64, without copies, whichever weights need a gradient."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from megavl.parallel.adjacent import are_adjacent, join_rows, split_columns
from megavl.parallel.groups import TensorAxis
from megavl.parallel.linear import ColumnLinear, column_linears

TOKENS, WIDTH = 5, 8
ROWS = (6, 2, 4)
COPIES = {"cat", "clone", "copy_", "index_select"}


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.counts[operator.overloadpacket.__name__] += 1
        return operator(*args, **(kwargs or {}))


def layers(adjacent: bool, dtype: torch.dtype, trained: tuple[bool, ...] = (True,) * len(ROWS)) -> list[ColumnLinear]:
    flat = torch.randn(sum(ROWS) * WIDTH, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = [ColumnLinear(WIDTH, rows, TensorAxis()) for rows in ROWS]
    for layer, part, needed in zip(found, flat.split([rows * WIDTH for rows in ROWS]), trained, strict=True):
        layer.weight.data = part.view(-1, WIDTH) if adjacent else part.view(-1, WIDTH).clone()
        layer.weight.requires_grad_(needed)
    return found


def passes(these: list[ColumnLinear], x: Tensor) -> tuple[list[Tensor], Counter, Counter]:
    """Outputs and gradients of x and the weights, and the operators of either direction."""
    weights = [layer.weight for layer in these]
    with Operators() as forward:
        outputs = column_linears(x, these)
    needed = [each for each in (x, *weights) if each.requires_grad]
    upstream = [torch.linspace(-1, 1, each.numel()).view_as(each).bfloat16().to(each.dtype) for each in outputs]
    with Operators() as backward:
        # Separately, the product of an input and a weight that need none needs none either.
        pairs = [(output, grad) for output, grad in zip(outputs, upstream, strict=True) if output.requires_grad]
        gradients = ()
        if needed:
            wanted, grads = zip(*pairs, strict=True)
            gradients = torch.autograd.grad(wanted, needed, grads)
    return [*outputs, *gradients], forward.counts, backward.counts


def random_input(dtype: torch.dtype, needed: bool = True) -> Tensor:
    x = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
    return x.requires_grad_(needed)


@pytest.mark.parametrize("trained", [(True, True, True), (False, True, False), (False, False, False)], ids=str)
@pytest.mark.parametrize("needed", [True, False], ids=["input needs a gradient", "input needs none"])
def test_products_and_gradients_are_those_of_separate_weights(trained, needed):
    ours, forward, backward = passes(layers(True, torch.float64, trained), random_input(torch.float64, needed))
    theirs, apart, _ = passes(layers(False, torch.float64, trained), random_input(torch.float64, needed))
    assert forward["mm"] == 1 and apart["mm"] == len(ROWS)
    assert backward["mm"] == needed + any(trained)
    for found, exact in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-13, atol=1e-13)  # measured 8.9e-16


def test_the_gradient_of_the_input_is_rounded_once():
    """Separate products round each of their gradients to bf16, and the sums again."""
    x = random_input(torch.bfloat16)
    wide = [layer.double() for layer in layers(False, torch.bfloat16)]
    exact = passes(wide, x.detach().double().requires_grad_())[0][len(ROWS)]
    joint, separate = (passes(layers(adjacent, torch.bfloat16), x)[0][len(ROWS)] for adjacent in (True, False))
    joint, separate = ((found != exact.bfloat16()).float().mean().item() for found in (joint, separate))
    assert joint < 0.1 < separate  # measured 0 and 0.4 of the elements


def test_without_gradients_nothing_is_kept():
    with torch.no_grad():
        outputs = column_linears(random_input(torch.float32), layers(True, torch.float32))
    assert not any(output.requires_grad for output in outputs)
    for output, layer in zip(outputs, layers(False, torch.float32), strict=True):
        torch.testing.assert_close(output, F.linear(random_input(torch.float32), layer.weight))


def test_weights_and_their_gradients_are_views():
    these = layers(True, torch.float32)
    weights = [layer.weight for layer in these]
    joint = join_rows(weights)
    assert joint.data_ptr() == weights[0].data_ptr() and torch.equal(joint, torch.cat(weights))
    _, forward, backward = passes(these, random_input(torch.float32))
    assert not COPIES & forward.keys()
    assert backward["cat"] == 1 and not COPIES - {"cat"} & backward.keys()
    torch.autograd.backward(column_linears(random_input(torch.float32), these), [torch.ones(TOKENS, n) for n in ROWS])
    assert are_adjacent([weight.grad for weight in weights], dim=0)


def adjacent_columns(widths: tuple[int, ...]) -> tuple[Tensor, ...]:
    return torch.randn(TOKENS, sum(widths)).split(widths, dim=1)


@pytest.mark.parametrize(
    ("gradients", "copies"),
    [
        (adjacent_columns(ROWS), 0),
        (torch.randn(TOKENS, sum(ROWS) + 2)[:, 2:].split(ROWS, dim=1), 0),
        ([torch.randn(TOKENS, width) for width in ROWS], 1),
        (adjacent_columns((4, 2, 6))[::-1], 1),
        (torch.randn(sum(ROWS), TOKENS).t().split(ROWS, dim=1), 0),
    ],
    ids=["one buffer", "part of a buffer", "separate", "other order", "transposed"],
)
def test_adjacent_gradients_are_not_copied(gradients, copies):
    x = torch.randn(TOKENS, sum(ROWS), requires_grad=True)
    outputs = split_columns(x, ROWS)
    assert are_adjacent(outputs, dim=1)
    with Operators() as backward:
        (found,) = torch.autograd.grad(outputs, x, list(gradients))
    assert torch.equal(found, torch.cat(list(gradients), dim=1))
    assert backward.counts["cat"] == copies and not COPIES - {"cat"} & backward.counts.keys()
    assert (found.data_ptr() == gradients[0].data_ptr()) == (not copies)


def test_an_unused_output_has_a_gradient_of_zeros():
    x = torch.randn(TOKENS, sum(ROWS), requires_grad=True)
    first, _, last = split_columns(x, ROWS)
    (first.sum() + 2 * last.sum()).backward()
    assert x.grad.sum(0).tolist() == [TOKENS] * ROWS[0] + [0] * ROWS[1] + [2 * TOKENS] * ROWS[2]


def parameters(flat: Tensor, *places: tuple[int, int, int]) -> list[nn.Parameter]:
    """Of each place, first element, rows and width."""
    return [nn.Parameter(flat[first : first + rows * width].view(rows, width)) for first, rows, width in places]


FLAT = torch.zeros(100)


@pytest.mark.parametrize(
    "weights",
    [
        parameters(FLAT, (0, 4, 5), (30, 2, 5)),
        parameters(FLAT, (20, 2, 5), (0, 4, 5)),
        parameters(FLAT, (0, 4, 5), (20, 5, 2)),
        parameters(FLAT, (0, 4, 5), (0, 4, 5)),
        [*parameters(FLAT, (0, 4, 5)), *parameters(torch.zeros(100), (20, 2, 5))],
        [*parameters(FLAT, (0, 4, 5)), *parameters(FLAT.view(torch.int32).view(torch.float32), (25, 2, 5))],
        [torch.zeros(100)[:20].view(4, 5), torch.zeros(100, dtype=torch.bfloat16)[20:30].view(2, 5)],
    ],
    ids=["gap", "order", "width", "same", "storage", "spacer", "dtype"],
)
def test_others_are_not_adjacent(weights):
    assert not are_adjacent(weights, dim=0)
    assert are_adjacent(parameters(FLAT, (0, 4, 5), (20, 2, 5), (30, 3, 5)), dim=0)
