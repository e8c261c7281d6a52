"""megavl against transformers, in fp32 with random weights: features, logits and every gradient."""

import pytest
import torch.nn.functional as F
from torch import Tensor

from megavl.config.model import ModelConfig
from megavl.model.pixels import tower_inputs
from tests.model import reference, tiny
from tests.models import GROUPED, HYBRID, SIGLIP_ONLY

CONFIGS = pytest.mark.parametrize("config", [HYBRID, SIGLIP_ONLY, GROUPED], ids=lambda config: config.name)


def worst(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def pair(config: ModelConfig):
    """megavl's model and transformers' with the same random weights."""
    theirs = reference.build(config)
    tiny.randomise(theirs, seed=1)
    ours = tiny.model(config)
    ours.load_state_dict(reference.translate(config, theirs.state_dict()))
    return ours, theirs


@CONFIGS
def test_tower_and_adaptor_features(config):
    ours, theirs = pair(config)
    pixels = tiny.pixels(config, images=3, seed=2)
    inputs = tower_inputs(pixels, config)
    expected = reference.image_features(theirs, inputs)
    features = ours.stem.encode(pixels, 3)
    errors = {"adaptor": worst(features, expected["adaptor"])}
    errors["siglip"] = worst(ours.stem.siglip(inputs["siglip"]), expected["siglip"])
    if config.sam:
        errors["sam"] = worst(ours.stem.sam(inputs["sam"]), expected["sam"])
    # measured 4.4e-7; an eps of 1e-5 in place of 1e-6 makes 5e-6, GELU's tanh form 1.5e-4
    assert max(errors.values()) < 2e-6, errors


@CONFIGS
@pytest.mark.parametrize("text", [(7, 5, 6), (9,)], ids=["two images", "text only"])
def test_logits(config, text):
    ours, theirs = pair(config)
    tokens = tiny.document(config, text, seed=3)
    pixels = tiny.pixels(config, images=len(text) - 1, seed=4)
    error = worst(
        ours.logits(tiny.pack([tokens], pixels, config)), reference.logits(theirs, tokens, tower_inputs(pixels, config))
    )
    assert error < 5e-6  # measured 7.0e-7


@CONFIGS
def test_loss_and_all_gradients(config):
    """One pack of three documents (two images, none, one image) against transformers on each document alone."""
    ours, theirs = pair(config)
    texts = ((7, 5, 6), (9,), (4, 8))
    documents = [tiny.document(config, text, seed) for seed, text in enumerate(texts)]
    images = tiny.pixels(config, images=3, seed=5)
    batch = tiny.pack(documents, images, config)

    loss = ours(None, batch)
    loss.backward()

    expected, image = 0.0, 0
    for text, tokens, labels in zip(texts, documents, batch.labels.split([len(d) for d in documents]), strict=True):
        mine = tower_inputs(images[image : image + len(text) - 1], config)
        image += len(text) - 1
        expected += F.cross_entropy(reference.logits(theirs, tokens, mine), labels, reduction="sum")
    expected.backward()

    assert worst(loss, expected) < 1e-6  # measured 0
    gradients = reference.translate(config, {name: p.grad for name, p in theirs.named_parameters()})
    assert all(gradient.abs().max() > 0 for gradient in gradients.values()), "a parameter that this test does not reach"
    errors = {name: worst(p.grad, gradients[name]) for name, p in ours.named_parameters()}
    # measured 3.0e-6 (hd_alpha, a sum over every feature), then 1.6e-6
    assert max(errors.values()) < 2e-5, sorted(errors.items(), key=lambda item: -item[1])[:5]
