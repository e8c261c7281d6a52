import json
from collections import Counter

import pytest

from megavl.data import stream as stream_module
from megavl.data.format import IMAGE
from megavl.data.stream import Stream
from tests.data.shapes import TILED, WHOLE, interleaved, texts, tiled

SEQ_LEN, WINDOW = 96, 20


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    """Windows so small that some hundred packs cross many."""
    monkeypatch.setattr(stream_module, "_WINDOW", WINDOW)


def make(*stores, weights=None, seed=0, seq_len=SEQ_LEN, tiling=WHOLE, max_tiles=None):
    return Stream(stores, weights or (1.0,) * len(stores), seq_len, tiling, (seed, 0), max_tiles)


TEXTS, MORE, IMAGES = texts(150, 0), texts(70, 1, scale=15), interleaved(60, 2)
BLEND = (TEXTS, MORE), (3.0, 1.0)


@pytest.mark.parametrize(
    ("shape", "tiling"), [(TEXTS, WHOLE), (IMAGES, WHOLE), (IMAGES, TILED)], ids=["text", "whole", "tiled"]
)
def test_every_document_is_read_whole_and_once_per_epoch(shape, tiling):
    """After any number of packs no document has begun two more epochs than another, but for those of one window."""
    one, seen, lengths = make(shape, tiling=tiling), Counter(), [len(modes) for modes in shape.tokens(tiling)]
    whole_windows = 0
    for number in range(400):
        begun = Counter(piece.document for piece in one.packs(number, number + 1)[0] if piece.start == 0)
        seen.update(begun)
        start = one._start(number + 1)
        if start.pack == number + 1:
            counts = [seen[document] for document in range(len(shape))]
            assert max(counts) - min(counts) <= 1 and sum(counts) == start.documents[0]
            assert sum(count * length for count, length in zip(counts, lengths, strict=True)) == start.tokens[0]
            whole_windows += 1
    assert whole_windows >= 15 and min(seen.values()) >= 3


@pytest.mark.parametrize(("tiling", "max_tiles"), [(WHOLE, 1), (TILED, 5)], ids=["whole", "tiled"])
def test_the_pieces_of_a_window_are_its_documents(tiling, max_tiles):
    one = make(IMAGES, seq_len=40, tiling=tiling, max_tiles=max_tiles)
    one.packs(300, 301)
    modes = IMAGES.tokens(tiling)
    for start, following in zip(one._starts[:8], one._starts[1:9], strict=True):
        pieces = sorted(piece for pack in one.packs(start.pack, following.pack) for piece in pack)
        assert sum(piece.tokens for piece in pieces) == following.tokens[0] - start.tokens[0]
        assert sum(piece.start == 0 for piece in pieces) == following.documents[0] - start.documents[0]
        for piece in pieces:
            grids, sizes = [tiling.grids[number] for number in piece.grids], IMAGES.sizes[piece.document]
            assert grids == [tiling.grid(*size, len(sizes)) for size in sizes]
            # Its images are a run of the document's.
            runs = [grids[first : first + piece.images] for first in range(len(grids) + 1)]
            held = (modes[piece.document][piece.start : piece.stop] == IMAGE).sum()
            assert (held, piece.tiles) in [
                (sum(len(tiling.layout(grid)) for grid in run), sum(grid.tiles for grid in run)) for run in runs
            ]
            assert piece.tiles <= max_tiles
    assert sum(piece.start > 0 for piece in pieces) > len(pieces) // 4


def test_epochs_and_seeds_differ_in_order():
    orders = []
    for seed in (0, 1):
        one = make(TEXTS, seed=seed)
        draws = [piece.document for pack in one.packs(0, 400) for piece in pack if piece.start == 0]
        orders += [draws[:150], draws[150:300]]
    assert len({tuple(order) for order in orders}) == 4 and all(order != sorted(order) for order in orders)


def test_packs_keep_both_budgets_and_leave_little_room():
    packs = make(*BLEND[0], weights=BLEND[1]).packs(0, 200)
    sizes = [sum(piece.tokens for piece in pack) for pack in packs]
    assert max(sizes) <= SEQ_LEN
    assert sum(sizes) / (SEQ_LEN * len(sizes)) > 0.96  # measured 0.968: windows of only 20 packs
    for one, max_tiles in ((WHOLE, 1), (WHOLE, 2), (WHOLE, 4), (TILED, 5), (TILED, 8)):
        packs = make(IMAGES, tiling=one, max_tiles=max_tiles).packs(0, 200)
        assert max(sum(piece.tiles for piece in pack) for pack in packs) == max_tiles
        assert max(sum(piece.tokens for piece in pack) for pack in packs) <= SEQ_LEN


def test_a_pack_holds_its_pieces_in_the_order_of_the_draws_and_its_place_says_nothing_of_its_lengths():
    one = make(TEXTS)
    drawn = one._draws(one._origin)[0]["document"].tolist()
    counts = []
    for pack in one.packs(0, one._start(0).pack + WINDOW):
        places = [drawn.index(piece.document) for piece in pack]
        assert places == sorted(places)
        counts.append(len(pack))
    assert counts != sorted(counts) and counts != sorted(counts, reverse=True)


def test_a_pack_does_not_depend_on_what_was_asked_before():
    expected = make(*BLEND[0], weights=BLEND[1]).packs(0, 150)
    jumping = make(*BLEND[0], weights=BLEND[1])
    for first, stop in ((119, 120), (0, 7), (60, 150), (5, 6), (119, 125)):
        assert jumping.packs(first, stop) == expected[first:stop]


def test_weights_are_shares_of_tokens():
    one = make(*BLEND[0], weights=BLEND[1])
    for use in (one.read(300), one.expect(300)):
        tokens = [source.tokens for source in use]
        assert tokens[0] / sum(tokens) == pytest.approx(0.75, abs=0.01)
        # MORE's documents are shorter: it gives a quarter of the tokens with about as many documents.
        assert use[1].documents > 0.6 * use[0].documents


def test_what_was_read_is_what_the_packs_hold():
    one = make(*BLEND[0], weights=BLEND[1])
    pieces = [piece for pack in one.packs(0, 133) for piece in pack]
    for source, use in enumerate(one.read(133)):
        mine = [piece for piece in pieces if piece.source == source]
        assert use.documents == sum(piece.start == 0 for piece in mine)
        assert use.tokens == sum(piece.tokens for piece in mine)
    assert [(use.documents, use.tokens) for use in one.read(0)] == [(0, 0)] * 2


def test_what_is_expected_is_what_is_read():
    one = make(*BLEND[0], weights=BLEND[1])
    for expected, read in zip(one.expect(2000), one.read(2000), strict=True):
        assert expected.documents == pytest.approx(read.documents, rel=0.02)
        assert expected.tokens == pytest.approx(read.tokens, rel=0.02)  # measured 0.004


@pytest.mark.parametrize("pack", [0, 1, 63, 64, 65, 250, 1000])
def test_a_saved_position_gives_the_same_packs_without_the_windows_before(pack, monkeypatch):
    whole = make(*BLEND[0], weights=BLEND[1])
    expected, position = whole.packs(pack, pack + 50), json.loads(json.dumps(whole.position(pack)))
    resumed, packed = make(*BLEND[0], weights=BLEND[1]), []
    monkeypatch.setattr(resumed, "_pack", lambda start: packed.append(start.window) or Stream._pack(resumed, start))
    assert resumed.resume(position) and resumed.packs(pack, pack + 50) == expected
    assert packed == list(range(position["window"], position["window"] + len(packed))) and len(packed) <= 5
    assert resumed.position(pack) == position
    assert resumed.packs(0, 30) == whole.packs(0, 30)  # what lies before is found anew
    assert resumed.packs(pack, pack + 50) == expected


CHANGES = {
    "seed": {"seed": 1},
    "seq_len": {"seq_len": SEQ_LEN + 1},
    "weights": {"weights": (1.0, 3.0)},
    "budget of tiles": {"max_tiles": 2},
    "tiles": {"tiling": TILED},
    "datasets": {"stores": (texts(150, 5), MORE)},
    "order of the datasets": {"stores": (MORE, TEXTS)},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_position_of_a_stream_with_other_packs_is_not_taken_over(change):
    options = {"stores": BLEND[0], "weights": BLEND[1]} | change
    stores = options.pop("stores")
    position, other = make(*BLEND[0], weights=BLEND[1]).position(500), make(*stores, **options)
    assert not other.resume(position)
    assert other.packs(500, 520) == make(*stores, **options).packs(500, 520)


def test_a_budget_of_tiles_that_never_binds_is_no_other_stream():
    position = make(*BLEND[0], weights=BLEND[1]).position(500)
    assert make(*BLEND[0], weights=BLEND[1], max_tiles=SEQ_LEN // 16).resume(position)


@pytest.mark.parametrize("change", [{"max_tiles": 3}, {"max_images": 1}, {"shuffle": 1}], ids=lambda one: str(*one))
def test_a_position_of_images_that_were_tiled_otherwise_is_not_taken_over(change):
    position = make(IMAGES, tiling=TILED).position(500)
    assert make(IMAGES, tiling=tiled()).resume(position)
    assert not make(IMAGES, tiling=tiled(**change)).resume(position)
