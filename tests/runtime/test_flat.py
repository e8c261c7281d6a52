"""Several tensors in one buffer."""

import torch

from megavl.runtime.deepspeed.alignment import UNIT_ELEMENTS
from megavl.runtime.flat import Flat


def test_views_are_aligned_and_share_the_buffer_without_overlap():
    shapes = [torch.Size(shape) for shape in [(3, 5), (1,), (UNIT_ELEMENTS,), (2, UNIT_ELEMENTS + 1), ()]]
    flat = Flat(shapes, torch.bfloat16, torch.device("cpu"))
    assert flat.buffer.dtype == torch.bfloat16 and not flat.buffer.any()
    assert [view.shape for view in flat.views] == shapes
    assert all(view.storage_offset() % UNIT_ELEMENTS == 0 for view in flat.views)
    for view in flat.views:
        view.add_(1)
    assert all((view == 1).all() for view in flat.views)
    assert flat.buffer.sum() == sum(shape.numel() for shape in shapes)


def test_no_tensors_take_no_memory():
    flat = Flat([], torch.float32, torch.device("cpu"))
    assert len(flat.buffer) == 0 and flat.views == []
