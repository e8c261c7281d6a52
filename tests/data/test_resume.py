"""Thousands of samples stay where they are, whoever asks for them and from which step on."""

import itertools
import json

import pytest
import torch

from megavl.config.run import SourceConfig
from megavl.data.assemble import ImageShare
from megavl.data.loader import Loader
from megavl.data.sampler import Sampler
from tests.models import changed

STEPS, GLOBAL_BATCH = 48, 24


@pytest.fixture(scope="module")
def make(corpus, model, train):
    """A sampler of two blended text sources and images, whose windows are a few steps long."""
    text = tuple(SourceConfig(prefix=corpus.prefix(name), weight=weight) for name, weight in (("text", 2), ("more", 1)))

    def make(micro_batch=1, workers=0):
        changes = {"steps": STEPS, "global_batch": GLOBAL_BATCH, "micro_batch": micro_batch}
        return Sampler(corpus.data(text=text, workers=workers), model, changed(train, **changes))

    return make


@pytest.fixture(scope="module", autouse=True)
def small_windows():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megavl.data.stream._WINDOW", 100)
        yield


def steps_of(sampler, dp, first_step=0, stop=None, images=None):
    """(tokens, labels, document borders) of each step's whole global batch, whatever the ranks and micro-batches."""
    loaders = [Loader(sampler, rank, dp, images, first_step) for rank in range(dp)]
    try:
        for ranks in itertools.islice(zip(*loaders, strict=True), stop):
            batches = [batch for rank in ranks for batch in rank.micro_batches]
            borders = torch.cat(
                [(batch.positions == 0).nonzero().flatten() % sampler.data.seq_len for batch in batches]
            )
            yield tuple(torch.cat(part) for part in zip(*((b.tokens, b.labels) for b in batches), strict=True)), borders
    finally:
        for loader in loaders:
            loader.close()


@pytest.fixture(scope="module")
def whole(make):
    """Every step of an uninterrupted run on one rank, and its position before each."""
    sampler = make()
    steps = list(steps_of(sampler, 1))
    pieces = [piece for step in range(STEPS) for pack in sampler.plan(step).packs for piece in pack]
    assert len(pieces) > 3000 and max(entry.epochs for entry in sampler.read(STEPS).entries) > 5
    return steps, [json.loads(json.dumps(sampler.position(step))) for step in range(STEPS)]


def assert_same(found, expected):
    for (texts, borders), (expected_texts, expected_borders) in zip(found, expected, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(texts, expected_texts, strict=True))
        assert torch.equal(borders, expected_borders)


@pytest.mark.parametrize(("first_step", "dp", "micro_batch"), [(1, 2, 3), (17, 4, 6), (29, 3, 1), (46, 24, 1)])
@pytest.mark.parametrize("saved", [True, False], ids=["with a saved position", "without"])
def test_the_rest_of_a_run_from_any_step(make, whole, first_step, dp, micro_batch, saved):
    steps, positions = whole
    sampler = make(micro_batch)
    assert sampler.resume(positions[first_step] if saved else {}) == ([] if saved else ["text", "multimodal"])
    assert_same(steps_of(sampler, dp, first_step), steps[first_step:])


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_change_nothing(make, whole, workers):
    steps, positions = whole
    sampler = make(4, workers)
    sampler.resume(positions[20])
    assert_same(steps_of(sampler, 2 if workers == 1 else 1, 20, 4, ImageShare()), steps[20:24])
