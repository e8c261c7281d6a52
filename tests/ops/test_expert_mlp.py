"""SwiGLU of experts as grouped products, against one SwiGLU per row."""

import pytest
import torch
import torch.nn.functional as F

from megavl.ops.activation import swiglu
from megavl.ops.expert_mlp import ComposedExpertMlp
from megavl.ops.grouped import Groups, reference_grouped_linear


@pytest.mark.parametrize("counts", [[3, 0, 7, 1, 0], [0, 0, 11]])
def test_each_row_goes_through_its_expert(counts):
    draw = torch.Generator().manual_seed(0)
    experts, rows, d, f = len(counts), sum(counts), 5, 9
    shapes = ((rows, d), (experts, f, d), (experts, f, d), (experts, d, f))
    inputs = [torch.randn(shape, dtype=torch.float64, generator=draw).requires_grad_() for shape in shapes]
    x, gate, up, down = inputs
    y = ComposedExpertMlp(reference_grouped_linear, swiglu)(*inputs, Groups(torch.tensor(counts)))  # [N, D]
    expert = torch.arange(experts).repeat_interleave(torch.tensor(counts))  # [N]
    expected = torch.stack(
        [
            F.linear(F.silu(F.linear(row, gate[e])) * F.linear(row, up[e]), down[e])
            for row, e in zip(x, expert.tolist(), strict=True)
        ]
    )  # [N, D]
    torch.testing.assert_close(y, expected)
    upstream = torch.randn(rows, d, dtype=torch.float64, generator=draw)
    ours, theirs = (torch.autograd.grad(each, inputs, upstream) for each in (y, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)
