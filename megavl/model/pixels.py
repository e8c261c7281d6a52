"""Pixels of a batch to the inputs of the towers, on their device: scaled to 0..1, resized for SigLIP, normalised.

The operations of the released code, in its order and in float32: (x / 255 - mean) / std. A multiply-add, x * (1 / (255
* std)) - mean / std, rounds 43 % of the values differently with SigLIP's numbers and 72 % with SAM's.

The hybrid encoder of DeepSeek-VL resizes in the model, too (`HybridVisionTower.forward`, clip_encoder.py): SigLIP's
image is a bilinear resize of SAM's unquantised pixels, where transformers' DeepseekVLHybridImageProcessor has a bicubic
one of 8-bit pixels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from megavl.config.model import ModelConfig, SamConfig, SiglipConfig


def tower_inputs(pixels: Tensor, config: ModelConfig) -> dict[str, Tensor]:
    """The image of each tower, normalised with the tower's own mean and standard deviation.

    Args:
        pixels: uint8 [tiles, 3, S, S], S the side of `config.pixel_tower`

    Returns:
        tower name ("siglip", "sam") -> float32 [tiles, 3, side of the tower's image, the same]
    """
    scaled = pixels.to(torch.float32).div_(_constants([255.0] * 3, pixels.device))  # [tiles, 3, S, S]
    if config.sam is None:
        return {"siglip": _normalise(scaled, config.siglip)}
    side = config.siglip.image_size
    low = functional.interpolate(scaled, (side, side), mode="bilinear", antialias=True, align_corners=False)
    return {"siglip": _normalise(low, config.siglip), "sam": _normalise(scaled, config.sam)}


def _normalise(scaled: Tensor, tower: SiglipConfig | SamConfig) -> Tensor:
    """In place."""
    mean, std = (_constants(values, scaled.device) for values in (tower.pixel_mean, tower.pixel_std))
    return scaled.sub_(mean).div_(std)


def _constants(values: Sequence[float], device: torch.device) -> Tensor:
    """One float32 number for each channel, [3, 1, 1].

    They are filled on the device, because a copy from the host would block it. As buffers of the module they would be
    cast to bf16 with its parameters. As Python numbers they would round differently: a GPU multiplies by the inverse.
    """
    return torch.stack([torch.full((1, 1), value, dtype=torch.float32, device=device) for value in values])
