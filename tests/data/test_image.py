"""What the towers get of an image, against transformers where the rules agree; against the released rule, written out
again, where they do not.
Tiles, which transformers has not, against the released rule with Pillow's own padding.

transformers' processors round the resized sides, the released code truncates them: (100, 37) at 64 pixels is 64 x
23.68, so 64 x 24 there and 64 x 23 here. And transformers resizes SigLIP's image of the hybrid encoder from 8-bit
pixels with a bicubic filter, the released code from float pixels with torchvision's default, a bilinear one: on noise
the worst pixel differs by 0.4 and the mean by 0.05 at most, of a range of 2.
"""

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from transformers.models.deepseek_vl.image_processing_pil_deepseek_vl import DeepseekVLImageProcessorPil
from transformers.models.deepseek_vl_hybrid.image_processing_pil_deepseek_vl_hybrid import (
    DeepseekVLHybridImageProcessorPil,
)

from megavl.config.presets import PRESETS
from megavl.config.tiles import Grid, Tiling
from megavl.data.decode import decode
from megavl.data.image import empty_pixels, write_blank
from megavl.model.pixels import tower_inputs
from tests.data.conftest import OVERVIEW, image_bytes, pixels_of

# (width, height) whose resized sides are whole numbers or round down, at 32, 64, 384 and 1024 pixels.
AGREEING = [(64, 64), (128, 32), (32, 128), (90, 30), (500, 250), (5, 500)]
DIFFERING = [(100, 37), (37, 100), (1000, 999)]
HALF = [0.5, 0.5, 0.5]


def picture(size, seed=0) -> Image.Image:
    return decode(image_bytes(seed, size))


def released_square(image, size, mean):
    """VLMImageProcessor.resize in floats of 0..1, written out a second time."""
    width, height = image.size
    long = max(width, height)
    new_height, new_width = max(int(height / long * size), 14), max(int(width / long * size), 14)
    square = np.empty((size, size, 3), dtype=np.uint8)
    square[:] = [int(channel * 255) for channel in mean]
    top, left = (size - new_height) // 2, (size - new_width) // 2
    resized = np.asarray(image.resize((new_width, new_height), Image.Resampling.BICUBIC))
    square[top : top + new_height, left : left + new_width] = resized
    return (square / 255).astype(np.float32)


def released_low(square, size):
    """torchvision's Resize (bilinear, antialias) of float pixels, by Pillow's filter on float images."""
    channels = [Image.fromarray(square[:, :, channel]) for channel in range(3)]
    return np.stack([np.asarray(one.resize((size, size), Image.Resampling.BILINEAR)) for one in channels])


def inputs_of(image, model, grid=OVERVIEW) -> dict[str, torch.Tensor]:
    """Of each tower, of all tiles of an image."""
    return tower_inputs(pixels_of(image, model, grid), model)


def worst(actual: torch.Tensor, expected) -> float:
    return float(np.abs(actual.numpy() - np.asarray(expected)).max())


@pytest.mark.parametrize("preset", ["vl_debug", "vl_7b"])
@pytest.mark.parametrize("size", AGREEING)
def test_sam_pixels_equal_transformers(preset, size):
    model = PRESETS[preset]
    processor = DeepseekVLHybridImageProcessorPil(
        size=_sides(model.siglip.image_size),
        high_res_size=_sides(model.sam.image_size),
        image_mean=HALF,
        image_std=HALF,
    )
    expected = processor(picture(size), return_tensors="np")["high_res_pixel_values"][0]
    actual = inputs_of(picture(size), model)["sam"][0]
    assert actual.dtype == torch.float32 and actual.shape == expected.shape
    assert worst(actual, expected) <= 1e-6  # measured 0


@pytest.mark.parametrize("preset", ["vl_debug_siglip", "vl_1b"])
@pytest.mark.parametrize("size", AGREEING)
def test_siglip_only_pixels_equal_transformers(preset, size):
    model = PRESETS[preset]
    processor = DeepseekVLImageProcessorPil(size=_sides(model.siglip.image_size), image_mean=HALF, image_std=HALF)
    expected = processor(picture(size), return_tensors="np")["pixel_values"][0]
    actual = inputs_of(picture(size), model)
    assert list(actual) == ["siglip"]
    assert worst(actual["siglip"][0], expected) <= 1e-6  # measured 0


@pytest.mark.parametrize(("preset", "tolerance"), [("vl_debug", 1e-6), ("vl_7b", 5e-5)])
@pytest.mark.parametrize("size", AGREEING + DIFFERING)
def test_pixels_of_both_towers_follow_the_released_rule(preset, tolerance, size):
    model = PRESETS[preset]
    actual = inputs_of(picture(size), model)
    sides = {tower: getattr(model, tower).image_size for tower in ("siglip", "sam")}
    assert {tower: tuple(images.shape) for tower, images in actual.items()} == {
        tower: (1, 3, side, side) for tower, side in sides.items()
    }
    square = released_square(picture(size), model.sam.image_size, model.sam.pixel_mean)
    high = (square - np.float32(model.sam.pixel_mean)) / np.float32(model.sam.pixel_std)
    assert worst(actual["sam"][0], high.transpose(2, 0, 1)) <= 1e-6  # measured 0
    low = (released_low(square, model.siglip.image_size) - 0.5) / 0.5
    # Measured 2.4e-7 and, with torch's float32 filter weights at 1024 pixels, 2.6e-5 (Pillow's are float64).
    assert worst(actual["siglip"][0], low) <= tolerance


@pytest.mark.parametrize("size", DIFFERING)
def test_siglip_only_pixels_follow_the_released_rule(size):
    model = PRESETS["vl_debug_siglip"]
    low = (released_square(picture(size), model.siglip.image_size, HALF) - 0.5) / 0.5
    assert worst(inputs_of(picture(size), model)["siglip"][0], low.transpose(2, 0, 1)) <= 1e-6  # measured 0


def test_truncation_is_what_differs_from_transformers():
    processor = DeepseekVLImageProcessorPil(size=_sides(32), image_mean=HALF, image_std=HALF)
    expected = processor(picture((100, 58)), return_tensors="np")["pixel_values"][0]
    actual = inputs_of(picture((100, 58)), PRESETS["vl_debug_siglip"])["siglip"][0].numpy()
    background = (127 / 255 - 0.5) / 0.5
    rows = [int((~np.isclose(pixels, background)).any(axis=(0, 2)).sum()) for pixels in (actual, expected)]
    assert rows == [18, 19]  # 18.56


def released_tiles(image, model, grid):
    """`tokenize_with_images` of DeepSeek-VL2, written out a second time: [tiles, 3, S, S]."""
    size, color = model.siglip.image_size, tuple(int(channel * 255) for channel in model.siglip.pixel_mean)
    tiles = [ImageOps.pad(image, (size, size), color=color)]
    local = ImageOps.pad(image, (grid.columns * size, grid.rows * size), color=color)
    for top in range(0, grid.rows * size, size):
        tiles += [local.crop((left, top, left + size, top + size)) for left in range(0, grid.columns * size, size)]
    stacked = np.stack([np.asarray(tile, dtype=np.float32) for tile in tiles]).transpose(0, 3, 1, 2) / 255
    mean, std = (np.float32(part).reshape(1, 3, 1, 1) for part in (model.siglip.pixel_mean, model.siglip.pixel_std))
    return (stacked - mean) / std


@pytest.mark.parametrize("preset", ["vl2_debug", "vl2_tiny"])
@pytest.mark.parametrize(
    "size", [(64, 64), (301, 100), (37, 100), (1000, 999), (1, 1), (20, 500), (30, 31), (701, 450)]
)
def test_tiles_follow_the_released_rule(preset, size):
    model = PRESETS[preset]
    grid = Tiling(model).grid(*size, 1)
    actual = inputs_of(picture(size), model, grid)
    assert list(actual) == ["siglip"]
    assert worst(actual["siglip"], released_tiles(picture(size), model, grid)) <= 1e-6  # measured 0


def test_every_grid_of_tiles_follows_the_released_rule():
    model = PRESETS["vl2_debug"]
    for grid in Tiling(model).grids:
        whole = pixels_of(picture((123, 77)), model, grid)
        assert (
            worst(tower_inputs(whole, model)["siglip"], released_tiles(picture((123, 77)), model, grid)) <= 1e-6
        )  # measured 0
        for start in range(grid.tiles):
            for stop in range(start + 1, grid.tiles + 1):
                part = pixels_of(picture((123, 77)), model, grid, range(start, stop))
                assert torch.equal(part, whole[start:stop])


@pytest.mark.parametrize("size", [(10_000, 1), (1, 10_000)])
def test_an_image_thinner_than_a_pixel_of_a_tile_stays_visible(size):
    model = PRESETS["vl2_debug"]
    line = pixels_of(Image.new("RGB", size, "white"), model, Grid(1, 1))
    assert ((line == 255).sum(dim=(1, 2, 3)) == 3 * model.siglip.image_size).all()


@pytest.mark.parametrize("preset", ["vl_debug", "vl_debug_siglip", "vl2_debug"])
def test_a_blank_image_is_all_padding(preset):
    model = PRESETS[preset]
    grid = Tiling(model).grids[-1]
    pixels = empty_pixels(model, grid.tiles)
    write_blank(model, pixels)
    assert (pixels == pixels_of(picture((90, 9)), model)[:, :, :1, :1]).all()


def _sides(size: int) -> dict[str, int]:
    return {"height": size, "width": size}
