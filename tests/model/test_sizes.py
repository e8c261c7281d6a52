"""Parameter counts of the presets, against arithmetic and against transformers."""

import pytest
import torch

from megavl.config.presets import PRESETS
from megavl.model.vlm import VLM
from tests.model import reference, tiny


def linear(d_in: int, d_out: int, bias: bool = True) -> int:
    return d_in * d_out + bias * d_out


def decoder(layers: int, width: int, mlp: int, vocab: int) -> int:
    return 2 * vocab * width + layers * (4 * width**2 + 3 * width * mlp + 2 * width) + width


def vit_block(width: int, mlp: int) -> int:
    return 2 * 2 * width + linear(width, 3 * width) + linear(width, width) + linear(width, mlp) + linear(mlp, width)


# DeepSeek-VL's published shapes, written out here once more; the presets must not be their own witness.
SIGLIP = linear(3 * 16 * 16, 1024) + 24**2 * 1024 + 24 * vit_block(1024, 4096) + 2 * 1024
NECK = 768 * 256 + 256 * 256 * 9 + 2 * 2 * 256
SAM = (
    linear(3 * 16 * 16, 768)
    + 64**2 * 768
    + 12 * vit_block(768, 3072)
    + (8 * 2 * 27 + 4 * 2 * 127) * 64  # relative positions: 8 blocks in windows of 14, 4 global blocks over 64
    + 2 * NECK
    + (512 * 256 + 1024 * 512) * 9
    + 1
)
EXPECTED = {
    "vl_1b": {
        "decoder": decoder(24, 2048, 5632, 102400),
        "stem.siglip": SIGLIP,
        "stem.sam": 0,
        "stem.adaptor": linear(1024, 2048) + linear(2048, 2048),
    },
    "vl_7b": {
        "decoder": decoder(30, 4096, 11008, 102400),
        "stem.siglip": SIGLIP,
        "stem.sam": SAM,
        "stem.adaptor": 2 * linear(1024, 2048) + linear(4096, 4096),
    },
}


def test_arithmetic_is_what_is_published():
    """1.653 and 6.910 billion, SAM 96.36, adaptors 6.30 and 20.98 million; SigLIP 316.28 less its pooling of 12.6."""
    assert EXPECTED["vl_1b"]["decoder"] == 1_652_656_128
    assert EXPECTED["vl_7b"]["decoder"] == 6_910_365_696
    assert SAM == 96_356_609
    assert SIGLIP == 303_688_704
    assert EXPECTED["vl_1b"]["stem.adaptor"] == 6_295_552
    assert EXPECTED["vl_7b"]["stem.adaptor"] == 20_979_712


@pytest.mark.parametrize("name", ["vl_1b", "vl_7b"])
def test_presets_have_these_sizes(name):
    config = PRESETS[name]
    with torch.device("meta"):
        model = VLM(config, tiny.ONE, tiny.OPS, 0, config.layers)
        theirs = reference.build(config)
    counts = dict.fromkeys(EXPECTED[name], 0)
    for parameter_name, parameter in model.named_parameters():
        counts[next((part for part in counts if parameter_name.startswith(part)), "decoder")] += parameter.numel()
    assert counts == EXPECTED[name]
    assert sum(counts.values()) == sum(parameter.numel() for parameter in theirs.parameters())

    shapes = {key: value.shape for key, value in reference.translate(config, theirs.state_dict()).items()}
    assert {key: value.shape for key, value in model.named_parameters()} == shapes
