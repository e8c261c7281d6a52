"""A pack of documents gives each document what it gets alone."""

import pytest
import torch

from tests.model import tiny
from tests.models import GROUPED, HYBRID, SIGLIP_ONLY

TEXTS = ((7, 5, 6), (9,), (1,), (4, 8))


def packed_and_alone(config):
    """The batch of all documents, and for each document its slice of the pack and a batch of its own."""
    documents = [tiny.document(config, text, seed) for seed, text in enumerate(TEXTS)]
    images = tiny.pixels(config, images=3, seed=1)
    alone, start, image = [], 0, 0
    for text, tokens in zip(TEXTS, documents, strict=True):
        mine = images[image : image + len(text) - 1]
        alone.append((slice(start, start + len(tokens)), tiny.pack([tokens], mine, config)))
        start, image = start + len(tokens), image + len(text) - 1
    return tiny.pack(documents, images, config), alone


@pytest.mark.parametrize("config", [HYBRID, SIGLIP_ONLY, GROUPED], ids=lambda config: config.name)
def test_pack_equals_documents_alone(config):
    model = tiny.random_model(config)
    batch, alone = packed_and_alone(config)
    logits = model.logits(batch)
    errors = [(logits[where] - model.logits(single)).abs().max().item() for where, single in alone]
    assert max(errors) < 1e-5  # measured 1.3e-6, of logits up to 3.7
    total = sum(model(None, single).item() for _, single in alone)
    assert model(None, batch).item() == pytest.approx(total, rel=1e-6)  # measured 2.4e-8


def test_borders_and_positions_matter():
    """Without the borders, or with positions that run on, the same tokens give other logits."""
    model = tiny.random_model(HYBRID)
    batch, _ = packed_and_alone(HYBRID)
    logits = model.logits(batch)
    total = len(batch.tokens)
    for changed in (
        {"cu_seqlens": torch.tensor([0, total], dtype=torch.int32), "lengths": (total,)},
        {"positions": torch.arange(total) * 2},
    ):
        other = model.logits(type(batch)(**{**vars(batch), **changed}))
        assert (other - logits).abs().max() > 0.1
