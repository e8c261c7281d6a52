"""Images to pixels, as the released DeepSeek-VL code prepares them, without torchvision.

Source: `VLMImageProcessor` (image_processing_vlm.py) and `HybridVisionTower.forward` (clip_encoder.py). Two rules
differ from transformers' DeepseekVL(Hybrid)ImageProcessor: the resized sides are truncated with int(), not rounded, and
the SigLIP image of the hybrid encoder is a bilinear resize of unquantised pixels, not a bicubic one of 8-bit pixels.
"""

from collections.abc import Mapping

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from megavl.config.model import ModelConfig, SamConfig, SiglipConfig

# The shorter side of a very flat image is not resized below this.
_MIN_SIDE = 14


def tower_sizes(model: ModelConfig) -> dict[str, int]:
    """Side of the square image, in pixels, that each tower of the model reads."""
    sizes = {"siglip": model.siglip.image_size}
    return sizes if model.sam is None else sizes | {"sam": model.sam.image_size}


def numbers(model: ModelConfig, images: int) -> int:
    """Float32 numbers in the pixels of some images, of all towers."""
    return sum(images * 3 * size**2 for size in tower_sizes(model).values())


def room(model: ModelConfig, images: int, memory: Tensor) -> dict[str, Tensor]:
    """Where the pixels of some images go in a flat memory of `numbers` float32 or more: tower -> [images, 3, S, S]."""
    views, start = {}, 0
    for tower, size in tower_sizes(model).items():
        stop = start + images * 3 * size**2
        views[tower], start = memory[start:stop].view(images, 3, size, size), stop
    return views


def preprocess(image: Image.Image, model: ModelConfig, pixels: Mapping[str, Tensor]) -> None:
    """Write the normalised pixels of an RGB image into `pixels`: tower name -> float32 [3, S, S].

    With a SAM tower the image is prepared once at SAM's resolution, and SigLIP gets that square image resized.
    """
    low = pixels["siglip"]
    if model.sam is None:
        _write_square(image, model.siglip, low)
    else:
        high = pixels["sam"]
        _write_square(image, model.sam, high)
        size = low.shape[1:]
        low.copy_(functional.interpolate(high[None], size, mode="bilinear", antialias=True, align_corners=False)[0])
        _normalise(high, model.sam)
    _normalise(low, model.siglip)


def blank(model: ModelConfig) -> Image.Image:
    """An image that is nothing but padding, to stand in for one that cannot be decoded."""
    return Image.new("RGB", (1, 1), _padding(model.sam or model.siglip))


def _write_square(image: Image.Image, tower: SiglipConfig | SamConfig, pixels: Tensor) -> None:
    """Write the image, its long side resized to S, centred on a square of the mean colour: [3, S, S] in 0..1."""
    size = tower.image_size
    long_side = max(image.size)
    width, height = (max(int(side / long_side * size), _MIN_SIDE) for side in image.size)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    square = Image.new("RGB", (size, size), _padding(tower))
    square.paste(resized, ((size - width) // 2, (size - height) // 2))
    pixels.copy_(torch.from_numpy(np.array(square)).permute(2, 0, 1)).div_(255)  # [3, S, S]


def _padding(tower: SiglipConfig | SamConfig) -> tuple[int, ...]:
    return tuple(int(channel * 255) for channel in tower.pixel_mean)


def _normalise(pixels: Tensor, tower: SiglipConfig | SamConfig) -> None:
    shape = (3, 1, 1)
    pixels.sub_(torch.tensor(tower.pixel_mean).view(shape)).div_(torch.tensor(tower.pixel_std).view(shape))  # [3, S, S]
