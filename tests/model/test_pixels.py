"""8-bit pixels that the device normalises, against float32 pixels that the loader normalised, image by image."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from megavl.config.model import ModelConfig, SamConfig, SiglipConfig
from megavl.config.presets import PRESETS
from megavl.model.pixels import tower_inputs
from tests.model import tiny
from tests.models import changed

MODELS = ("vl_debug", "vl_7b", "vl_1b", "vl2_debug", "vl2_tiny")


def normalised(scaled: Tensor, tower: SiglipConfig | SamConfig) -> Tensor:
    shape = (1, 3, 1, 1)
    return (
        scaled.clone().sub_(torch.tensor(tower.pixel_mean).view(shape)).div_(torch.tensor(tower.pixel_std).view(shape))
    )


def float_path(pixels: Tensor, config: ModelConfig) -> dict[str, Tensor]:
    """What the loader wrote before pixels were 8-bit numbers: tower -> float32 [tiles, 3, S, S]."""
    each = []
    for tile in pixels.split(1):
        scaled = torch.empty(tile.shape).copy_(tile).div_(255)
        low, towers = scaled, {}
        if config.sam is not None:
            size = (config.siglip.image_size,) * 2
            low = functional.interpolate(scaled, size, mode="bilinear", antialias=True, align_corners=False)
            towers["sam"] = normalised(scaled, config.sam)
        each.append(towers | {"siglip": normalised(low, config.siglip)})
    return {tower: torch.cat([one[tower] for one in each]) for tower in each[0]}


def equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, bool]:
    assert ours.keys() == theirs.keys()
    return {tower: torch.equal(images, theirs[tower]) for tower, images in ours.items()}


@pytest.mark.parametrize("preset", MODELS)
def test_towers_get_the_same_bits_as_from_float_pixels(preset):
    config = PRESETS[preset]
    pixels = tiny.pixels(config, images=2, seed=0)
    pixels[0, :, 0, :256] = torch.arange(256)[: pixels.shape[3]]  # every value, where a row is as long
    inputs = tower_inputs(pixels, config)
    assert all(images.dtype == torch.float32 and images.is_contiguous() for images in inputs.values())
    assert all(equal(inputs, float_path(pixels, config)).values())


def test_another_mean_or_deviation_of_one_tower_would_be_noticed():
    config = PRESETS["vl_debug"]
    pixels = tiny.pixels(config, images=1, seed=0)
    for tower in ("siglip", "sam"):
        for change in ({"pixel_mean": (0.5, 0.5, 0.4999)}, {"pixel_std": (0.5, 0.5, 0.5001)}):
            other = changed(config, **{tower: change})
            same = equal(tower_inputs(pixels, other), float_path(pixels, config))
            assert same == {"siglip": tower != "siglip", "sam": tower != "sam"}


@pytest.mark.parametrize("tower", [PRESETS["vl_7b"].sam, PRESETS["vl_1b"].siglip], ids=["sam", "siglip"])
def test_a_multiply_add_would_round_differently(tower):
    values = torch.arange(256.0).expand(3, 256).view(1, 3, 16, 16)
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (tower.pixel_mean, tower.pixel_std))
    exact = normalised(values / 255, tower)
    fused = values * (1 / (255 * std)) - mean / std
    differing = (fused != exact).float().mean().item()
    assert differing > 0.3, differing


def test_an_image_resized_in_8_bits_would_be_noticed():
    """As transformers' processor has SigLIP's image of the hybrid encoder."""
    config = PRESETS["vl_debug"]
    pixels = tiny.pixels(config, images=1, seed=0)
    inputs = tower_inputs(pixels, config)["siglip"]
    on_grid = inputs.mul(config.siglip.pixel_std[0]).add(config.siglip.pixel_mean[0]).mul(255)
    assert (on_grid - on_grid.round()).abs().max() > 0.1
