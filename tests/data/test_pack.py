import random

import numpy as np
import pytest

from megavl.data.pack import cut, first_fit


@pytest.mark.parametrize(
    ("segments", "budget", "expected"),
    [
        ([("t", 10)], 10, [(0, 10)]),
        ([("t", 25)], 10, [(0, 10), (10, 20), (20, 25)]),
        ([("t", 4), ("i", 8), ("t", 3)], 10, [(0, 4), (4, 14), (14, 15)]),
        ([("i", 8), ("i", 8)], 10, [(0, 8), (8, 16)]),
        ([("t", 2), ("i", 8), ("t", 11)], 10, [(0, 10), (10, 20), (20, 21)]),
        ([("i", 5), ("i", 5), ("i", 5)], 10, [(0, 10), (10, 15)]),
        ([("t", 21), ("i", 10)], 10, [(0, 10), (10, 20), (20, 21), (21, 31)]),
    ],
)
def test_text_is_cut_anywhere_and_an_image_nowhere(segments, budget, expected):
    parts = cut([(length, kind == "i") for kind, length in segments], budget)
    assert [(part.start, part.stop) for part in parts] == expected


def test_parts_and_counts_of_random_documents_against_a_token_by_token_reference():
    random_ = random.Random(0)
    for _ in range(300):
        is_image = np.array([random_.random() < 0.4 for _ in range(random_.randint(1, 8))])
        lengths = np.array([7 if image else random_.randint(1, 40) for image in is_image])
        budget = random_.randint(7, 60)
        owner = np.repeat(np.arange(len(lengths)), lengths)  # segment of each token
        parts = cut(zip(lengths.tolist(), is_image.tolist(), strict=True), budget)
        assert [position for start, stop, _, _ in parts for position in range(start, stop)] == list(range(len(owner)))
        assert all(0 < stop - start <= budget for start, stop, _, _ in parts)
        for segment in np.flatnonzero(is_image):
            run = np.flatnonzero(owner == segment)
            assert any(start <= run[0] and run[-1] < stop for start, stop, _, _ in parts)
        for start, stop, supervised, images in parts:
            targets = [t for t in range(start + 1, min(stop + 1, len(owner))) if not is_image[owner[t]]]
            assert (supervised, images) == (len(targets), len({s for s in owner[start:stop] if is_image[s]}))


def test_first_fit_puts_every_piece_in_one_pack_within_the_budget():
    random_ = random.Random(0)
    lengths = [random_.randint(1, 100) for _ in range(2000)]
    packs = first_fit(lengths, 100)
    assert sorted(index for pack in packs for index in pack) == list(range(2000))
    sizes = [sum(lengths[index] for index in pack) for pack in packs]
    assert max(sizes) <= 100
    assert sum(sizes) / (100 * len(packs)) > 0.9  # measured 0.94


def test_first_fit_by_hand():
    assert first_fit([6, 5, 4, 3, 9], 10) == [[0, 2], [1, 3], [4]]
