"""What one rank computes of a cross entropy, against torch's."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megavl.ops.cross_entropy import row_statistics, write_gradient

V = 30
# One block of rows, and more than two.
ROWS = pytest.mark.parametrize("rows", [12, 600])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def case(rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits [rows, V] and columns [rows]; every fifth label is of another rank or none."""
    generator = torch.Generator().manual_seed(rows)
    logits = 5 * torch.randn(rows, V, generator=generator)
    columns = torch.randint(0, V, (rows,), generator=generator)
    columns[::5] = -1
    return logits.to(dtype), columns


@ROWS
@DTYPES
def test_statistics(rows, dtype):
    logits, columns = case(rows, dtype)
    before = logits.clone()
    maximum, total, label_logit = row_statistics(logits, columns)
    exact = logits.double()
    assert maximum.dtype == total.dtype == label_logit.dtype == torch.float32
    assert torch.equal(logits, before)
    assert torch.equal(maximum, logits.float().max(dim=1).values)
    torch.testing.assert_close((maximum + total.log()).double(), exact.logsumexp(1), rtol=1e-6, atol=1e-6)
    for row, column in enumerate(columns.tolist()):
        assert label_logit[row] == (0 if column < 0 else logits[row, column].float())


@ROWS
@DTYPES
def test_gradient(rows, dtype):
    """Rows with a label here, with a label of another rank, and without any."""
    logits, columns = case(rows, dtype)
    log_normaliser = logits.float().logsumexp(1)
    log_normaliser[::10] = torch.inf
    expected = logits.double().softmax(1) - F.one_hot(columns.clamp(min=0), V) * (columns >= 0)[:, None]  # [rows, V]
    write_gradient(logits, columns, log_normaliser)
    assert logits.dtype == dtype
    assert not logits[::10].any()
    assert logits[5::10].float().sum(1).min() > 0.99  # no label is subtracted
    expected[::10] = 0.0
    # fp32: measured 1.2e-7; bf16 rounds the gradient itself: 2^-9 of a value up to 1
    torch.testing.assert_close(logits.double(), expected, rtol=0, atol=1e-6 if dtype == torch.float32 else 4e-3)
