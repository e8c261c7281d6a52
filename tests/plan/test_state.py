import pytest

from megavl.plan.cost import Count
from megavl.plan.state import state_bytes
from tests.config.runs import make_run


# Mixed-precision Adam over 4 ranks (ZeRO, section 5, with fp32 gradients): weights, gradients, optimizer in bytes.
@pytest.mark.parametrize(
    ("zero", "precision", "expected"),
    [
        (0, "fp32", (4 * 1100, 4 * 1000, 8 * 1000)),
        (1, "fp32", (4 * 1100, 4 * 1000, 12 * 250)),
        (1, "bf16", (2 * 1100, 4 * 1000, 12 * 250)),
        (2, "bf16", (2 * 1100, 4 * 250, 12 * 250)),
        (3, "bf16", (2 * 275, 4 * 250, 12 * 250)),
    ],
)
def test_stages(zero, precision, expected):
    config = make_run(parallel={"zero": zero}, train={"precision": precision})
    state = state_bytes(config, Count(trainable=1000, frozen=100, experts=0), dp=4)
    assert (state.weights, state.gradients, state.optimizer) == expected
    assert state.total == sum(expected)


@pytest.mark.parametrize(("precision", "optimizer"), [("fp32", 8), ("bf16", 12)])
def test_one_rank_in_fp32_keeps_no_masters_under_zero_1(precision, optimizer):
    config = make_run(parallel={"zero": 1}, train={"precision": precision})
    assert state_bytes(config, Count(trainable=1000, frozen=0, experts=0), dp=1).optimizer == optimizer * 1000


def test_experts_have_fewer_replicas():
    """Of 1000 parameters 600 are of experts, which 2 of the 8 data-parallel ranks hold; the other 400 are on all."""
    config = make_run(parallel={"zero": 1, "expert": 4}, train={"precision": "bf16"})
    state = state_bytes(config, Count(trainable=1000, frozen=0, experts=600), dp=8)
    assert (state.weights, state.gradients, state.optimizer) == (2 * 1000, 4 * 1000, 12 * (400 // 8 + 600 // 2))
