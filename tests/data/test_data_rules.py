"""`check`, before a run starts, and the constructors of the data path refuse the same and say the same."""

import pytest

from megavl.config.error import ConfigError
from megavl.config.rules import check
from megavl.data.errors import DataError
from megavl.data.loader import Loader
from megavl.data.sampler import Sampler
from tests.config.runs import make_run
from tests.models import changed

NO_TEXT = "data.text_ratio = {} asks for text steps, but data.text is empty: add a source, or set data.text_ratio=0"
NO_MULTIMODAL = (
    "data.text_ratio = {} asks for multimodal steps, but data.multimodal is empty: add a source, or set "
    "data.text_ratio=1"
)
NO_TOKENS = (
    "an image takes up to {} tokens and is never split, so data.seq_len = {} leaves no room for text beside it: the "
    "text would be learned without its image; set data.seq_len well above {}"
)
NO_TILES = (
    "an image takes up to 5 tiles, its overview included, and is never split, so no pack of data.max_tiles = 4 could "
    "hold it: set data.max_tiles to 5 or more, or lower model.tiling.max_tiles"
)
LEFT_OVER = (
    "train.global_batch = 12 is not divisible by data-parallel ranks * train.micro_batch = {}: packs would be left "
    "over; change the batch to {}"
)


def refusals_at_the_start(data, model, train, dp):
    try:
        check(make_run(model=model, data=data, train=train), dp)
    except ConfigError as error:
        return error.problems
    return []


def refusals_of_the_constructors(data, model, train, dp):
    try:
        sampler = Sampler(data, model, train)
        Loader(sampler, 0, dp, None, 0)
    except DataError as error:
        return str(error).splitlines()
    sampler.plan(0)  # what is accepted can be packed
    return []


@pytest.mark.parametrize(
    ("tiled", "changes", "expected"),
    [
        (False, {"seq_len": 15}, [NO_TOKENS.format(16, 15, 16)]),
        (False, {"seq_len": 16}, [NO_TOKENS.format(16, 16, 16)]),
        (False, {"seq_len": 17}, []),
        (False, {"seq_len": 16, "multimodal": (), "text_ratio": 1}, []),
        (True, {"seq_len": 30}, [NO_TOKENS.format(31, 30, 31)]),
        (True, {"seq_len": 31}, [NO_TOKENS.format(31, 31, 31)]),
        (True, {"seq_len": 32}, []),
        (True, {"max_tiles": 4}, [NO_TILES]),
        (True, {"max_tiles": 5}, []),
        (True, {"max_tiles": 6}, []),
        (True, {"max_tiles": 4, "multimodal": (), "text_ratio": 1}, []),
        (False, {"max_tiles": 1}, []),
        (False, {"text": (), "text_ratio": 0}, []),
        (False, {"text": (), "text_ratio": 0.01}, [NO_TEXT.format(0.01)]),
        (False, {"text": (), "text_ratio": 1}, [NO_TEXT.format(1)]),
        (False, {"text": (), "text_ratio": {"start": 1.0, "final": 0.0, "steps": 5}}, [NO_TEXT.format(1)]),
        (False, {"text": (), "text_ratio": {"start": 1.0, "final": 0.0}}, []),
        (False, {"multimodal": (), "text_ratio": 0}, [NO_MULTIMODAL.format(0)]),
        (False, {"multimodal": (), "text_ratio": 0.99}, [NO_MULTIMODAL.format(0.99)]),
        (False, {"multimodal": (), "text_ratio": 1}, []),
        (False, {"text": (), "multimodal": (), "text_ratio": 0.5}, [NO_TEXT.format(0.5), NO_MULTIMODAL.format(0.5)]),
    ],
)
def test_documents_that_cannot_be_packed(corpus, model, tiled_model, train, tiled, changes, expected):
    run = corpus.data(**changes), tiled_model if tiled else model, train, 1
    assert refusals_at_the_start(*run) == refusals_of_the_constructors(*run) == expected


@pytest.mark.parametrize(
    ("dp", "micro_batch", "expected"),
    [
        (1, 11, [LEFT_OVER.format("1 * 11 = 11", "11 or 22")]),
        (1, 12, []),
        (1, 13, [LEFT_OVER.format("1 * 13 = 13", "13")]),
        (3, 4, []),
        (4, 2, [LEFT_OVER.format("4 * 2 = 8", "8 or 16, or the data-parallel ranks to 3")]),
        (13, 1, [LEFT_OVER.format("13 * 1 = 13", "13, or the data-parallel ranks to 12")]),
    ],
)
def test_a_global_batch_that_leaves_packs_over(corpus, model, train, dp, micro_batch, expected):
    run = corpus.data(), model, changed(train, micro_batch=micro_batch), dp
    assert refusals_at_the_start(*run) == refusals_of_the_constructors(*run) == expected
