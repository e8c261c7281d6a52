"""The splice of image features, and batches without images."""

import dataclasses

import pytest
import torch

from tests.model import tiny

CONFIGS = pytest.mark.parametrize("config", [tiny.HYBRID, tiny.SIGLIP_ONLY], ids=lambda config: config.name)


def text_batch(config):
    tokens = tiny.document(config, (9,), seed=0)
    return tiny.pack([tokens], tiny.pixels(config, images=0, seed=0), config.image_token_id)


def image_batch(config, images: int = 2):
    tokens = tiny.document(config, (3, 4, 5), seed=0)
    return tiny.pack([tokens], tiny.pixels(config, images, seed=0), config.image_token_id)


@CONFIGS
def test_no_images_give_zero_gradients_not_none(config):
    model = tiny.random_model(config)
    model(None, text_batch(config)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        vision = name.startswith(("stem.siglip", "stem.sam", "stem.adaptor"))
        assert parameter.grad.any() != vision, name


@CONFIGS
def test_text_is_embedded_as_it_is(config):
    stem = tiny.random_model(config).stem
    batch = text_batch(config)
    assert torch.equal(stem(None, batch), stem.embedding.weight[batch.tokens])


@CONFIGS
def test_features_replace_placeholders_in_order(config):
    stem = tiny.random_model(config).stem
    batch = image_batch(config)
    h = stem(None, batch)
    is_image = batch.tokens == config.image_token_id
    features = stem.image_features(batch.pixels)  # [2, image_tokens, D]
    assert torch.equal(h[is_image], features.flatten(0, 1))
    assert torch.equal(h[~is_image], stem.embedding.weight[batch.tokens[~is_image]])
    assert not torch.allclose(features[0], features[1])


def test_embedding_of_a_placeholder_is_never_read():
    """The placeholder's id may lie outside the vocabulary, and no row gets a gradient from it."""
    config = tiny.HYBRID.model_copy(update={"image_token_id": tiny.HYBRID.decoder.vocab_size + 5})
    stem = tiny.random_model(config).stem
    batch = image_batch(tiny.HYBRID)
    is_image = batch.tokens == tiny.HYBRID.image_token_id
    tokens = batch.tokens.masked_fill(is_image, config.image_token_id).masked_fill(batch.tokens == 0, 1)
    stem(None, dataclasses.replace(batch, tokens=tokens)).sum().backward()
    rows = stem.embedding.weight.grad.any(dim=1).nonzero().squeeze(1)
    assert set(rows.tolist()) == set(tokens[~is_image].tolist())


@pytest.mark.parametrize("images", [0, 1, 3])
def test_images_that_do_not_fill_the_placeholders_are_refused(images):
    stem = tiny.random_model(tiny.HYBRID).stem
    with pytest.raises(ValueError, match=rf"32 placeholder tokens \(id 61\) for {16 * images} image features"):
        stem(None, image_batch(tiny.HYBRID, images))
