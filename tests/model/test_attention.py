"""Attention over tensor ranks: which collectives it takes."""

import pytest
import torch

from megavl.model.attention import Attention
from megavl.model.mla import LatentAttention
from megavl.parallel.groups import build_mesh
from megavl.parallel.topology import Topology
from tests.model import tiny
from tests.models import GROUPED, MLA_SOFTMAX
from tests.parallel.calls import counted

KINDS = {"attention": (Attention, GROUPED), "latent attention": (LatentAttention, MLA_SOFTMAX)}
# (forward, backward). Queries, keys and values enter together; the latent and the keys' positioned channels enter
# together, and the input of the queries by itself. Two weights of latent attention see this rank's tokens alone.
CALLS = {
    ("attention", False): ({"all-reduce": 1}, {"all-reduce": 1}),
    ("attention", True): ({"all-gather": 1, "reduce-scatter": 1}, {"all-gather": 1, "reduce-scatter": 1}),
    ("latent attention", False): ({"all-reduce": 1}, {"all-reduce": 2}),
    ("latent attention", True): (
        {"all-gather": 2, "reduce-scatter": 1},
        {"all-gather": 1, "reduce-scatter": 2, "all-reduce": 2},
    ),
}


def calls_of(kind: str, sequence: bool) -> tuple[dict, dict]:
    """The collectives of a forward and a backward pass."""
    tp = build_mesh(Topology(pp=1, dp=1, tp=2), sequence).tp
    layer_class, config = KINDS[kind]
    decoder = config.decoder
    layer = layer_class(decoder, tp, tiny.OPS)
    tiny.randomise(layer, seed=0)
    h = torch.randn(12 // (2 if sequence else 1), decoder.width).requires_grad_()
    with counted() as forward:
        y = layer(h, tiny.layout(decoder, (7, 5)))
    with counted() as backward:
        y.sum().backward()
    return dict(forward), dict(backward)


@pytest.mark.parametrize(("kind", "sequence"), CALLS)
def test_collectives_of_a_layer(pool, kind, sequence):
    assert pool.run(2, calls_of, kind, sequence) == [CALLS[kind, sequence]] * 2
