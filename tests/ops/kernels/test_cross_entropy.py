"""Kernels of the cross entropy against fp64, alone and within the loss that the model computes."""

import math

import pytest
import torch
from torch import Tensor

from megavl.ops.cross_entropy import REFERENCE_CROSS_ENTROPY, row_statistics, write_gradient
from megavl.parallel.cross_entropy import summed_cross_entropy
from megavl.parallel.groups import TensorAxis
from tests.ops.kernels.interpreter import Mistake, error, far_apart, kernels, no_launch, normal, sliced

# One column; less than a block; a multiple of neither block; a whole vocabulary.
SIZES = [(1, 1), (6, 30), (7, 8191), (5, 12289), (2, 102400)]
# Worst measured in the interpreter: statistics 1.2e-7 in either dtype; gradient 6.9e-8 and 1.7e-3, of values up to 1.
STATISTICS_TOLERANCE = 2e-6
GRADIENT_TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 4e-3}
STATISTICS_MISTAKES = {
    "sum not rescaled": ("summed * tl.exp(before - largest)", "summed"),
    "maximum of the last block": ("tl.maximum(before, tl.max(value, 0))", "tl.max(value, 0)"),
    "tail counted": ('mask=column < vocab, other=float("-inf")', "mask=column < vocab, other=0.0"),
    "label of another rank": ("mask=label >= 0", "mask=label >= -1"),
}
GRADIENT_MISTAKES = {
    "no label": ("probability - 1.0", "probability"),
    "label of another block": ("column == tl.load", "(column % BLOCK) == tl.load"),
    "first block only": ("(program % blocks) * BLOCK", "(program % blocks) * 0"),
    "stride ignored": ("logits + row * stride + column", "logits + row * vocab + column"),
}


def case(rows: int, vocab: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [rows, vocab], a slice with rows further apart; columns [rows], the third row without a label; the log
    normaliser [rows], the last one infinite."""
    (logits,) = normal(rows, dtype, (rows, vocab), device=device)
    logits = sliced(5 * logits)
    columns = torch.randint(0, vocab, (rows,), generator=torch.Generator().manual_seed(rows)).to(device)
    columns[0], columns[2:3] = vocab - 1, -1
    log_normaliser = logits.float().logsumexp(1)
    log_normaliser[3:][-1:] = math.inf
    return logits, columns, log_normaliser


def statistics_error(rows: int, vocab: int, dtype: torch.dtype, mistake: Mistake | None = None, device="cpu") -> float:
    logits, columns, _ = case(rows, vocab, dtype, device)
    before = logits.clone()
    found = kernels("cross_entropy", mistake).fused_row_statistics(logits, columns)
    assert torch.equal(logits, before)
    assert all(each.dtype == torch.float32 for each in found)
    wide = logits.double()
    maximum = wide.amax(1)
    label_logit = wide.gather(1, columns.clamp(min=0)[:, None]).squeeze(1).masked_fill(columns < 0, 0.0)
    return error(list(found), [maximum, (wide - maximum[:, None]).exp().sum(1), label_logit])


def gradient_error(rows: int, vocab: int, dtype: torch.dtype, mistake: Mistake | None = None, device="cpu") -> tuple:
    """Error against fp64; share of values unlike the reference's; whether the memory around the slice is intact."""
    logits, columns, log_normaliser = case(rows, vocab, dtype, device)
    exact = (logits.double() - log_normaliser.double()[:, None]).exp()
    rows_with_label = (columns >= 0).nonzero().squeeze(1)
    exact[rows_with_label, columns[rows_with_label]] -= 1
    reference = logits.clone()
    write_gradient(reference, columns, log_normaliser)
    kernels("cross_entropy", mistake).fused_write_gradient(logits, columns, log_normaliser)
    intact = logits._base.isnan().sum().item() == 8 * rows
    return (logits.double() - exact).abs().max().item(), (logits != reference).float().mean().item(), intact


DTYPES = pytest.mark.parametrize("dtype", GRADIENT_TOLERANCES, ids=str)


@DTYPES
@pytest.mark.parametrize(("rows", "vocab"), SIZES)
def test_statistics(interpreted, rows, vocab, dtype):
    assert interpreted(statistics_error, rows, vocab, dtype) < STATISTICS_TOLERANCE


@DTYPES
@pytest.mark.parametrize(("rows", "vocab"), SIZES)
def test_gradient(interpreted, rows, vocab, dtype):
    off, unequal, intact = interpreted(gradient_error, rows, vocab, dtype)
    assert off < GRADIENT_TOLERANCES[dtype] and intact
    assert dtype == torch.float32 or unequal < 1e-3  # measured 0


@pytest.mark.parametrize("mistake", STATISTICS_MISTAKES)
def test_a_mistake_in_the_statistics_is_noticed(interpreted, mistake):
    off = interpreted(statistics_error, 5, 12289, torch.float32, STATISTICS_MISTAKES[mistake])
    assert off > 5 * STATISTICS_TOLERANCE


@pytest.mark.parametrize("mistake", GRADIENT_MISTAKES)
def test_a_mistake_in_the_gradient_is_noticed(interpreted, mistake):
    off, _, _ = interpreted(gradient_error, 5, 12289, torch.float32, GRADIENT_MISTAKES[mistake])
    assert not off < 100 * GRADIENT_TOLERANCES[torch.float32]


def loss_and_gradients(fused: bool) -> list[Tensor]:
    """As the head computes them, some rows at a time."""
    local = kernels("cross_entropy").TRITON_CROSS_ENTROPY if fused else REFERENCE_CROSS_ENTROPY
    x, weight = (tensor.requires_grad_() for tensor in normal(0, torch.bfloat16, (9, 16), (9000, 16)))
    labels = torch.arange(9) * 1000
    labels[4] = -100
    loss = summed_cross_entropy(x, weight, labels, -100, TensorAxis(), local, chunk_bytes=4 * 9000 * 2)
    loss.backward()
    return [loss.detach(), x.grad, weight.grad]


def test_the_loss(interpreted):
    ours, expected = (interpreted(loss_and_gradients, fused) for fused in (True, False))
    for our, other, tolerance in zip(ours, expected, (1e-5, 2**-8, 2**-8), strict=True):
        assert (our - other).abs().max() <= tolerance * other.abs().max()  # measured 0
    assert not ours[1][4].any()


def diverged() -> tuple[float, float]:
    """The total of a row that holds a NaN, and of one with infinities."""
    logits = torch.randn(2, 9000)
    logits[0, 8500], logits[1, 0] = math.nan, math.inf
    _, total, _ = kernels("cross_entropy").fused_row_statistics(logits, torch.zeros(2, dtype=torch.int64))
    return tuple(total.tolist())


def test_a_diverged_run_is_not_hidden(interpreted):
    assert not any(map(math.isfinite, interpreted(diverged)))


def odd_inputs() -> None:
    module = kernels("cross_entropy")
    # Columns that are not side by side are the reference's.
    logits, columns = torch.randn(30, 4).t(), torch.tensor([3, -1, 0, 29])
    expected = row_statistics(logits, columns)
    expected_gradient = logits.clone()
    write_gradient(expected_gradient, columns, torch.zeros(4))
    with no_launch(module, "statistics_kernel", "gradient_kernel"):
        assert all(map(torch.equal, module.fused_row_statistics(logits, columns), expected))
        module.fused_write_gradient(logits, columns, torch.zeros(4))
        assert torch.equal(logits, expected_gradient)
        # No rows, no launch.
        none = torch.empty(0, 30)
        assert module.fused_row_statistics(none, columns[:0]).total.shape == (0,)
        module.fused_write_gradient(none, columns[:0], torch.empty(0))


def test_odd_inputs(interpreted):
    interpreted(odd_inputs)


def far_error() -> float:
    module = kernels("cross_entropy")
    (logits,) = normal(0, torch.bfloat16, (3, 40))
    columns, far = torch.tensor([0, 39, 7]), far_apart(logits)
    pairs = zip(module.fused_row_statistics(far, columns), module.fused_row_statistics(logits, columns), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)
    for each in (logits, far):
        module.fused_write_gradient(each, columns, torch.full((3,), 4.0))
    return error([far], [logits])


def test_offsets_of_far_rows(interpreted):
    assert interpreted(far_error) == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@DTYPES
@pytest.mark.parametrize(("rows", "vocab"), [*SIZES, (4096, 102400), (1030, 129280)])
def test_errors_on_a_gpu(rows, vocab, dtype):
    assert statistics_error(rows, vocab, dtype, device="cuda") < 5 * STATISTICS_TOLERANCE
    off, _, intact = gradient_error(rows, vocab, dtype, device="cuda")
    assert off < 2 * GRADIENT_TOLERANCES[dtype] and intact
