"""Images to pixels, as the released code of DeepSeek-VL and DeepSeek-VL2 prepares them, without torchvision.

Sources: `VLMImageProcessor` (image_processing_vlm.py) and `HybridVisionTower.forward` (clip_encoder.py) of DeepSeek-VL,
`tokenize_with_images` (processing_deepseek_vl_v2.py) of DeepSeek-VL2. Two rules of the former differ from transformers'
DeepseekVL(Hybrid)ImageProcessor: the resized sides are truncated with int(), not rounded, and the SigLIP image of the
hybrid encoder is a bilinear resize of unquantised pixels, not a bicubic one of 8-bit pixels.
"""

from collections.abc import Mapping

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from megavl.config.model import ModelConfig, SamConfig, SiglipConfig
from megavl.config.tiles import Grid

# The shorter side of a very flat image is not resized below this.
_MIN_SIDE = 14


def tower_sizes(model: ModelConfig) -> dict[str, int]:
    """Side of the square image, in pixels, that each tower of the model reads."""
    sizes = {"siglip": model.siglip.image_size}
    return sizes if model.sam is None else sizes | {"sam": model.sam.image_size}


def numbers(model: ModelConfig, tiles: int) -> int:
    """Float32 numbers in the pixels of some tiles, of all towers."""
    return sum(tiles * 3 * size**2 for size in tower_sizes(model).values())


def room(model: ModelConfig, tiles: int, memory: Tensor) -> dict[str, Tensor]:
    """Where the pixels of some tiles go in a flat memory of `numbers` float32 or more: tower -> [tiles, 3, S, S]."""
    views, start = {}, 0
    for tower, size in tower_sizes(model).items():
        stop = start + tiles * 3 * size**2
        views[tower], start = memory[start:stop].view(tiles, 3, size, size), stop
    return views


def preprocess(image: Image.Image, model: ModelConfig, grid: Grid, tiles: range, pixels: Mapping[str, Tensor]) -> None:
    """Write the normalised pixels of some tiles of an RGB image into `pixels`: tower name -> float32 [tiles, 3, S, S].

    Args:
        grid: of the image; without a local tile the image is its overview alone.
        tiles: which of its tiles, the overview first and the local ones row by row.
    """
    low = pixels["siglip"]
    if model.tiling is not None:
        _write_tiles(image, model.siglip, grid, tiles, low)
    elif model.sam is None:
        _write_square(image, model.siglip, low[0])
    else:
        # The image is prepared once at SAM's resolution, and SigLIP gets that square image resized.
        high = pixels["sam"]
        _write_square(image, model.sam, high[0])
        size = low.shape[2:]
        low.copy_(functional.interpolate(high, size, mode="bilinear", antialias=True, align_corners=False))
        _normalise(high, model.sam)
    _normalise(low, model.siglip)


def blank(model: ModelConfig) -> Image.Image:
    """An image that is nothing but padding, to stand in for one that cannot be decoded."""
    return Image.new("RGB", (1, 1), _padding(model.sam or model.siglip))


def _write_square(image: Image.Image, tower: SiglipConfig | SamConfig, pixels: Tensor) -> None:
    """DeepSeek-VL's image, its long side resized to S, centred on a square of the mean colour: [3, S, S] in 0..1."""
    size = tower.image_size
    long_side = max(image.size)
    width, height = (max(int(side / long_side * size), _MIN_SIDE) for side in image.size)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    square = Image.new("RGB", (size, size), _padding(tower))
    square.paste(resized, ((size - width) // 2, (size - height) // 2))
    _write(np.array(square), pixels)


def _write_tiles(image: Image.Image, tower: SiglipConfig, grid: Grid, tiles: range, pixels: Tensor) -> None:
    """DeepSeek-VL2's tiles: the image on one square, and on the squares of its grid together: [tiles, 3, S, S] in
    0..1."""
    size = tower.image_size
    local = range(max(1, tiles.start), tiles.stop)
    if tiles.start == 0:
        _write(_padded(image, size, size, tower), pixels[0])
    if local:
        view = _padded(image, grid.columns * size, grid.rows * size, tower)
        for tile, into in zip(local, pixels[-len(local) :], strict=True):
            row, column = divmod(tile - 1, grid.columns)
            _write(view[row * size : (row + 1) * size, column * size : (column + 1) * size], into)


def _padded(image: Image.Image, width: int, height: int, tower: SiglipConfig) -> np.ndarray:
    """The image as large as it fits, centred on the mean colour: uint8 [height, width, 3].

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
    return np.array(view)


def _write(square: np.ndarray, pixels: Tensor) -> None:
    """uint8 [S, S, 3] into [3, S, S] in 0..1."""
    pixels.copy_(torch.from_numpy(square).permute(2, 0, 1)).div_(255)  # [3, S, S]


def _padding(tower: SiglipConfig | SamConfig) -> tuple[int, ...]:
    return tuple(int(channel * 255) for channel in tower.pixel_mean)


def _normalise(pixels: Tensor, tower: SiglipConfig | SamConfig) -> None:
    shape = (1, 3, 1, 1)
    mean, std = torch.tensor(tower.pixel_mean).view(shape), torch.tensor(tower.pixel_std).view(shape)  # [1, 3, 1, 1]
    pixels.sub_(mean).div_(std)
