import numpy as np
import pytest

from megavl.data.concatenation import cuts
from megavl.data.format import IMAGE, TEXT
from megavl.data.source import Source
from tests.data.shapes import TILED, WHOLE, Shape, interleaved, texts


@pytest.mark.parametrize("seq_len", [20, 96, 1000])
@pytest.mark.parametrize("shape", [texts(40, 3), interleaved(40, 4)], ids=["text", "interleaved"])
@pytest.mark.parametrize("tiling", [WHOLE, TILED], ids=["whole", "tiled"])
def test_cuts_against_every_border_looked_at(shape, tiling, seq_len):
    source = Source(shape, 0, tiling, (0,))
    documents = source.draws(0, 100)["document"]
    owners, images = [], []  # of each token: which draw, which image
    for draw, document in enumerate(documents):
        for segment, (size, _, mode) in enumerate(shape.segments(tiling, document)):
            owners += [draw] * size
            images += [(draw, segment) if mode == IMAGE else None] * size
    borders = range(seq_len, len(owners), seq_len)
    cut_documents = {owners[border] for border in borders if owners[border - 1] == owners[border]}
    cut_images = {images[border] for border in borders if images[border] and images[border - 1] == images[border]}
    assert cuts(source, 100, seq_len) == (len(cut_documents), len(cut_images))
    assert seq_len == 1000 or cut_documents


def test_a_cut_between_two_documents_is_none():
    source = Source(Shape([[(10, TEXT)], [(10, TEXT)]]), 0, WHOLE, (0,))
    assert [cuts(source, 2, seq_len) for seq_len in (10, 20, 5, 7)] == [(0, 0), (0, 0), (2, 0), (2, 0)]
    assert np.diff(source.segments(np.array([0, 1])).offsets).tolist() == [1, 1]
