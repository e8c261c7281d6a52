"""Flat ranges as boxes of the full tensor."""

import random

import numpy as np
import pytest
import torch

from megavl.checkpoint.fragments import Boxes, Fragment, by_key, flat_boxes


def _ranges(count: int):
    """Random shapes of 1 to 4 dims with a random flat range; ends and empty ranges included."""
    draw = random.Random(0)
    for _ in range(count):
        shape = tuple(draw.randint(1, 5) for _ in range(draw.randint(1, 4)))
        size = int(np.prod(shape))
        yield shape, *sorted((draw.randint(0, size), draw.randint(0, size)))


def test_boxes_are_the_range_in_order():
    for shape, start, stop in _ranges(2000):
        full = np.arange(np.prod(shape)).reshape(shape)
        pieces = [
            full[tuple(slice(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True))].ravel()
            for offsets, sizes in flat_boxes(shape, start, stop)
        ]
        assert len(pieces) <= 2 * len(shape) - 1
        assert all(len(piece) for piece in pieces)
        np.testing.assert_array_equal(np.concatenate([*pieces, []]), np.arange(start, stop))


def test_most_boxes_are_needed_in_the_worst_case():
    assert len(flat_boxes((4, 4, 4), 1, 63)) == 5
    assert flat_boxes((4, 4), 0, 16) == [((0, 0), (4, 4))]
    assert flat_boxes((3, 4), 5, 7) == [((1, 1), (1, 2))]


def test_flat_range_of_a_shard_lands_in_the_full_tensor():
    for shape, start, stop in _ranges(300):
        full_shape, offsets = tuple(2 * size + 1 for size in shape), tuple(size % 3 for size in shape)
        full = torch.arange(float(np.prod(full_shape))).view(full_shape)
        local = full[tuple(slice(offset, offset + size) for offset, size in zip(offsets, shape, strict=True))]
        values = local.reshape(-1)[start:stop].clone()
        rebuilt = torch.full(full_shape, -1.0)
        for corner, box in Fragment("w", "param", full_shape, offsets, shape, start, values).boxes():
            assert box.untyped_storage().data_ptr() == values.untyped_storage().data_ptr()  # a view, nothing is copied
            rebuilt[tuple(slice(first, first + size) for first, size in zip(corner, box.shape, strict=True))] = box
        assert (rebuilt >= 0).sum() == stop - start
        assert (rebuilt[rebuilt >= 0] == full[rebuilt >= 0]).all()


def test_fragments_of_one_tensor_join():
    whole = torch.arange(12.0)
    pieces = [Fragment("w", "master", (3, 4), (0, 0), (3, 4), start, whole[start : start + 5]) for start in (0, 5)] + [
        Fragment("w", "master", (3, 4), (0, 0), (3, 4), 10, whole[10:])
    ]
    boxes = by_key(pieces)
    assert list(boxes) == ["master.w"]
    assert sum(chunk.sizes.numel() for chunk in boxes["master.w"].__create_chunk_list__()) == 12


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"kind": "momentum"}, "kind 'momentum'"),
        ({"offsets": (2, 0)}, "is not inside"),
        ({"shape": (4,)}, "is not inside"),
        ({"start": 5}, "flat range"),
        ({"values": torch.zeros(2, 2)}, "flat range"),
    ],
)
def test_fragment_that_does_not_fit_is_refused(changed, message):
    fields = {"name": "w", "kind": "param", "full_shape": (3, 4), "offsets": (1, 0), "shape": (2, 4), "start": 0}
    fields["values"] = torch.zeros(4)
    with pytest.raises(ValueError, match=message):
        Fragment(**fields | changed)


def test_fragments_that_disagree_are_refused():
    first = Fragment("w", "param", (4,), (0,), (4,), 0, torch.zeros(2))
    with pytest.raises(ValueError, match="both start at"):
        by_key([first, first])
    with pytest.raises(ValueError, match="disagree"):
        Boxes((4,), torch.bfloat16).add(first)
