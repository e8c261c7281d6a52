"""The splice of image features, and batches without images."""

import dataclasses

import pytest
import torch
import torch.distributed as dist

from megavl.batch import Batch, tile_share
from megavl.config.model import ModelConfig
from megavl.config.tiles import Grid, Tiling
from megavl.data.image import write_blank
from megavl.model import encoder as encoder_module
from megavl.model.encoder import TileEncoder
from megavl.model.stem import Splice, Stem
from megavl.parallel.groups import TensorAxis, build_mesh
from megavl.parallel.shard import shard_of
from megavl.parallel.topology import Topology
from tests.model import tiny
from tests.models import HYBRID, MHA_SOFTMAX, SIGLIP_ONLY

CONFIGS = pytest.mark.parametrize("config", [HYBRID, SIGLIP_ONLY, MHA_SOFTMAX], ids=lambda config: config.name)


def text_batch(config):
    tokens = tiny.document(config, (9,), seed=0)
    return tiny.pack([tokens], tiny.pixels(config, images=0, seed=0), config)


def image_batch(config, images: int = 2):
    """Two images in the text, and the pixels of `images`."""
    if config.tiling is not None:
        grids = (Grid(1, 2), Grid(2, 1))
        tokens = tiny.document(config, (3, 4, 5), 0, grids)
        return tiny.pack([tokens], tiny.pixels(config, 6, seed=0), config, grids)
    tokens = tiny.document(config, (3, 4, 5), seed=0)
    return tiny.pack([tokens], tiny.pixels(config, images, seed=0), config)


def blank_batch(config):
    """Text in a multimodal step."""
    pixels = torch.empty_like(tiny.pixels(config, images=1, seed=0))
    write_blank(config, pixels)
    return dataclasses.replace(text_batch(config), pixels=pixels)


def is_vision(name: str) -> bool:
    return name.startswith("stem.") and not name.startswith("stem.embedding")


@CONFIGS
def test_a_text_step_does_not_touch_the_towers(config):
    model = tiny.random_model(config)
    model(None, text_batch(config)).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == is_vision(name), name


@CONFIGS
def test_a_blank_tile_gives_zero_gradients_and_no_other_result(config):
    model, other = tiny.random_model(config), tiny.random_model(config)
    loss, without = model(None, blank_batch(config)), other(None, text_batch(config))
    assert torch.equal(loss, without)
    loss.backward()
    without.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if is_vision(name):
            assert not parameter.grad.any(), name
        else:
            assert torch.equal(parameter.grad, other.get_parameter(name).grad), name


@CONFIGS
def test_gradients_come_in_one_order_with_images_and_without(config):
    """ZeRO-2 reduces them in the order in which they come, over ranks with images and without."""

    def order(batch) -> list[str]:
        model, came = tiny.random_model(config), []
        for name, parameter in model.named_parameters():
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: came.append(name))
        model(None, batch).backward()
        return came

    assert order(image_batch(config)) == order(blank_batch(config))


@CONFIGS
def test_text_is_embedded_as_it_is(config):
    stem = tiny.random_model(config).stem
    for batch in (text_batch(config), blank_batch(config)):
        assert torch.equal(stem(batch), stem.embedding.weight[batch.tokens])


@CONFIGS
def test_features_replace_placeholders_in_order(config):
    stem = tiny.random_model(config).stem
    batch = image_batch(config)
    h, features = stem(batch), stem.encode(batch.pixels, batch.tiles).flatten(0, 1)
    is_image = batch.tokens == config.image_token_id
    assert torch.equal(h[batch.places.features], features)
    assert torch.equal(h[~is_image], stem.embedding.weight[batch.tokens[~is_image]])
    assert not torch.allclose(features[0], features[-1])
    filled = batch.places.features.tolist()
    if config.tiling is not None:
        assert torch.equal(h[batch.places.newlines], stem.newline.expand(len(batch.places.newlines), -1))
        assert torch.equal(h[batch.places.separators], stem.separator.expand(2, -1))
        filled += batch.places.newlines.tolist() + batch.places.separators.tolist()
    assert sorted(filled) == is_image.nonzero().squeeze(1).tolist()


@CONFIGS
def test_gradients_of_the_splice_are_right(config):
    """Against indexing that autograd differentiates."""
    stem = tiny.random_model(config).stem
    batch = image_batch(config)
    words = torch.randn(len(batch.tokens), config.decoder.width, requires_grad=True)
    features = torch.randn(batch.tiles, config.tile_features, config.decoder.width, requires_grad=True)
    weights = torch.randn(words.shape)
    marks = [] if config.tiling is None else [stem.newline, stem.separator]
    spliced = Splice.apply(words, features, *(marks or (None, None)), batch.places)
    indexed = words.index_put((batch.places.features,), features.flatten(0, 1))
    for mark, places in zip(marks, (batch.places.newlines, batch.places.separators), strict=False):
        indexed = indexed.index_put((places,), mark)
    assert torch.equal(spliced, indexed)
    leaves = (words, features, *marks)
    ours, theirs = (torch.autograd.grad((h * weights).sum(), leaves) for h in (spliced, indexed))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)  # measured 9.5e-7, sums in another order


@CONFIGS
def test_features_from_elsewhere_stand_for_pixels(config):
    """Output and gradients are those of the stem that encodes."""
    stem, batch = tiny.random_model(config).stem, image_batch(config)
    encoded = TileEncoder(config)
    encoded.load_state_dict({name: stem.get_parameter(name) for name, _ in encoded.named_parameters()}, assign=True)
    features = encoded(batch.pixels)
    assert torch.equal(features, stem.encode(batch.pixels, batch.tiles))
    whole = stem(batch)
    weights = torch.randn(whole.shape)
    (whole * weights).sum().backward()
    of_words = stem.embedding.weight.grad.clone()
    of_towers = {name: parameter.grad.clone() for name, parameter in stem.named_parameters()}
    stem.zero_grad()
    leaf = features.detach().requires_grad_()
    given = stem(dataclasses.replace(batch, pixels=None, features=leaf))
    assert torch.equal(given, whole)
    (given * weights).sum().backward()
    assert torch.equal(stem.embedding.weight.grad, of_words)
    features.backward(leaf.grad)
    for name, parameter in stem.named_parameters():
        torch.testing.assert_close(parameter.grad, of_towers[name], rtol=0, atol=0)


@CONFIGS
def test_a_batch_with_neither_pixels_nor_features_is_refused_if_it_has_images(config):
    stem = tiny.random_model(config).stem
    with pytest.raises(ValueError, match="neither pixels nor features are here, but the images .* have . tiles"):
        stem(dataclasses.replace(image_batch(config), pixels=None))
    text = dataclasses.replace(text_batch(config), pixels=None)
    assert torch.equal(stem(text), stem.embedding.weight[text.tokens])


@CONFIGS
def test_features_of_no_tiles_give_zero_gradients_to_the_marks(config):
    """A micro-batch without images has the gradients of the others, which ZeRO reduces together."""
    stem = tiny.random_model(config).stem
    nothing = torch.empty(0, config.tile_features, config.decoder.width)
    batch = dataclasses.replace(text_batch(config), pixels=None, features=nothing)
    assert torch.equal(stem(batch), stem.embedding.weight[batch.tokens])
    stem(batch).sum().backward()
    if config.tiling is not None:
        assert not stem.newline.grad.any() and not stem.separator.grad.any()


def test_embedding_of_a_placeholder_is_never_read():
    """The placeholder's id may lie outside the vocabulary, and no row gets a gradient from it."""
    # Not `changed`: validation refuses this id.
    config = HYBRID.model_copy(update={"image_token_id": HYBRID.decoder.vocab_size + 5})
    stem = tiny.random_model(config).stem
    batch = image_batch(HYBRID)
    is_image = batch.tokens == HYBRID.image_token_id
    tokens = batch.tokens.masked_fill(is_image, config.image_token_id).masked_fill(batch.tokens == 0, 1)
    stem(dataclasses.replace(batch, tokens=tokens)).sum().backward()
    rows = stem.embedding.weight.grad.any(dim=1).nonzero().squeeze(1)
    assert set(rows.tolist()) == set(tokens[~is_image].tolist())


@pytest.mark.parametrize("images", [0, 1, 3])
def test_images_that_do_not_fill_the_placeholders_are_refused(images):
    with pytest.raises(ValueError, match=rf"32 placeholder .*61\) for {images} images that take {16 * images}"):
        image_batch(HYBRID, images)


def tiles_on_ranks(config: ModelConfig, images: int, sequence: bool, forget_to_sum: bool) -> float:
    """Worst difference between the stem of ranks that share the tiles and the stem of one process: output, gradients.
    SAM is frozen; what is replicated must be the whole gradient, on every rank."""
    size = dist.get_world_size()
    tp = build_mesh(Topology(pp=1, dp=1, tp=size), sequence, shares_images=True).tp
    alone, shared = tiny.random_model(config).stem, Stem(config, tp)
    for name, parameter in shared.named_parameters():
        parameter.data.copy_(shard_of(parameter).slice(alone.get_parameter(name).data))
        for each in (parameter, alone.get_parameter(name)):
            each.requires_grad_(not name.startswith("sam."))
    if forget_to_sum:
        encoder_module.summing_gradients = lambda module, axis: module
    batch = many_images(config, images)
    mine = tile_share(batch.tiles, tp.rank, size)
    pixels = batch.pixels[mine.start : mine.stop]
    if images and not mine:
        pixels = torch.zeros_like(batch.pixels[:1])
    part = shared(dataclasses.replace(batch, pixels=pixels))
    whole = alone(batch)
    weight = torch.randn(whole.shape, generator=torch.Generator().manual_seed(1))
    (whole * weight).sum().backward()
    cut = (lambda x: x.chunk(size)[tp.rank]) if sequence else (lambda x: x)
    (part * cut(weight)).sum().backward()
    pairs = [(part, cut(whole))]
    for name, parameter in shared.named_parameters():
        reference = alone.get_parameter(name).grad
        assert (parameter.grad is None) == (reference is None), name
        if reference is not None:
            pairs.append((parameter.grad, shard_of(parameter).slice(reference)))
    return max(((ours - theirs).abs() / (1 + theirs.abs())).max().item() for ours, theirs in pairs)


def many_images(config: ModelConfig, images: int) -> Batch:
    """Text with images among it; T divides by 4. Tiled images have 2 and 3 tiles by turns."""
    grids = (Grid(0, 0),) * images if config.tiling is None else (Grid(1, 1), Grid(1, 2))[:images] * images
    grids = grids[:images]
    placeholders = sum(len(Tiling(config).layout(grid)) for grid in grids)
    text = (60 - placeholders % 4 - images, *[1] * images)
    tokens = tiny.document(config, text, 0, grids)
    pixels = tiny.pixels(config, sum(grid.tiles for grid in grids), seed=0)
    return tiny.pack([tokens], pixels, config, grids)


def every_case(counts: list[int], forget_to_sum: bool = False) -> list[float]:
    return [
        tiles_on_ranks(config, images, sequence, forget_to_sum)
        for config in (HYBRID, MHA_SOFTMAX)
        for images in counts
        for sequence in (False, True)
    ]


@pytest.mark.parametrize(("ranks", "counts"), [(2, [3, 1, 0]), (4, [6, 3])])
def test_ranks_that_share_the_tiles_equal_one_process(pool, ranks, counts):
    """More images than ranks, fewer, none; so that some ranks have a full share, a short one or nothing."""
    assert max(max(errors) for errors in pool.run(ranks, every_case, counts)) < 1e-5  # measured 2.1e-6


def test_a_gradient_that_is_not_summed_would_be_noticed(pool):
    assert min(pool.run(2, every_case, [3], True)[0]) > 1e-2


def test_a_share_that_is_not_this_ranks_own_is_refused():
    stem = Stem(HYBRID, TensorAxis(rank=1, size=4, shares_images=True))
    with pytest.raises(ValueError, match=r"2 tiles are here on tensor rank 1 of 4, .* of which 1 belong here"):
        stem(image_batch(HYBRID, 2))


def test_shares_are_runs_of_which_only_the_last_are_short():
    assert [list(tile_share(5, rank, 4)) for rank in range(4)] == [[0, 1], [2, 3], [4], []]
    assert [list(tile_share(0, rank, 2)) for rank in range(2)] == [[], []]
    assert [list(tile_share(2, rank, 1)) for rank in range(1)] == [[0, 1]]
