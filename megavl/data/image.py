"""Images to pixels, as the released DeepSeek-VL code prepares them, without torchvision.

Source: `VLMImageProcessor` (image_processing_vlm.py) and `HybridVisionTower.forward` (clip_encoder.py). Two rules
differ from transformers' DeepseekVL(Hybrid)ImageProcessor: the resized sides are truncated with int(), not rounded, and
the SigLIP image of the hybrid encoder is a bilinear resize of unquantised pixels, not a bicubic one of 8-bit pixels.
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from megavl.config.model import ModelConfig

# The shorter side of a very flat image is not resized below this.
_MIN_SIDE = 14

_Colour = tuple[float, float, float]


def tower_sizes(model: ModelConfig) -> dict[str, int]:
    """Side of the square image, in pixels, that each tower of the model reads."""
    sizes = {"siglip": model.siglip.image_size}
    return sizes if model.sam is None else sizes | {"sam": model.sam.image_size}


def preprocess(image: Image.Image, model: ModelConfig) -> dict[str, Tensor]:
    """Normalised pixels of an RGB image for each tower of the model: tower name -> float32 [3, S, S].

    With a SAM tower the image is prepared once at SAM's resolution, and SigLIP gets that square image resized.
    """
    siglip, sam = model.siglip, model.sam
    if sam is None:
        square = _square(image, siglip.image_size, siglip.pixel_mean)
        return {"siglip": _normalise(square, siglip.pixel_mean, siglip.pixel_std)}
    high = _square(image, sam.image_size, sam.pixel_mean)
    size = (siglip.image_size, siglip.image_size)
    low = functional.interpolate(high[None], size, mode="bilinear", antialias=True, align_corners=False)[0]  # [3, S, S]
    return {
        "siglip": _normalise(low, siglip.pixel_mean, siglip.pixel_std),
        "sam": _normalise(high, sam.pixel_mean, sam.pixel_std),
    }


def _square(image: Image.Image, size: int, mean: _Colour) -> Tensor:
    """The image with long side `size`, centred on a square of the mean colour: float32 [3, size, size] in 0..1."""
    long_side = max(image.size)
    width, height = (max(int(side / long_side * size), _MIN_SIDE) for side in image.size)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    square = Image.new("RGB", (size, size), tuple(int(channel * 255) for channel in mean))
    square.paste(resized, ((size - width) // 2, (size - height) // 2))
    pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1)  # [3, size, size]
    return (pixels.double() * (1 / 255)).float().contiguous()


def _normalise(pixels: Tensor, mean: _Colour, std: _Colour) -> Tensor:
    shape = (3, 1, 1)
    return (pixels - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)  # [3, S, S]
