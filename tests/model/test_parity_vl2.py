"""megavl's DeepSeek-VL2 against transformers' parts of it, in fp32 with random weights: logits and every gradient."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megavl.config.model import ModelConfig
from megavl.config.tiles import Grid
from megavl.model.pixels import tower_inputs
from megavl.model.vlm import VLM
from megavl.ops.rope import rotate_halves
from tests.model import tiny
from tests.model.reference_vl2 import Reference, translate
from tests.model.test_parity import worst
from tests.models import MHA_SOFTMAX, MLA_SIGMOID, MLA_SOFTMAX, VL2, changed

CONFIGS = pytest.mark.parametrize("config", VL2, ids=lambda config: config.name)
# Wide, tall, both, and not tiled.
GRIDS = (Grid(1, 3), Grid(2, 1), Grid(2, 2), Grid(1, 1))


def pair(config: ModelConfig) -> tuple[VLM, Reference]:
    """megavl's model and the reference with the same random weights."""
    theirs = Reference(config)
    tiny.randomise(theirs, seed=1)
    ours = tiny.model(config)
    load(ours, translate(config, theirs.state_dict()))
    return ours, theirs


@torch.no_grad()
def load(model: VLM, weights: dict[str, Tensor]) -> None:
    """All parameters, and the biases of the routers."""
    biases = {
        f"blocks.{index}.mlp.router.bias": router.bias
        for index, router in model.routers.items()
        if router.bias is not None
    }
    mine = dict(model.named_parameters()) | biases
    assert mine.keys() == weights.keys()
    for name, tensor in mine.items():
        tensor.copy_(weights[name])


def tiles(grids: tuple[Grid, ...]) -> int:
    return sum(grid.tiles for grid in grids)


def test_features_and_their_layout():
    """The tower, pixel shuffle, projector, newlines and separator, of four images at once."""
    config = MHA_SOFTMAX
    ours, theirs = pair(config)
    pixels = tiny.pixels(config, tiles(GRIDS), seed=2)
    tokens = tiny.document(config, (1,) * 5, 3, GRIDS)
    images = tower_inputs(pixels, config)["siglip"]
    expected = theirs.embed(tokens, images, GRIDS)
    tower = worst(ours.stem.siglip(images), theirs.vision(pixel_values=images).last_hidden_state)
    features = worst(ours.stem.encode(pixels, tiles(GRIDS)), theirs.features(images).flatten(1, 2))
    stem = worst(ours.stem(tiny.pack([tokens], pixels, config, GRIDS)), expected)
    assert max(tower, features, stem) < 2e-6, (tower, features, stem)  # measured 3.9e-7


@CONFIGS
@pytest.mark.parametrize("grids", [(Grid(1, 2), Grid(2, 1)), ()], ids=["two images", "text only"])
def test_logits(config, grids):
    ours, theirs = pair(config)
    tokens = tiny.document(config, (7, 5, 6)[: len(grids) + 1], 3, grids)
    pixels = tiny.pixels(config, tiles(grids), seed=4)
    logits = ours.logits(tiny.pack([tokens], pixels, config, grids))
    images = tower_inputs(pixels, config)["siglip"]
    assert worst(logits, theirs(tokens, images, grids)) < 5e-6  # measured 9.3e-7


@CONFIGS
def test_loss_and_all_gradients(config):
    """One pack of three documents (two images, none, one image) against the reference on each document alone."""
    ours, theirs = pair(config)
    cases = [((7, 5, 6), (Grid(1, 2), Grid(1, 1))), ((9,), ()), ((4, 8), (Grid(2, 2),))]
    documents = [tiny.document(config, text, seed, grids) for seed, (text, grids) in enumerate(cases)]
    grids = tuple(grid for _, group in cases for grid in group)
    images = tiny.pixels(config, tiles(grids), seed=5)
    batch = tiny.pack(documents, images, config, grids)

    loss = ours(None, batch)
    loss.backward()

    expected, tile = 0.0, 0
    labels = batch.labels.split([len(tokens) for tokens in documents])
    for (_, group), tokens, label in zip(cases, documents, labels, strict=True):
        mine = tower_inputs(images[tile : tile + tiles(group)], config)["siglip"]
        tile += tiles(group)
        expected += F.cross_entropy(theirs(tokens, mine, group), label, reduction="sum")
    expected.backward()

    assert worst(loss, expected) < 1e-6  # measured 9.3e-8
    named = {name: p.grad for name, p in theirs.named_parameters()}
    gradients = translate(config, named)
    assert all(gradient.abs().max() > 0 for gradient in gradients.values()), "a parameter that this test does not reach"
    errors = {name: worst(p.grad, gradients[name]) for name, p in ours.named_parameters()}
    assert max(errors.values()) < 2e-5, sorted(errors.items(), key=lambda item: -item[1])[:5]  # measured 2.5e-6


def halves_of_latent(q: Tensor, kv: Tensor, k_rope: Tensor, *tables: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`rotate_latent` with the channels in Llama's order."""
    nope = q.shape[2] - k_rope.shape[2]
    q_rope, k_rope = rotate_halves(q[..., nope:], k_rope, *tables)
    k = torch.cat((kv[..., :nope], k_rope.expand(-1, q.shape[1], -1)), 2)
    return torch.cat((q[..., :nope], q_rope), 2), k, kv[..., nope:]


@pytest.mark.parametrize(
    ("wrong", "least"),
    [
        ("rotary halves", 0.5),  # measured 0.91
        ("no correction bias", 0.5),  # measured 0.92
        ("sigmoid in place of softmax", 0.1),  # measured 0.30
        ("exact GELU in the tower", 1e-4),  # measured 1.6e-4
    ],
)
def test_a_wrong_part_is_noticed(wrong, least):
    config = MLA_SOFTMAX if "softmax" in wrong else MLA_SIGMOID
    ours, theirs = pair(config)
    grids = (Grid(1, 2),)
    tokens = tiny.document(config, (9, 20), 3, grids)
    pixels = tiny.pixels(config, tiles(grids), seed=4)
    match wrong:
        case "rotary halves":
            for block in ours.blocks.values():
                block.attn.ops = replace(tiny.OPS, rotate_latent=halves_of_latent)
        case "no correction bias":
            for router in ours.routers.values():
                router.bias.zero_()
        case "sigmoid in place of softmax":
            weights = ours.state_dict()
            ours = tiny.model(changed(config, decoder={"moe": {"router": "sigmoid"}}))
            ours.load_state_dict(weights, strict=False)
        case "exact GELU in the tower":
            for block in ours.stem.siglip.blocks:
                block.mlp.approximation = "none"
    logits = ours.logits(tiny.pack([tokens], pixels, config, grids))
    images = tower_inputs(pixels, config)["siglip"]
    assert worst(logits, theirs(tokens, images, grids)) > least
