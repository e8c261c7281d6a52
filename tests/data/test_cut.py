import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megavl.data.cut import cut, pieces
from megavl.data.format import IMAGE, PROMPT, TEXT
from megavl.data.source import Source
from tests.data.shapes import Shape

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
    ],
)
def test_by_hand(segments, budget, max_tiles, expected):
    parts = cut([(length, MODES[kind]) for kind, length in segments], budget, max_tiles)
    assert [(part.start, part.stop) for part in parts] == expected


IMAGE_TOKENS = 7
DOCUMENT = st.lists(st.tuples(st.integers(1, 60), st.sampled_from([TEXT, IMAGE, PROMPT])), min_size=1, max_size=8)


@settings(max_examples=80, deadline=None)
@given(st.lists(DOCUMENT, min_size=1, max_size=6), st.integers(IMAGE_TOKENS, 80), st.integers(1, 4))
def test_pieces_of_any_documents_against_a_token_by_token_reference(documents, budget, max_tiles):
    """Nothing lost, nothing twice, budgets kept, no image split, cuts at borders, every count as counted by tokens."""
    shape = Shape(documents)
    source = Source(shape, 0, IMAGE_TOKENS, (0,))
    draws = source.draws(0, 2 * len(documents))
    found = pieces(draws, [source], budget, max_tiles)
    of_draw = np.split(found, np.flatnonzero(found["start"] == 0)[1:])
    assert [group["document"][0] for group in of_draw] == draws["document"].tolist()
    modes = shape.tokens(IMAGE_TOKENS)
    for group in of_draw:
        document = group["document"][0]
        kinds = modes[document]
        lengths = [IMAGE_TOKENS if mode == IMAGE else length for length, mode in documents[document]]
        borders = np.cumsum([0, *lengths])
        assert group["start"].tolist() == [0, *group["stop"][:-1].tolist()] and group["stop"][-1] == len(kinds)
        for start, stop, supervised, images in group[["start", "stop", "supervised", "images"]].tolist():
            assert 0 < stop - start <= budget and images <= max_tiles
            targets = [position for position in range(start + 1, min(stop + 1, len(kinds))) if kinds[position] == TEXT]
            assert supervised == len(targets)
            whole = [
                i for i, (_, mode) in enumerate(documents[document]) if mode == IMAGE and start <= borders[i] < stop
            ]
            assert images == len(whole) and all(borders[i + 1] <= stop for i in whole)
            if stop not in borders:
                cut_segment = np.searchsorted(borders, stop) - 1
                assert lengths[cut_segment] > budget and stop - start == budget
    if len(kinds) <= budget and (kinds == IMAGE).sum() <= max_tiles * IMAGE_TOKENS:
        assert len(of_draw[-1]) == 1
