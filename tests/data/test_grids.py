import numpy as np
import pytest

from megavl.data.errors import DataError
from megavl.data.format import IMAGE, TEXT
from megavl.data.grids import image_grids
from megavl.data.store import Store
from tests.data.shapes import TILED, WHOLE, Shape, interleaved, texts, tiled


@pytest.mark.parametrize("of", [TILED, tiled(max_tiles=9)], ids=["4 tiles", "9 tiles"])
def test_the_grid_of_every_image_is_that_of_its_size_and_its_document(of):
    shape = interleaved(120, 3)
    found = image_grids(shape, of)
    assert found.of_sequence.dtype == np.uint8 and found.of_sequence.shape == shape.modes.shape
    sizes = [(size, len(document)) for document in shape.sizes for size in document]
    expected = [of.grid(*size, images) for size, images in sizes]
    chosen = found.of_sequence[shape.modes == IMAGE]
    assert [of.grids[number] for number in chosen] == expected
    assert found.images.tolist() == [expected.count(grid) for grid in of.grids]
    assert not found.of_sequence[shape.modes != IMAGE].any() and (found.images > 0).sum() > 5


@pytest.mark.parametrize(("shape", "of"), [(texts(50, 0), TILED), (interleaved(50, 0), WHOLE)], ids=["text", "whole"])
def test_rows_are_not_read_where_grids_cannot_differ(shape, of, monkeypatch):
    monkeypatch.setattr(shape, "batches", None)
    found = image_grids(shape, of)
    assert not found.of_sequence.any() and found.images.sum() == (shape.modes == IMAGE).sum()
    assert found.of_sequence.strides == (0,)  # no memory


def test_a_stored_dataset(corpus):
    store = Store(corpus.prefix("multimodal"))
    found = image_grids(store, TILED)
    assert found.images.sum() == store.meta.images == 65
    sizes = [row["images"] for row in store.rows(0, len(store)).to_pylist()]
    expected = [TILED.grid(one["width"], one["height"], len(images)) for images in sizes for one in images]
    assert [TILED.grids[number] for number in found.of_sequence[store.modes == IMAGE]] == expected


def test_rows_of_other_images_are_refused():
    shape = Shape([[((40, 30), IMAGE), (5, TEXT)], [((40, 30), IMAGE)]])
    shape.sizes = [[(40, 30), (40, 30)], []]
    with pytest.raises(DataError, match="documents 0 to 1: the .meta file lists 2 images, or in other documents"):
        image_grids(shape, TILED)
