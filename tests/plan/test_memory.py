import pytest

from megavl.plan.cost import Count
from megavl.plan.memory import state_bytes
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
    state = state_bytes(config, Count(trainable=1000, frozen=100), dp=4)
    assert (state.weights, state.gradients, state.optimizer) == expected
    assert state.total == sum(expected)
