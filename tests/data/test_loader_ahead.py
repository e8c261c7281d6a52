"""Tiles that ranks decode for a step as a whole, of whatever packs: the same as those of its micro-batches."""

import itertools

import pytest
import torch

from megavl.batch import StepBatch
from megavl.config.run import SourceConfig
from megavl.config.tiles import Tiling
from megavl.data.assemble import Decoded, ImageShare
from megavl.data.encoded import EncodedDocument, EncodedImage
from megavl.data.loader import Loader, StepShare
from megavl.data.sampler import Sampler
from megavl.data.tokenizer import load_tokenizer
from megavl.data.writer import StoreWriter
from tests.data.conftest import encoded_text, image_bytes
from tests.models import changed


@pytest.fixture(params=["vl", "vl2"])
def any_model(request, model, tiled_model):
    return {one.family: one for one in (model, tiled_model)}[request.param]


def share_of(rank: int, ranks: int) -> StepShare:
    """Every `ranks`-th part of the tiles of the global batch, as ranks of a world have."""
    return lambda by_replica: range(rank * sum(by_replica) // ranks, (rank + 1) * sum(by_replica) // ranks)


def load(sampler: Sampler, dp: int, ranks: int) -> list[tuple[StepBatch, ...]]:
    """The step batches of `ranks` ranks on `dp` data-parallel ranks: [step][rank]."""
    loaders = [Loader(sampler, rank * dp // ranks, dp, None, 0, ahead=share_of(rank, ranks)) for rank in range(ranks)]
    try:
        return list(zip(*loaders, strict=True))
    finally:
        for loader in loaders:
            loader.close()


def pixels_of_step(ranks: tuple[StepBatch, ...], like: torch.Tensor) -> torch.Tensor:
    return torch.cat([like[:0], *(piece for rank in ranks for piece in rank.ahead.pixels)])


@pytest.mark.parametrize(("dp", "ranks", "workers"), [(1, 1, 0), (3, 6, 0), (1, 7, 0), (2, 2, 2)])
def test_every_tile_of_a_step_is_decoded_once(corpus, any_model, train, dp, ranks, workers):
    sampler = Sampler(corpus.data(workers=workers), any_model, train)
    whole = list(Loader(Sampler(corpus.data(), any_model, train), 0, 1, ImageShare(), 0))
    for expected, shares in zip(whole, load(sampler, dp, ranks), strict=True):
        pixels = torch.cat([batch.pixels[: batch.tiles] for batch in expected.micro_batches])
        assert torch.equal(pixels_of_step(shares, pixels), pixels)
        micro_batches = [batch for rank in range(dp) for batch in shares[rank * ranks // dp].micro_batches]
        for one, other in zip(expected.micro_batches, micro_batches, strict=True):
            assert torch.equal(one.tokens, other.tokens) and other.pixels is None and other.grids == one.grids
        by_replica = [sum(batch.tiles for batch in shares[rank * ranks // dp].micro_batches) for rank in range(dp)]
        for share in shares:
            assert list(share.ahead.by_replica) == by_replica
            sizes = list(map(len, share.ahead.pixels))
            assert len(sizes) <= max(1, workers) and (not sizes or max(sizes) - min(sizes) <= 1)
        assert (expected.kind == "text") <= all(share.ahead.pixels == () for share in shares)


def test_tiles_of_a_step_outlive_those_that_come_after_it(corpus, model, train):
    """Shared memory is used again only when nothing shows it."""
    train = changed(train, steps=6)
    (fresh, held) = (
        load(Sampler(corpus.data(text_ratio=0, workers=workers), model, train), 1, 1) for workers in (0, 2)
    )
    for (one,), (other,) in zip(fresh, held, strict=True):
        assert torch.equal(torch.cat(one.ahead.pixels), torch.cat(other.ahead.pixels))


def test_places_are_used_again(corpus, model, train):
    train = changed(train, steps=12)
    loader = Loader(
        Sampler(corpus.data(text_ratio=0, workers=2, prefetch=1), model, train), 0, 1, None, 0, ahead=share_of(0, 1)
    )
    most = 0
    for _ in loader:
        most = max(most, len(loader._places._shown_by))
    loader.close()
    # A step has 12 micro-batches and 2 pieces. At most three steps are in memory: one that the reader looks at, one
    # that waits for it, one that is on its way.
    assert most <= 3 * (12 + 2) + 2


def test_tiles_alone_are_pinned(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor.clone())
    pixels = torch.ones(2, 3, 4, 4, dtype=torch.uint8)
    copy = Decoded(pixels, ()).pin_memory().pixels
    assert pinned == [pixels] and torch.equal(copy, pixels)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_reported_by_its_place_in_the_global_batch(corpus, any_model, train, tmp_path, workers):
    """A pack has a good image and a broken one. Ranks or worker processes cut between tiles, so that several may meet a
    broken one."""
    good, broken = EncodedImage(image_bytes(0, (50, 30)), 50, 30), EncodedImage(image_bytes(0, (30, 70))[:-500], 30, 70)
    prefix = str(tmp_path / "p")
    with StoreWriter(prefix, load_tokenizer(corpus.tokenizer)) as writer:
        document = (good, encoded_text(1, 2), broken, encoded_text(*range(30)))
        writer.add(EncodedDocument("the-key", "file.jsonl", document))
    data = corpus.data(workers=workers, multimodal=(SourceConfig(prefix=prefix),), text=(), text_ratio=0, seq_len=96)
    train = changed(train, steps=1)
    (ranks,) = load(Sampler(data, any_model, train), *((1, 1) if workers else (2, 4)))
    found = set(itertools.chain.from_iterable(rank.bad_images for rank in ranks))
    assert sorted((bad.pack, bad.image) for bad in found) == [(pack, 1) for pack in range(train.global_batch)]
    tiling = Tiling(any_model)
    assert ranks[0].tiles == train.global_batch * (tiling.grid(50, 30, 2).tiles + tiling.grid(30, 70, 2).tiles)
    (whole,) = Loader(Sampler(changed(data, workers=0), any_model, train), 0, 1, ImageShare(), 0)
    expected = torch.cat([batch.pixels for batch in whole.micro_batches])
    assert torch.equal(pixels_of_step(ranks, expected), expected)
