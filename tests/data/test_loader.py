"""The batches themselves: what is in them, and that nothing but (seed, step) decides it."""

import dataclasses
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from megavl.batch import tile_share
from megavl.config.presets import PRESETS
from megavl.config.run import SourceConfig
from megavl.config.tiles import Tiling
from megavl.config.tokens import IGNORE_INDEX
from megavl.data import image
from megavl.data.assemble import Assembled, ImageShare
from megavl.data.decode import decode
from megavl.data.encoded import EncodedDocument, EncodedImage
from megavl.data.errors import DataError
from megavl.data.format import IMAGE
from megavl.data.loader import Loader
from megavl.data.places import PlaceMemory
from megavl.data.sampler import Sampler
from megavl.data.store import Store
from megavl.data.tokenizer import load_tokenizer
from megavl.data.writer import StoreWriter
from tests.data.conftest import encoded_text, image_bytes, pixels_of
from tests.models import changed

SEQ_LEN, PLACEHOLDER = 96, 399
_ALL = ImageShare()


@pytest.fixture(scope="module", params=["vl", "vl2"])
def any_model(request, model, tiled_model):
    """A model of each family."""
    return {one.family: one for one in (model, tiled_model)}[request.param]


def steps(corpus, model, train, dp=1, micro_batch=1, workers=0, first_step=0, stop=None, **changes):
    """The step batches of all ranks: [step][rank]."""
    train = changed(train, micro_batch=micro_batch)
    sampler = Sampler(corpus.data(workers=workers, **changes), model, train)
    loaders = [Loader(sampler, rank, dp, ImageShare(), first_step) for rank in range(dp)]
    try:
        return list(itertools.islice(zip(*loaders, strict=True), stop))
    finally:
        for loader in loaders:
            loader.close()


def tiles_of(batch, kind: str = "multimodal", share: ImageShare = _ALL) -> torch.Tensor:
    """Pixels of this rank's tiles, after a check of what a batch without any has: nothing in a text step, else one
    blank tile."""
    if kind == "text":
        assert len(batch.pixels) == 0
        return batch.pixels
    mine = len(tile_share(batch.tiles, share.rank, share.size))
    assert len(batch.pixels) == max(1, mine)
    assert mine or (batch.pixels == batch.pixels[:, :, :1, :1]).all()
    return batch.pixels[:mine]


def packs(ranks):
    """Everything in a step as one list of packs: (tokens, labels, positions, document lengths), and all its pixels."""
    rows, pixels = [], []
    for batch in (batch for rank in ranks for batch in rank.micro_batches):
        assert batch.lengths == tuple(batch.cu_seqlens.diff().tolist())
        lengths = np.diff(batch.cu_seqlens.numpy())
        ends = np.cumsum(lengths)
        for start in range(0, len(batch.tokens), SEQ_LEN):
            inside = lengths[(ends > start) & (ends <= start + SEQ_LEN)]
            assert inside.sum() == SEQ_LEN, "a document crosses the border of two packs"
            part = slice(start, start + SEQ_LEN)
            fields = (batch.tokens[part], batch.labels[part], batch.positions[part])
            rows.append((*(field.tolist() for field in fields), inside.tolist()))
        pixels.append(tiles_of(batch, ranks[0].kind))
    return rows, torch.cat(pixels)


def assert_same(left, right):
    for one, other in zip(left, right, strict=True):
        (rows, pixels), (other_rows, other_pixels) = packs(one), packs(other)
        assert rows == other_rows
        assert torch.equal(pixels, other_pixels)
        facts = ("step", "kind", "supervised_tokens", "tokens", "images", "tiles", "squared_tokens")
        assert all(getattr(one[0], fact) == getattr(rank, fact) for rank in other for fact in facts)


@pytest.fixture(scope="module")
def reference(corpus, any_model, train):
    return steps(corpus, any_model, train)


@pytest.mark.parametrize(("dp", "micro_batch"), [(1, 12), (2, 1), (3, 2), (4, 3), (12, 1)])
def test_samples_do_not_depend_on_ranks_and_micro_batches(corpus, any_model, train, reference, dp, micro_batch):
    assert_same(reference, steps(corpus, any_model, train, dp, micro_batch))


def test_samples_do_not_depend_on_worker_processes_nor_on_a_resume(corpus, any_model, train, reference):
    assert_same(reference[3:6], steps(corpus, any_model, train, dp=1, micro_batch=3, workers=2, first_step=3, stop=3))
    assert_same(reference[5:], steps(corpus, any_model, train, dp=3, micro_batch=2, first_step=5))


def test_batches_have_the_declared_shapes_and_types(any_model, reference, train):
    tiling = Tiling(any_model)
    assert [ranks[0].step for ranks in reference] == list(range(train.steps))
    assert {ranks[0].kind for ranks in reference} == {"text", "multimodal"}
    for (step,) in reference:
        assert len(step.micro_batches) == train.global_batch
        for batch in step.micro_batches:
            for field in (batch.tokens, batch.labels, batch.positions):
                assert (field.dtype, field.shape) == (torch.int64, (SEQ_LEN,))
            assert batch.cu_seqlens.dtype == torch.int32
            assert batch.cu_seqlens[0] == 0 and batch.cu_seqlens[-1] == SEQ_LEN and (batch.cu_seqlens.diff() > 0).all()
            assert int((batch.tokens == PLACEHOLDER).sum()) == sum(len(tiling.layout(grid)) for grid in batch.grids)
            pixels = tiles_of(batch, step.kind)
            size = any_model.pixel_tower.image_size
            assert (pixels.dtype, pixels.shape) == (torch.uint8, (batch.tiles, 3, size, size))


def test_step_facts_are_those_of_the_actual_batch(corpus, reference):
    eos = load_tokenizer(corpus.tokenizer).eos
    for (step,) in reference:
        supervised = tokens = images = tiles = squared = 0
        for batch in step.micro_batches:
            supervised += int((batch.labels != IGNORE_INDEX).sum())
            images += len(batch.grids)
            tiles += len(tiles_of(batch, step.kind))
            for start, stop in itertools.pairwise(batch.cu_seqlens.tolist()):
                assert batch.positions[start:stop].tolist() == list(range(stop - start))
                document, labels = batch.tokens[start:stop], batch.labels[start:stop]
                padding = stop == SEQ_LEN and bool((document == eos).all() and (labels == IGNORE_INDEX).all())
                tokens += 0 if padding else stop - start
                squared += 0 if padding else (stop - start) ** 2
        assert (supervised, tokens) == (step.supervised_tokens, step.tokens)
        assert (images, tiles, squared) == (step.images, step.tiles, step.squared_tokens)


@pytest.mark.parametrize("seq_len", [SEQ_LEN, 32])
def test_an_epoch_supervises_every_text_token_but_the_first_exactly_once(
    corpus, any_model, train, seq_len, monkeypatch
):
    """Token by token against the documents themselves, with documents that are cut where packs are short."""
    monkeypatch.setattr("megavl.data.stream._WINDOW", 24)  # packs; far less than an epoch
    store = Store(corpus.prefix("multimodal"))
    train = changed(train, steps=40)
    data = corpus.data(text=(), text_ratio=0, seq_len=seq_len)
    sampler = Sampler(data, any_model, train)
    seen: dict[int, dict[int, int]] = {}
    for step, batches in enumerate(Loader(sampler, 0, 1, None, 0)):
        for pack, batch in zip(sampler.plan(step).packs, batches.micro_batches, strict=True):
            offset = 0
            for piece in pack:
                tokens, labels = (
                    batch.tokens[offset : offset + piece.tokens],
                    batch.labels[offset : offset + piece.tokens],
                )
                expected_tokens, expected_labels = _document(store, piece.document, sampler.tiling)
                assert tokens.tolist() == expected_tokens[piece.start : piece.stop]
                assert labels.tolist() == expected_labels[piece.start : piece.stop]
                offset += piece.tokens
                targets = seen.setdefault(piece.document, {})
                for position in np.flatnonzero(labels != IGNORE_INDEX).tolist():
                    targets[piece.start + position] = targets.get(piece.start + position, 0) + 1
            assert (batch.labels[offset:] == IGNORE_INDEX).all()
    assert set(seen) == set(range(len(store)))
    for document, targets in seen.items():
        expected = _document(store, document, sampler.tiling)[1]
        assert set(targets) == {position for position, label in enumerate(expected) if label != IGNORE_INDEX}
        # The run ends within a window, perhaps between the parts of a document that it holds of two epochs.
        assert max(targets.values()) - min(targets.values()) <= 2


def _grids(store, document, tiling):
    """Of the images of a document, by their pixels."""
    sequences = [index for index in store.sequences(document) if store.modes[index] == IMAGE]
    return [tiling.grid(*decode(store.image(index)).size, len(sequences)) for index in sequences]


def _document(store, document, tiling):
    """(tokens, labels) of a whole document, written out."""
    tokens, is_text, grids = [], [], iter(_grids(store, document, tiling))
    for index in range(*store.documents[document : document + 2]):
        if store.modes[index] == IMAGE:
            size = len(tiling.layout(next(grids)))
            tokens += [PLACEHOLDER] * size
            is_text += [False] * size
        else:
            tokens += store.text(index, 0, int(store.lengths[index])).tolist()
            is_text += [True] * int(store.lengths[index])
    labels = [token if text else IGNORE_INDEX for token, text in zip(tokens[1:], is_text[1:], strict=True)]
    return tokens, [*labels, IGNORE_INDEX]


def test_pixels_are_those_of_the_images_in_the_order_of_their_placeholders(corpus, any_model, train):
    store = Store(corpus.prefix("multimodal"))
    sampler = Sampler(corpus.data(text_ratio=0), any_model, changed(train, steps=1))
    tiling = sampler.tiling
    (step,) = Loader(sampler, 0, 1, ImageShare(), 0)
    for pack, batch in zip(sampler.plan(0).packs, step.micro_batches, strict=True):
        expected, grids = [], []
        for piece in pack:
            offset, of_document = 0, iter(_grids(store, piece.document, tiling))
            for index in range(*store.documents[piece.document : piece.document + 2]):
                if store.modes[index] != IMAGE:
                    offset += int(store.lengths[index])
                    continue
                grid = next(of_document)
                if piece.start <= offset < piece.stop:
                    expected.append(pixels_of(decode(store.image(index)), any_model, grid))
                    grids.append(grid)
                offset += len(tiling.layout(grid))
        assert batch.grids == tuple(grids)
        assert torch.equal(tiles_of(batch), torch.cat([image.empty_pixels(any_model, 0), *expected]))


def test_a_siglip_model_gets_images_of_its_size(corpus, model, train):
    plain = changed(model, sam=None)
    (step,) = next(iter(steps(corpus, plain, train, stop=1, text_ratio=0)))
    assert {batch.pixels.shape[3] for batch in step.micro_batches} == {model.siglip.image_size}


def test_without_pixels_nothing_is_decoded(corpus, any_model, train, reference, monkeypatch):
    monkeypatch.setattr("megavl.data.assemble.decode", None)
    sampler = Sampler(corpus.data(workers=2), any_model, train)
    for (expected,), step in zip(reference, Loader(sampler, 0, 1, None, 0), strict=True):
        for one, other in zip(expected.micro_batches, step.micro_batches, strict=True):
            assert other.pixels is None and other.grids == one.grids
            assert torch.equal(one.tokens, other.tokens) and torch.equal(one.labels, other.labels)


def test_all_of_a_batch_is_pinned(reference, monkeypatch):
    """Page-locked memory needs a GPU; here each tensor says that it was asked."""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor.clone())
    batch = next(one for (step,) in reference for one in step.micro_batches if one.tiles)
    copy = Assembled(batch, ()).pin_memory().batch
    assert len(pinned) == 5 + 3 + 1 and (copy.packs, copy.grids) == (batch.packs, batch.grids)
    for name, field in vars(copy).items():
        if isinstance(field, torch.Tensor):
            assert torch.equal(field, vars(batch)[name]) and field is not vars(batch)[name]
    assert all(torch.equal(vars(copy.places)[name], places) for name, places in vars(batch.places).items())
    assert dataclasses.replace(batch, pixels=None).pin_memory().pixels is None


def multimodal_store(corpus, tmp_path, sequences) -> SourceConfig:
    prefix = str(tmp_path / "p")
    with StoreWriter(prefix, load_tokenizer(corpus.tokenizer)) as writer:
        writer.add(EncodedDocument("the-key", "file.jsonl", sequences))
    return SourceConfig(prefix=prefix)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_becomes_a_blank_one_and_is_reported(corpus, any_model, train, tmp_path, workers):
    """A pack holds one document, of a good image and a broken one; the text stays, and so does the number of tiles."""
    model, tiling = any_model, Tiling(any_model)
    good, broken = EncodedImage(image_bytes(0, (50, 30)), 50, 30), EncodedImage(image_bytes(0, (30, 70))[:-500], 30, 70)
    source = multimodal_store(corpus, tmp_path, (good, encoded_text(1, 2), broken, encoded_text(*range(30))))
    changes = {"workers": workers, "multimodal": (source,), "text": (), "text_ratio": 0, "seq_len": 96}
    ((step,),) = steps(corpus, model, train, stop=1, **changes)
    found = step.bad_images
    assert [(bad.pack, bad.image) for bad in found] == [(pack, 1) for pack in range(train.global_batch)]
    assert {(bad.dataset, bad.document, bad.sequence) for bad in found} == {(source.prefix, "the-key", 2)}
    assert "bytes that cannot be decoded as an image" in found[0].reason
    grids = tiling.grid(50, 30, 2), tiling.grid(30, 70, 2)
    blank = image.empty_pixels(model, grids[1].tiles)
    image.write_blank(model, blank)
    expected = torch.cat((pixels_of(decode(good.data), model, grids[0]), blank))
    first = len(tiling.layout(grids[0]))
    for batch in step.micro_batches:
        assert batch.grids == grids and batch.tokens[first : first + 2].tolist() == [1, 2]
        assert torch.equal(batch.pixels, expected)


def test_prompts_are_read_but_not_learned(corpus, model, train, tmp_path):
    prompt, answer = encoded_text(5, 6, 7, supervised=False), encoded_text(8, 9)
    picture = EncodedImage(image_bytes(0, (50, 50)), 50, 50)
    source = multimodal_store(corpus, tmp_path, (prompt, picture, prompt, answer, prompt, answer))
    ((step,),) = steps(corpus, model, train, stop=1, multimodal=(source,), text=(), text_ratio=0)
    length = 3 + 16 + 3 + 2 + 3 + 2
    for batch in step.micro_batches:
        tokens, labels = batch.tokens[:length].tolist(), batch.labels[:length].tolist()
        assert tokens == [5, 6, 7, *[PLACEHOLDER] * 16, 5, 6, 7, 8, 9, 5, 6, 7, 8, 9]
        assert labels == [IGNORE_INDEX] * 21 + [8, 9] + [IGNORE_INDEX] * 3 + [8, 9, IGNORE_INDEX]


@pytest.mark.parametrize("seq_len", [96, 32])
def test_supervised_tokens_are_the_labels_of_the_global_batch(corpus, any_model, train, tmp_path, seq_len):
    """Documents of prompts, answers and images in any order, whole and cut; the count is known before they are read."""
    random_ = random.Random(0)
    picture = EncodedImage(image_bytes(0, (50, 50)), 50, 50)
    with StoreWriter(str(tmp_path / "p"), load_tokenizer(corpus.tokenizer)) as writer:
        for key in range(60):
            kinds = random_.choices(("prompt", "answer", "image"), k=random_.randint(1, 6))
            sequences = tuple(
                picture
                if kind == "image"
                else encoded_text(*range(5, 6 + random_.randint(0, 30)), supervised=kind == "answer")
                for kind in kinds
            )
            writer.add(EncodedDocument(str(key), "file.jsonl", sequences))
    source = SourceConfig(prefix=str(tmp_path / "p"))
    changes = {"multimodal": (source,), "text": (), "text_ratio": 0, "seq_len": seq_len}
    both = steps(corpus, any_model, train, dp=2, micro_batch=3, **changes)
    for ranks in both:
        batches = [batch for rank in ranks for batch in rank.micro_batches]
        assert sum(int((batch.labels != IGNORE_INDEX).sum()) for batch in batches) == ranks[0].supervised_tokens
        assert sum(len(tiles_of(batch)) for batch in batches) == ranks[0].tiles


@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_tensor_ranks_may_share_the_tiles(corpus, any_model, train, ranks):
    """Each makes a run of a micro-batch's tiles; together, in order, they have all of them."""
    sampler = Sampler(corpus.data(text_ratio=0), any_model, changed(train, steps=2, micro_batch=4))
    whole = list(Loader(sampler, 0, 1, ImageShare(), 0))
    parts = [list(Loader(sampler, 0, 1, ImageShare(rank, ranks), 0)) for rank in range(ranks)]
    for step, shares in zip(whole, zip(*parts, strict=True), strict=True):
        for number, batch in enumerate(step.micro_batches):
            shared = [share.micro_batches[number] for share in shares]
            assert all(torch.equal(one.tokens, batch.tokens) for one in shared)
            own = [tiles_of(one, share=ImageShare(rank, ranks)) for rank, one in enumerate(shared)]
            assert torch.equal(torch.cat(own), tiles_of(batch))
            assert max(map(len, own)) == -(-batch.tiles // ranks)


def test_pixels_of_a_step_outlive_those_that_come_after_it(corpus, model, train):
    """Memory is used again only when nothing shows it: all steps are held here, and compared with fresh ones."""
    train = changed(train, steps=6)
    held = steps(corpus, model, train, workers=2, micro_batch=2, text_ratio=0)
    assert_same(held, steps(corpus, model, train, micro_batch=2, text_ratio=0))


def test_a_place_holds_a_byte_for_each_pixel_and_channel():
    """3.1 MB for an image of the 7B. As float32 for both towers, normalised, it had 14.4 MB: 4.6 times as many."""
    model = PRESETS["vl_7b"]
    memory = PlaceMemory(model)
    pixels = memory.room(0, tiles=2)
    assert pixels.shape == (2, 3, 1024, 1024) and pixels.untyped_storage().nbytes() == 2 * 3 * 1024**2
    assert memory.room(0, tiles=1).data_ptr() == pixels.data_ptr()  # no fresh memory for fewer tiles


def test_memory_of_pixels_is_used_again(corpus, model, train):
    train = changed(train, steps=12)
    sampler = Sampler(corpus.data(text_ratio=0, workers=2, prefetch=1), model, train)
    loader = Loader(sampler, 0, 1, ImageShare(), 0)
    most = 0
    for _ in loader:
        most = max(most, len(loader._places._shown_by))
    loader.close()
    # 12 micro-batches a step: those that are looked at, those that arrived behind them, those on their way.
    assert most <= 3 * 12 + 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_token_id": 5}, "document the-key .*: its text holds the token 5, which is model.image_token_id"),
        ({"vocab": 9}, "document the-key .*: its tokens are 5 to 9, but the model's vocabulary is 0 to 8"),
    ],
)
def test_text_that_the_model_would_misread_is_refused(corpus, model, train, tmp_path, changes, message):
    source = multimodal_store(corpus, tmp_path, (encoded_text(5, 9, 7), EncodedImage(image_bytes(0, (50, 50)), 50, 50)))
    sampler = Sampler(corpus.data(multimodal=(source,), text=(), text_ratio=0), model, train)
    decoder = model.decoder.model_copy(update={"vocab_size": changes.get("vocab", 400)})
    # A tokenizer that fits is checked at the start; here the file holds more than its tokenizer could have made.
    sampler.model = model.model_copy(
        update={"decoder": decoder, "image_token_id": changes.get("image_token_id", PLACEHOLDER)}
    )
    with pytest.raises(DataError, match=message):
        next(iter(Loader(sampler, 0, 1, None, 0)))


class Dying(Store):
    """A store whose first text ends the process, as the system does when memory runs out."""

    def __reduce__(self):
        return Dying, (self.prefix,)

    def text(self, sequence, start, stop):
        os.kill(os.getpid(), signal.SIGKILL)


class Hanging(Store):
    """A store on a disk that does not answer."""

    def __reduce__(self):
        return Hanging, (self.prefix,)

    def text(self, sequence, start, stop):
        time.sleep(3600)


@pytest.mark.parametrize(
    ("kind", "timeout_s", "message"),
    [
        (Dying, 60, r"a loader process of this rank was killed \(.*\); due is step 4, with .* memory"),
        (Hanging, 0.5, r"no micro-batch from .* for 0.5 s; due is step 4, with .* raise data.timeout_s"),
    ],
)
def test_a_worker_process_that_brings_nothing_ends_the_run(corpus, model, train, kind, timeout_s, message):
    sampler = Sampler(corpus.data(text_ratio=1, workers=1, timeout_s=timeout_s), model, train)
    sampler.stores["text"] = (kind(corpus.prefix("text")),)
    with pytest.raises(DataError, match=message) as error:
        next(iter(Loader(sampler, 0, 1, ImageShare(), 3)))
    assert f"these documents of {corpus.prefix('text')}: text-" in str(error.value)


_HELD = """
import multiprocessing, sys, time
from megavl.config.presets import PRESETS
from megavl.config.run import DataConfig, SourceConfig, TrainConfig
from megavl.data.assemble import ImageShare
from megavl.data.loader import Loader
from megavl.data.sampler import Sampler

tokenizer, prefix = sys.argv[1:]
data = DataConfig(tokenizer=tokenizer, text=[SourceConfig(prefix=prefix)], text_ratio=1, seq_len=96, workers=1)
sampler = Sampler(data, PRESETS["vl_debug"], TrainConfig(steps=9, global_batch=1))
steps = iter(Loader(sampler, 0, 1, ImageShare(), 0))
next(steps)
print(multiprocessing.active_children()[0].pid, flush=True)
time.sleep(60)
"""


def test_worker_processes_end_with_a_killed_trainer(corpus):
    arguments = [sys.executable, "-c", _HELD, corpus.tokenizer, corpus.prefix("text")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=environment) as trainer:
        worker = int(trainer.stdout.readline())
        assert Path(f"/proc/{worker}").exists()
        trainer.kill()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{worker}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{worker}").exists()
