"""Initial weights: their distributions, and that no topology changes them."""

import pytest
import torch

from megavl.config.model import ModelConfig
from megavl.model.init import initialise
from megavl.model.vlm import VLM
from megavl.parallel.groups import ExpertAxis, TensorAxis
from megavl.parallel.shard import shard_of
from tests.model import tiny
from tests.models import HYBRID, MLA_SIGMOID, changed

CONFIG = HYBRID
# As many elements as a standard deviation within 5 % takes.
WIDE = {"width": 128, "vocab_size": 512}
ONE_EXPERT_AXIS = ExpertAxis()


def weights(
    axis: TensorAxis = tiny.ONE,
    first: int = 0,
    stop: int = 4,
    seed: int = 7,
    config: ModelConfig = CONFIG,
    ep: ExpertAxis = ONE_EXPERT_AXIS,
) -> dict[str, torch.nn.Parameter]:
    model = VLM(config, axis, tiny.OPS, first, stop, ep)
    initialise(model, config, seed)
    return dict(model.named_parameters())


def test_same_seed_same_weights_whatever_torch_drew_before():
    torch.manual_seed(1)
    one = weights()
    torch.manual_seed(2)
    torch.rand(5)
    two = weights()
    assert all(torch.equal(one[name], two[name]) for name in one)
    other = weights(seed=8)
    drawn = [name for name, p in one.items() if p.unique().numel() > 1]
    assert len(drawn) > 20
    assert not any(torch.equal(one[name], other[name]) for name in drawn)


def test_no_two_parameters_are_drawn_alike():
    drawn = [p.flatten()[:16] for p in weights().values() if p.unique().numel() > 1]
    for i, left in enumerate(drawn):
        for right in drawn[:i]:
            assert not torch.allclose(left / left.norm(), right / right.norm())


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(("first", "stop"), [(0, 4), (2, 4)])
def test_shards_are_slices_of_the_whole(size, first, stop):
    whole = weights()
    parts = [weights(TensorAxis(rank, size), first, stop) for rank in range(size)]
    cut = 0
    for name, part in parts[0].items():
        cuts = shard_of(part).cuts
        if not cuts:
            assert all(torch.equal(other[name], whole[name]) for other in parts), name
        else:
            cut += 1
            assert torch.equal(torch.cat([other[name] for other in parts], cuts[0].dim), whole[name]), name
    assert cut > 7


@pytest.mark.parametrize("cut_width", [False, True])
def test_experts_are_slices_of_the_whole(cut_width):
    """Three expert ranks, each on two tensor ranks."""
    config = MLA_SIGMOID
    whole = weights(stop=5, config=config)
    for name, full in whole.items():
        if ".experts." in name:
            assert not any(torch.equal(full[0], other) for other in full[1:]), name
    for tensor in range(2):
        for expert in range(3):
            ep = ExpertAxis(expert, 3, cut_width=cut_width)
            for name, part in weights(TensorAxis(tensor, 2), 0, 5, config=config, ep=ep).items():
                assert torch.equal(part, shard_of(part).slice(whole[name])), name


def test_distributions_of_vl2():
    config = changed(MLA_SIGMOID, decoder=WIDE)
    model = VLM(config, tiny.ONE, tiny.OPS, 0, 5)
    model.routers[1].bias.fill_(1)
    initialise(model, config, seed=0)
    block = model.blocks["1"]
    weights = (
        block.attn.kv_down_proj.weight,
        block.mlp.router.weight,
        block.mlp.shared.up_proj.weight,
        block.mlp.experts.down_proj,
    )
    for weight in weights:
        assert weight.std().item() == pytest.approx(config.init_std, rel=0.05)
    assert (block.attn.kv_norm.weight == 1).all()
    assert not model.routers[1].bias.any()
    for vector in (model.stem.newline, model.stem.separator):
        assert vector.std().item() == pytest.approx(128**-0.5, rel=0.15)


def test_distributions():
    model = VLM(changed(CONFIG, decoder=WIDE), tiny.ONE, tiny.OPS, 0, 4)
    initialise(model, CONFIG, seed=0)
    stem, block = model.stem, model.blocks["1"]
    for weight in (stem.embedding.weight, block.attn.q_proj.weight, block.mlp.down_proj.weight, model.head.proj.weight):
        assert weight.std().item() == pytest.approx(CONFIG.init_std, rel=0.05)
    for weight in (stem.adaptor.proj.weight, stem.siglip.blocks[0].attn.qkv.weight, stem.sam.pos_embed):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    convolution = stem.sam.downsamples[1].weight  # [24, 12, 3, 3]: fan out 24 * 9
    assert convolution.std().item() == pytest.approx((2 / (24 * 9)) ** 0.5, rel=0.05)
    for norm in (block.attn_norm, model.head.norm, stem.siglip.norm, stem.sam.neck[1]):
        assert (norm.weight == 1).all()
    for zero in (stem.sam.hd_alpha_downsamples, stem.sam.blocks[0].attn.rel_pos_h, stem.siglip.norm.bias):
        assert not zero.any()


def test_every_value_is_set():
    model = VLM(CONFIG, tiny.ONE, tiny.OPS, 0, 4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    initialise(model, CONFIG, seed=0)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
