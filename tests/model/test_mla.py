"""Latent attention over tensor ranks against the unsharded layer."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from megavl.model.mla import LatentAttention
from megavl.parallel import linear
from megavl.parallel.groups import TensorAxis, build_mesh
from megavl.parallel.shard import shard_of
from megavl.parallel.topology import Topology
from tests.model import tiny
from tests.models import MLA_SOFTMAX

CONFIG = MLA_SOFTMAX.decoder
T = 24


def layer(tp: TensorAxis) -> LatentAttention:
    """This rank's part of the layer with the values of `tiny.randomise`."""
    whole = LatentAttention(CONFIG, tiny.ONE, tiny.OPS)
    tiny.randomise(whole, seed=0)
    part = LatentAttention(CONFIG, tp, tiny.OPS)
    for name, parameter in part.named_parameters():
        parameter.data.copy_(shard_of(parameter).slice(whole.get_parameter(name).data))
    return part


def run(attention: LatentAttention, x: torch.Tensor, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and input gradient."""
    x = x.clone().requires_grad_()
    y = attention(x, tiny.layout(CONFIG, (7, 1, 16)))
    y.backward(dy)
    return y.detach(), x.grad


def on_ranks(sequence: bool, forget_to_enter: bool) -> float:
    """Worst difference between this rank's part of the layer and the unsharded one."""
    tp = build_mesh(Topology(pp=1, dp=1, tp=dist.get_world_size()), sequence).tp
    whole, part = layer(tiny.ONE), layer(tp)
    x, dy = torch.randn(2, T, CONFIG.width, generator=torch.Generator().manual_seed(1))
    expected = run(whole, x, dy)
    if forget_to_enter:
        linear.entry_products = lambda x, weights, tp, companion=None: (
            [F.linear(x, weight) for weight in weights],
            companion,
        )
    mine = (lambda full: full.chunk(tp.size)[tp.rank]) if sequence else (lambda full: full)
    pairs = list(zip(run(part, mine(x), mine(dy)), map(mine, expected), strict=True))
    for name, parameter in part.named_parameters():
        pairs.append((parameter.grad, shard_of(parameter).slice(whole.get_parameter(name).grad)))
    return max(((ours - theirs).abs() / (1 + theirs.abs())).max().item() for ours, theirs in pairs)


def every_case() -> tuple[float, float, float]:
    return on_ranks(False, False), on_ranks(True, False), on_ranks(False, True)


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_equal_the_unsharded_layer(pool, ranks):
    """Without and with sequence parallelism: output, input gradient, weight gradients. A latent that does not enter the
    parallel region is noticed."""
    plain, sequence, wrong = map(max, zip(*pool.run(ranks, every_case), strict=True))
    assert max(plain, sequence) < 1e-5  # measured 2.4e-6
    assert wrong > 1  # measured 4.0


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"model.decoder.heads = 4 is not divisible by parallel.tensor = 3"):
        LatentAttention(CONFIG, TensorAxis(size=3), tiny.OPS)


def test_a_rank_has_its_heads_and_all_of_the_latent():
    part = LatentAttention(CONFIG, TensorAxis(rank=1, size=2), tiny.OPS)
    shapes = {name: tuple(parameter.shape) for name, parameter in part.named_parameters()}
    assert shapes == {
        "q_proj.weight": (2 * (10 + 6), 32),
        "kv_down_proj.weight": (24 + 6, 32),
        "kv_norm.weight": (24,),
        "kv_up_proj.weight": (2 * (10 + 8), 24),
        "o_proj.weight": (32, 2 * 8),
    }
