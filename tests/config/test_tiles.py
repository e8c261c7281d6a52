"""Tiling and token layout against a table that was worked by hand from the released rules."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megavl.config.presets import PRESETS
from megavl.config.tiles import NEWLINE, SEPARATOR, Grid, Tiling
from tests.models import changed

VL2 = PRESETS["vl2_tiny"]
TILING = Tiling(VL2)

# `candidate_resolutions` of the released config.json: (width, height) in pixels.
RELEASED = [
    *[(384, 384), (384, 768), (768, 384), (384, 1152), (1152, 384), (384, 1536), (1536, 384), (768, 768)],
    *[(384, 1920), (1920, 384), (384, 2304), (2304, 384), (768, 1152), (1152, 768), (384, 2688), (2688, 384)],
    *[(384, 3072), (3072, 384), (768, 1536), (1536, 768), (384, 3456), (3456, 384), (1152, 1152)],
]

# Worked by hand. For each candidate the image is scaled until it fits, both sides are cut to whole pixels, and what
# counts is how many pixels that gives, but no more than the image has; of candidates that are equal the smallest is
# taken.
# (width, height), (rows, columns), and why.
BY_HAND = [
    # All pixels are kept by the smallest candidate already.
    ((1, 1), (1, 1), "1 pixel"),
    ((2, 1), (1, 1), "2 pixels"),
    ((100, 50), (1, 1), "is not enlarged for its own sake"),
    ((384, 1), (1, 1), "a line as wide as a tile"),
    ((383, 384), (1, 1), "one pixel below"),
    ((384, 384), (1, 1), "exactly a tile"),
    # One pixel more than a candidate has costs a row or a column.
    ((385, 384), (1, 2), "all 147,840; the square keeps 384 * 383"),
    ((384, 385), (2, 1), "all 147,840; the square keeps 383 * 384"),
    ((385, 385), (2, 2), "all 148,225 only where both sides have two tiles"),
    ((300, 500), (2, 1), "within 384 x 768"),
    ((500, 300), (1, 2), "within 768 x 384"),
    ((384, 768), (2, 1), "exactly"),
    ((768, 384), (1, 2), "exactly"),
    ((768, 385), (2, 2), "all 295,680; 768 x 384 keeps 766 * 384"),
    ((768, 768), (2, 2), "exactly"),
    ((769, 768), (2, 3), "all 590,592 within 1152 x 768"),
    ((768, 769), (3, 2), "all 590,592 within 768 x 1152"),
    ((769, 769), (3, 3), "all 591,361 within 1152 x 1152 alone"),
    # Long and narrow ones.
    ((200, 1000), (3, 1), "within 384 x 1152"),
    ((1000, 200), (1, 3), "within 1152 x 384"),
    ((384, 1153), (4, 1), "all; 384 x 1152 keeps 383 * 1152"),
    ((1153, 384), (1, 4), "all; 1152 x 384 keeps 1152 * 383"),
    ((384, 1900), (5, 1), "within 384 x 1920"),
    ((1900, 384), (1, 5), "within 1920 x 384"),
    ((384, 2300), (6, 1), "within 384 x 2304"),
    ((2300, 384), (1, 6), "within 2304 x 384"),
    ((384, 2688), (7, 1), "exactly"),
    ((2688, 384), (1, 7), "exactly"),
    ((384, 3000), (8, 1), "within 384 x 3072"),
    ((3000, 384), (1, 8), "within 3072 x 384"),
    ((384, 3456), (9, 1), "exactly"),
    ((3456, 384), (1, 9), "exactly"),
    ((100, 5000), (9, 1), "69 * 3456 at 0.6912; 384 x 3072 keeps 61 * 3072"),
    ((5000, 100), (1, 9), "the same lying"),
    # Usual formats.
    ((640, 480), (2, 2), "all 307,200; 768 x 384 keeps 512 * 384"),
    ((480, 640), (2, 2), "the same upright"),
    ((800, 600), (2, 3), "all 480,000; 768 x 768 keeps 768 * 576"),
    ((1024, 768), (2, 3), "all 786,432"),
    ((768, 1024), (3, 2), "all 786,432"),
    ((612, 792), (3, 2), "all 484,704; 768 x 768 keeps 593 * 768"),
    ((1280, 720), (2, 4), "all 921,600; 1152 x 768 keeps 1152 * 648"),
    ((1920, 1080), (2, 4), "1365 * 768 at 0.711; 1152 x 1152 keeps 1152 * 648"),
    ((1080, 1920), (4, 2), "768 * 1365"),
    ((4000, 3000), (3, 3), "1152 * 864; 1536 x 768 keeps 1024 * 768"),
    ((2480, 3508), (3, 3), "a page: 814 * 1152; 768 x 1536 keeps 768 * 1086"),
    ((1500, 500), (2, 4), "all 750,000; the flat ones and 1152 x 768 keep 1152 * 384"),
    ((500, 1500), (4, 2), "the same upright"),
    ((3000, 1000), (2, 4), "1536 * 512; 1152 x 1152 keeps 1152 * 384"),
    ((1000, 999), (3, 3), "all 999,000; 1152 x 768 keeps less than 769 * 768"),
    ((10_000, 10_000), (3, 3), "1152 * 1152"),
    # Ties, of which the one without padding is taken.
    ((3000, 2000), (2, 3), "1152 * 768 in 1152 x 768, 1536 x 768 and 1152 x 1152"),
    ((2000, 3000), (3, 2), "768 * 1152 in 768 x 1152, 768 x 1536 and 1152 x 1152"),
    ((1600, 400), (1, 4), "1536 * 384 in all of 384 pixels of height from there on, and in 1536 x 768"),
    ((400, 1600), (4, 1), "the same upright"),
    ((2000, 400), (1, 5), "1920 * 384 in all of 384 pixels of height from there on"),
    # So thin that whole pixels are few, or none.
    ((10_000, 10), (1, 9), "3456 * 3"),
    ((10, 10_000), (9, 1), "3 * 3456"),
    ((10_000, 3), (1, 9), "3456 * 1; 3072 x 384 keeps 3072 * 0"),
    ((10_000, 2), (1, 1), "nothing is kept by any (0.69 pixels of height), and the smallest wastes least"),
    ((10_000, 1), (1, 1), "the same"),
    ((1, 10_000), (1, 1), "the same upright"),
]


@pytest.mark.parametrize(("size", "expected"), [row[:2] for row in BY_HAND], ids=lambda pair: "x".join(map(str, pair)))
def test_the_grid_of_an_image_by_hand(size, expected):
    for images in (1, 2):
        assert TILING.grid(*size, images) == Grid(*expected)
    # Above two images none is tiled.
    assert TILING.grid(*size, 3) == TILING.grid(*size, 100) == Grid(1, 1)


def test_the_table_has_every_grid():
    assert len(BY_HAND) >= 40 and {Grid(*grid) for _, grid, _ in BY_HAND} == set(TILING.grids)


def test_candidates_are_the_released_ones_in_their_order():
    assert [(384 * grid.columns, 384 * grid.rows) for grid in TILING.grids] == RELEASED and len(RELEASED) == 23


def best_of(size, candidates):
    """`select_best_resolution`, written out a second time."""
    width, height = size
    ranks = []
    for place, (room_width, room_height) in enumerate(candidates):
        scale = min(room_width / width, room_height / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        ranks.append((-kept, room_width * room_height - kept, place))
    return candidates[min(ranks)[2]]


SIDE = st.one_of(st.integers(1, 12_000), st.builds(lambda n, by: 384 * n + by, st.integers(1, 10), st.integers(-1, 1)))


@given(st.lists(st.tuples(SIDE, SIDE, st.integers(1, 4)), min_size=1, max_size=50))
def test_any_images_against_one_at_a_time(images):
    widths, heights, numbers = np.array(images, dtype=np.int32).T
    chosen = TILING.choose(widths, heights, numbers)
    assert chosen.dtype == np.uint8
    assert chosen.tolist() == [
        RELEASED.index(best_of((width, height), RELEASED)) if number <= 2 else 0 for width, height, number in images
    ]


# 210 + 1 + 14 m (14 n + 1), by hand.
TOKENS = {
    (1, 1): 421,
    (1, 2): 617,
    (2, 1): 631,
    (2, 2): 1023,
    (2, 3): 1415,
    (3, 2): 1429,
    (2, 4): 1807,
    (3, 3): 2017,
    (1, 9): 1989,
    (9, 1): 2101,
}


def test_tokens_and_tiles():
    tokens = dict(zip(TILING.grids, TILING.tokens.tolist(), strict=True))
    assert {grid: tokens[Grid(*grid)] for grid in TOKENS} == TOKENS
    assert tokens == {grid: 210 + 1 + 14 * grid.rows * (14 * grid.columns + 1) for grid in TILING.grids}
    assert (min(tokens.values()), max(tokens.values())) == (421, 2101)
    assert TILING.tiles.tolist() == [1 + grid.rows * grid.columns for grid in TILING.grids]


@pytest.mark.parametrize("grid", [(1, 1), (1, 3), (3, 1), (2, 3), (3, 3)], ids=str)
def test_every_position_of_an_image(grid):
    """Feature y, x of tile t is number 196 t + 14 y + x; tile 0 is the overview."""
    rows, columns = grid
    layout = TILING.layout(Grid(rows, columns)).tolist()
    assert layout[:15] == [*range(14), NEWLINE] and layout[195:211] == [*range(182, 196), NEWLINE, SEPARATOR]
    overview, local = layout[:210], layout[211:]
    assert [place for place, value in enumerate(overview) if value == NEWLINE] == list(range(14, 210, 15))
    width = 14 * columns + 1
    assert len(local) == 14 * rows * width
    for place, value in enumerate(local):
        line, x = divmod(place, width)
        (row, y), (column, x_in_tile) = divmod(line, 14), divmod(x, 14)
        tile = 1 + row * columns + column
        assert value == (NEWLINE if x == 14 * columns else 196 * tile + 14 * y + x_in_tile)
    assert sorted(value for value in layout if value >= 0) == list(range(196 * (1 + rows * columns)))
    assert layout.count(SEPARATOR) == 1 and layout.count(NEWLINE) == 14 + 14 * rows


@pytest.mark.parametrize(("preset", "tokens"), [("vl_1b", 576), ("vl_7b", 576), ("vl_debug", 16)])
def test_an_image_of_deepseek_vl_is_one_tile(preset, tokens):
    tiling = Tiling(PRESETS[preset])
    assert tiling.grids == (Grid(0, 0),) and (tiling.tokens.tolist(), tiling.tiles.tolist()) == ([tokens], [1])
    assert {tiling.grid(*size, images) for size, _, _ in BY_HAND for images in (1, 3)} == {Grid(0, 0)}
    assert tiling.layout(Grid(0, 0)).tolist() == list(range(tokens))


def test_facts_differ_where_anything_of_an_image_does():
    def facts(**changes):
        return Tiling(changed(VL2, **changes)).facts

    tilings = {"max_tiles": 6}, {"max_images": 1}, {"shuffle": 3}
    changes = [*({"tiling": tiling} for tiling in tilings), {"siglip": {"image_size": 378}}]
    found = [
        facts(),
        *(facts(**change) for change in changes),
        *(Tiling(PRESETS[n]).facts for n in ("vl_1b", "vl_debug")),
    ]
    assert all(one != other for place, one in enumerate(found) for other in found[:place])
    assert (
        Tiling(PRESETS["vl_1b"]).facts == Tiling(PRESETS["vl_7b"]).facts
        and facts() == Tiling(PRESETS["vl2_base"]).facts
    )
