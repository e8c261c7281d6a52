import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megavl.data.cut import cut, pieces
from megavl.data.format import IMAGE, PROMPT, TEXT
from megavl.data.source import Source
from tests.data.shapes import TILED, WHOLE, Shape

MODES = {"t": TEXT, "i": IMAGE, "p": PROMPT}


@pytest.mark.parametrize(
    ("segments", "budget", "max_tiles", "expected"),
    [
        ([("t", 10)], 10, 9, [(0, 10)]),
        ([("t", 25)], 10, 9, [(0, 10), (10, 20), (20, 25)]),
        ([("t", 4), ("i", 8), ("t", 3)], 10, 9, [(0, 4), (4, 12), (12, 15)]),  # at the borders, though text fits behind
        ([("i", 8), ("i", 8)], 10, 9, [(0, 8), (8, 16)]),
        ([("t", 2), ("i", 8), ("t", 11)], 10, 9, [(0, 10), (10, 20), (20, 21)]),
        ([("i", 5), ("i", 5), ("i", 5)], 10, 9, [(0, 10), (10, 15)]),
        ([("i", 6), ("t", 21), ("i", 10)], 10, 9, [(0, 10), (10, 20), (20, 27), (27, 37)]),  # a long text fills up
        ([("p", 6), ("t", 6)], 10, 9, [(0, 6), (6, 12)]),
        ([("i", 2), ("t", 1), ("i", 2), ("i", 2), ("t", 1)], 10, 2, [(0, 5), (5, 8)]),  # before the third tile
        ([("i", 2), ("i", 2), ("t", 4)], 10, 1, [(0, 2), (2, 8)]),
        ([("ii", 2), ("iii", 3), ("t", 1), ("i", 2)], 10, 4, [(0, 2), (2, 8)]),  # of images of several tiles
        ([("iii", 3), ("i", 1), ("i", 1), ("ii", 2)], 10, 4, [(0, 4), (4, 7)]),
    ],
)
def test_by_hand(segments, budget, max_tiles, expected):
    parts = cut([(length, kind.count("i"), MODES[kind[0]]) for kind, length in segments], budget, max_tiles)
    assert [(part.start, part.stop) for part in parts] == expected


SIZE = st.tuples(st.integers(1, 200), st.integers(1, 200))
SEGMENT = st.one_of(st.tuples(st.integers(1, 60), st.sampled_from([TEXT, PROMPT])), st.tuples(SIZE, st.just(IMAGE)))
DOCUMENT = st.lists(SEGMENT, min_size=1, max_size=8)


@settings(max_examples=120, deadline=None)
@given(
    st.lists(DOCUMENT, min_size=1, max_size=6), st.sampled_from([WHOLE, TILED]), st.integers(0, 60), st.integers(0, 4)
)
def test_pieces_of_any_documents_against_a_token_by_token_reference(documents, tiling, spare, spare_tiles):
    """Nothing lost, nothing twice, budgets kept, no image split, cuts at borders, every count as counted by tokens."""
    budget, max_tiles = int(tiling.tokens.max()) + spare, int(tiling.tiles.max()) + spare_tiles
    shape = Shape(documents)
    source = Source(shape, 0, tiling, (0,))
    draws = source.draws(0, 2 * len(documents))
    found = pieces(draws, [source], budget, max_tiles)
    of_draw = np.split(found, np.flatnonzero(found["start"] == 0)[1:])
    assert [group["document"][0] for group in of_draw] == draws["document"].tolist()
    modes = shape.tokens(tiling)
    for group in of_draw:
        document = group["document"][0]
        kinds, segments = modes[document], shape.segments(tiling, document)
        lengths = [length for length, _, _ in segments]
        borders = np.cumsum([0, *lengths])
        assert group["start"].tolist() == [0, *group["stop"][:-1].tolist()] and group["stop"][-1] == len(kinds)
        for start, stop, supervised, images, tiles in group[
            ["start", "stop", "supervised", "images", "tiles"]
        ].tolist():
            assert 0 < stop - start <= budget and tiles <= max_tiles
            targets = [position for position in range(start + 1, min(stop + 1, len(kinds))) if kinds[position] == TEXT]
            assert supervised == len(targets)
            whole = [i for i, (_, _, mode) in enumerate(segments) if mode == IMAGE and start <= borders[i] < stop]
            assert images == len(whole) and all(borders[i + 1] <= stop for i in whole)
            assert tiles == sum(segments[i][1] for i in whole)
            if stop not in borders:
                cut_segment = np.searchsorted(borders, stop) - 1
                assert lengths[cut_segment] > budget and stop - start == budget
        if len(kinds) <= budget and sum(tiles for _, tiles, _ in segments) <= max_tiles:
            assert len(group) == 1
