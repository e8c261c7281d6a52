"""The head computes logits of the supervised positions alone."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from megavl.config.tokens import IGNORE_INDEX
from megavl.model.head import Head
from megavl.parallel.groups import TensorAxis, build_mesh
from megavl.parallel.shard import shard_of
from megavl.parallel.topology import Topology
from tests.model import tiny
from tests.models import SIGLIP_ONLY

CONFIG = SIGLIP_ONLY.decoder
T = 12
# Rows of the labels of 12 positions.
CASES = {"some": (0, 3, 4, 11), "all": tuple(range(T)), "none": ()}


def labels_of(case: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels, and the positions of those that are not ignored, as a batch has them."""
    labels, rows = torch.full((T,), IGNORE_INDEX), list(CASES[case])
    labels[rows] = torch.arange(len(rows)) * 5
    return labels, torch.tensor(rows or [0])


def run(head: Head, case: str, h: torch.Tensor) -> list[torch.Tensor]:
    """Loss, and gradients of the input and the parameters."""
    h = h.clone().requires_grad_()
    loss = head(h, *labels_of(case))
    loss.backward()
    return [loss.detach(), h.grad, *(parameter.grad for parameter in head.parameters())]


def hidden() -> torch.Tensor:
    return torch.randn(T, CONFIG.width, generator=torch.Generator().manual_seed(0))


def whole() -> Head:
    head = Head(CONFIG, tiny.ONE, tiny.OPS)
    tiny.randomise(head, seed=1)
    return head


@pytest.mark.parametrize("case", CASES)
def test_the_loss_is_that_of_all_logits(case):
    head, (labels, _) = whole(), labels_of(case)
    ours = run(head, case, hidden())
    head.zero_grad()
    h = hidden().requires_grad_()
    F.cross_entropy(head.logits(h), labels, ignore_index=IGNORE_INDEX, reduction="sum").backward()
    theirs = [h.grad, *(parameter.grad for parameter in head.parameters())]
    expected = F.cross_entropy(head.logits(h), labels, ignore_index=IGNORE_INDEX, reduction="sum").detach()
    torch.testing.assert_close(ours, [expected, *theirs], rtol=1e-5, atol=1e-5)  # measured 8e-6


def test_only_supervised_positions_have_logits(monkeypatch):
    rows = []
    monkeypatch.setattr(F, "linear", lambda x, weight: rows.append(len(x)) or x @ weight.t())
    for case in CASES:
        run(whole(), case, hidden())
    assert rows == [4, T, 1]


def on_ranks(sequence: bool) -> float:
    """Worst difference of loss and gradients from the unsharded head."""
    tp = build_mesh(Topology(pp=1, dp=1, tp=dist.get_world_size()), sequence).tp
    worst = 0.0
    for case in CASES:
        head, part = whole(), part_of(whole(), tp)
        loss, h_grad, *grads = run(head, case, hidden())
        mine = hidden().chunk(tp.size)[tp.rank] if sequence else hidden()
        my_loss, my_h_grad, *my_grads = run(part, case, mine)
        wanted = [shard_of(held).slice(grad) for held, grad in zip(part.parameters(), grads, strict=True)]
        expected = [loss, h_grad.chunk(tp.size)[tp.rank] if sequence else h_grad, *wanted]
        found = [my_loss, my_h_grad, *my_grads]
        worst = max(worst, *((a - b).abs().max().item() for a, b in zip(found, expected, strict=True)))
    return worst


def part_of(whole: Head, tp: TensorAxis) -> Head:
    part = Head(CONFIG, tp, tiny.OPS)
    for name, parameter in part.named_parameters():
        parameter.data.copy_(shard_of(parameter).slice(whole.get_parameter(name).data))
    return part


@pytest.mark.parametrize("sequence", [False, True])
def test_tensor_ranks_equal_the_unsharded_head(pool, sequence):
    assert max(pool.run(2, on_ranks, sequence)) < 1e-5  # measured 4e-6
