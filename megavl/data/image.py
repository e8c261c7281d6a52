"""Images to 8-bit pixels, as the released code of DeepSeek-VL and DeepSeek-VL2 prepares them.

Pillow resizes and pads 8-bit pixels, so nothing is lost by keeping them. `megavl.model.pixels` normalises them on the
device, and resizes SigLIP's image of the hybrid encoder there.

Sources: `VLMImageProcessor` (image_processing_vlm.py) of DeepSeek-VL, `tokenize_with_images`
(processing_deepseek_vl_v2.py) of DeepSeek-VL2. A rule of the former differs from transformers'
DeepseekVL(Hybrid)ImageProcessor: the resized sides are truncated with int(), not rounded.
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from megavl.config.model import ModelConfig, SamConfig, SiglipConfig
from megavl.config.tiles import Grid

# The shorter side of a very flat image is not resized below this.
_MIN_SIDE = 14


def empty_pixels(model: ModelConfig, tiles: int) -> Tensor:
    """Uninitialised memory for the pixels of some tiles: uint8 [tiles, 3, S, S], S the side of `model.pixel_tower`."""
    size = model.pixel_tower.image_size
    return torch.empty(tiles, 3, size, size, dtype=torch.uint8)


def preprocess(image: Image.Image, model: ModelConfig, grid: Grid, tiles: range, pixels: Tensor) -> None:
    """Write the pixels of some tiles of an RGB image.

    Args:
        grid: of the image; without a local tile the image is its overview alone.
        tiles: which of its tiles, the overview first and the local ones row by row.
        pixels: where to: uint8 [tiles, 3, S, S].
    """
    if model.tiling is not None:
        _write_tiles(image, model.siglip, grid, tiles, pixels)
    else:
        _write_square(image, model.pixel_tower, pixels[0])


def write_blank(model: ModelConfig, pixels: Tensor) -> None:
    """Write tiles of nothing but padding, for an image that cannot be decoded or where there is no image."""
    pixels.copy_(torch.tensor(_padding(model.pixel_tower)).view(3, 1, 1))  # [tiles, 3, S, S]


def _write_square(image: Image.Image, tower: SiglipConfig | SamConfig, pixels: Tensor) -> None:
    """DeepSeek-VL's image, its long side resized to S, centred on a square of the mean colour: [3, S, S]."""
    size = tower.image_size
    long_side = max(image.size)
    width, height = (max(int(side / long_side * size), _MIN_SIDE) for side in image.size)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    square = Image.new("RGB", (size, size), _padding(tower))
    square.paste(resized, ((size - width) // 2, (size - height) // 2))
    _write(square, pixels)


def _write_tiles(image: Image.Image, tower: SiglipConfig, grid: Grid, tiles: range, pixels: Tensor) -> None:
    """DeepSeek-VL2's tiles: the image on one square, and on the squares of its grid together: [tiles, 3, S, S]."""
    size = tower.image_size
    local = range(max(1, tiles.start), tiles.stop)
    if tiles.start == 0:
        _write(_padded(image, size, size, tower), pixels[0])
    if local:
        view = _padded(image, grid.columns * size, grid.rows * size, tower)
        for tile, into in zip(local, pixels[-len(local) :], strict=True):
            row, column = divmod(tile - 1, grid.columns)
            _write(view.crop((column * size, row * size, (column + 1) * size, (row + 1) * size)), into)


def _padded(image: Image.Image, width: int, height: int, tower: SiglipConfig) -> Image.Image:
    """The image as large as it fits, centred on the mean colour.

    `ImageOps.pad` of Pillow, but for an image so thin that less than half a pixel would be left of its shorter side:
    it stays one pixel wide.
    """
    if image.width / image.height > width / height:
        fitted = (width, max(1, round(image.height / image.width * width)))
    else:
        fitted = (max(1, round(image.width / image.height * height)), height)
    view = Image.new("RGB", (width, height), _padding(tower))
    place = (round((width - fitted[0]) * 0.5), round((height - fitted[1]) * 0.5))
    view.paste(image.resize(fitted, Image.Resampling.BICUBIC), place)
    return view


def _write(square: Image.Image, pixels: Tensor) -> None:
    """An image of S x S into [3, S, S].

    Band by band: Pillow keeps 4 bytes for each pixel, and giving out 3 of them interleaved takes twice as long as
    three planes (of 1024 x 1024 pixels 2.4 ms and 1.1 ms on one core).
    """
    np.stack([np.asarray(band) for band in square.split()], out=pixels.numpy())


def _padding(tower: SiglipConfig | SamConfig) -> tuple[int, ...]:
    return tuple(int(channel * 255) for channel in tower.pixel_mean)
