import pytest
import torch

from megavl.runtime.deepspeed.norm import squared_norm


@pytest.mark.parametrize("shape", [(0,), (1,), (63,), (64,), (5, 40), (1000, 1000)])
def test_squared_norm(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert squared_norm(x).item() == pytest.approx(x.double().square().sum().item(), rel=1e-6)  # measured 2e-8


def test_a_sum_in_fp32_would_be_noticed():
    x = torch.full((1_000_000,), 1e-3)
    exact, total = x.double().square().sum().item(), torch.zeros(())
    assert squared_norm(x).item() == pytest.approx(exact, rel=1e-6)
    for square in x.square()[:50_000]:
        total += square
    assert abs(total.item() / (exact / 20) - 1) > 1e-5
