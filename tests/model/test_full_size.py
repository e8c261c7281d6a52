"""The vision part once at its full size: 1024 pixels, SAM-B and SigLIP-L, one image."""

import pytest
import torch

from megavl.config.presets import PRESETS
from megavl.model.pixels import tower_inputs
from megavl.model.stem import Stem
from tests.model import reference, tiny
from tests.models import HYBRID, changed

# The 7B's towers before a small decoder.
CONFIG = changed(HYBRID, siglip=PRESETS["vl_7b"].siglip, sam=PRESETS["vl_7b"].sam)


@pytest.fixture
def two_threads():
    """About 1e12 multiplications: the ranks' rule of one thread each does not fit a test that runs alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.long
@torch.no_grad()
def test_vision_features_at_full_size(two_threads):
    theirs = reference.build(CONFIG, attention="sdpa")
    tiny.randomise(theirs, seed=0)
    with torch.device("meta"):
        stem = Stem(CONFIG, tiny.ONE)
    weights = reference.translate(CONFIG, theirs.state_dict())
    stem.load_state_dict(
        {name.removeprefix("stem."): value for name, value in weights.items() if name.startswith("stem.")}, assign=True
    )
    inputs = tower_inputs(tiny.pixels(CONFIG, images=1, seed=0), CONFIG)
    expected = reference.image_features(theirs, inputs)
    siglip, sam = stem.siglip(inputs["siglip"]), stem.sam(inputs["sam"])
    assert siglip.shape == sam.shape == (1, 576, 1024)
    errors = {
        name: ((ours - expected[name]).abs().max() / expected[name].abs().max()).item()
        for name, ours in {"siglip": siglip, "sam": sam, "adaptor": stem.adaptor(siglip, sam)}.items()
    }
    assert max(errors.values()) < 2e-5, errors  # measured 1.8e-6
