"""The model list and its slices."""

import math

import pytest
import torch

from megavl.config.tiles import Grid
from megavl.model.attention import Attention
from megavl.model.block import Block
from megavl.model.init import initialise
from megavl.model.vlm import VLM
from megavl.ops.dispatch import choose
from megavl.parallel.groups import ExpertAxis, TensorAxis
from tests.model import tiny
from tests.models import GROUPED, HYBRID, MLA_SIGMOID, VL2

CONFIG = HYBRID


def batch():
    tokens = tiny.document(CONFIG, (6, 7), seed=0)
    return tiny.pack([tokens], tiny.pixels(CONFIG, 1, seed=0), CONFIG)


@pytest.mark.parametrize("cuts", [(0, 1, 2, 3, 4), (0, 2, 4), (0, 1, 4), (0, 3, 4)])
def test_slices_are_the_whole(cuts):
    whole = VLM(CONFIG, tiny.ONE, tiny.OPS, 0, 4)
    initialise(whole, CONFIG, seed=3)
    h, names = None, []
    for first, stop in zip(cuts, cuts[1:], strict=False):
        stage = VLM(CONFIG, tiny.ONE, tiny.OPS, first, stop)
        initialise(stage, CONFIG, seed=3)
        names += [name for name, _ in stage.named_parameters()]
        h = stage(h, batch())
    assert names == [name for name, _ in whole.named_parameters()]
    assert torch.equal(h, whole(None, batch()))


@pytest.mark.parametrize(("first", "stop"), [(2, 2), (-1, 3), (0, 5)])
def test_a_slice_that_is_none_is_refused(first, stop):
    with pytest.raises(ValueError, match="not a slice of the 4 items"):
        VLM(CONFIG, tiny.ONE, tiny.OPS, first, stop)


def test_first_loss_is_that_of_guessing():
    model = VLM(CONFIG, tiny.ONE, tiny.OPS, 0, 4)
    initialise(model, CONFIG, seed=0)
    data = batch()
    loss = model(None, data) / (data.labels >= 0).sum()
    assert loss.item() == pytest.approx(math.log(CONFIG.decoder.vocab_size), abs=0.05)


@pytest.mark.parametrize(("field", "config"), [("heads", HYBRID), ("kv_heads", GROUPED)], ids=["heads", "kv_heads"])
def test_heads_that_do_not_divide_are_refused(field, config):
    axis = TensorAxis(rank=0, size=3 if field == "heads" else 4)
    message = (
        rf"model.decoder.{field} = {getattr(config.decoder, field)} is not divisible by parallel.tensor = {axis.size}"
    )
    with pytest.raises(ValueError, match=message):
        Attention(config.decoder, axis, tiny.OPS)


def test_shards_have_their_share_of_the_heads():
    block = Block(CONFIG.decoder, 0, TensorAxis(rank=1, size=2), ExpertAxis(), tiny.OPS)
    assert block.attn.heads == 2
    assert block.attn.q_proj.weight.shape == (16, 32)
    assert block.attn.o_proj.weight.shape == (32, 16)
    assert block.mlp.down_proj.weight.shape == (32, 28)


def test_bfloat16_follows_fp32():
    exact = tiny.random_model(CONFIG)
    rounded = tiny.random_model(CONFIG).bfloat16()
    expected = exact(None, batch())
    loss = rounded(None, batch())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=0)  # measured 9e-4
    expected.backward()
    loss.backward()
    directions = {
        name: torch.cosine_similarity(p.grad.float().flatten(), exact.get_parameter(name).grad.flatten(), dim=0).item()
        for name, p in rounded.named_parameters()
        if p.numel() > 1
    }
    assert min(directions.values()) > 0.98  # measured 0.998


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the CUDA path needs a CUDA device")
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize(
    ("config", "grids"),
    [
        (HYBRID, (Grid(0, 0),)),
        (HYBRID, ()),
        *((config, (Grid(2, 1),)) for config in VL2),
        (MLA_SIGMOID, ()),
    ],
    ids=lambda value: getattr(value, "name", f"{len(value)} images" if isinstance(value, tuple) else None),
)
def test_cuda_follows_cpu(dtype, bound, config, grids):
    device = torch.device("cuda")
    tokens = tiny.document(config, (6, 7)[: len(grids) + 1], 0, grids)
    data = tiny.pack([tokens], tiny.pixels(config, sum(grid.tiles for grid in grids), 0), config, grids)
    model = VLM(config, tiny.ONE, choose(device), 0, config.layers)
    whole = tiny.random_model(config)
    model.load_state_dict(whole.state_dict())
    model.to(device, dtype)
    loss = model(None, data.to(device))
    torch.testing.assert_close(loss.cpu(), whole(None, data), rtol=bound, atol=0)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
