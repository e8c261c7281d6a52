"""Vision-language adaptors: image features to the decoder's width (DeepSeek-VL section 3.1, DeepSeek-VL2 section 3)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megavl.config.model import ModelConfig


class HybridAdaptor(nn.Module):
    """Half of the width from each tower, then one layer over both: `low_high_hybrid_split_mlp_gelu` of the 7B.

    siglip: [I, N, W_siglip], sam: [I, N, W_sam] -> [I, N, D]
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        width = config.decoder.width
        self.high_up_proj = nn.Linear(config.sam.output_width, width // 2)
        self.low_up_proj = nn.Linear(config.siglip.width, width // 2)
        self.proj = nn.Linear(width, width)

    def forward(self, siglip: Tensor, sam: Tensor) -> Tensor:
        both = torch.cat((self.high_up_proj(sam), self.low_up_proj(siglip)), dim=-1)  # [I, N, D]
        return self.proj(F.gelu(both))


class SiglipAdaptor(nn.Module):
    """Two layers: `mlp_gelu` of the 1.3B. [I, N, W_siglip] -> [I, N, D]."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        width = config.decoder.width
        self.fc1 = nn.Linear(config.siglip.width, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, siglip: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(siglip)))


class TileAdaptor(nn.Module):
    """Each square of patches becomes one token (pixel shuffle), then two layers: `downsample_mlp_gelu` of VL2.

    The grid of patches is padded with zeros at its end where it is not divisible into squares.
    [I, G * G, W_siglip] -> [I, tile_features, D]
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        width, self.side = config.decoder.width, config.tiling.shuffle
        self.grid, self.padding = config.siglip.grid, -config.siglip.grid % self.side
        self.fc1 = nn.Linear(config.siglip.width * self.side**2, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, siglip: Tensor) -> Tensor:
        squares = siglip.transpose(1, 2).unflatten(2, (self.grid, self.grid))  # [I, W, G, G]
        squares = F.pad(squares, (0, self.padding, 0, self.padding))
        # [I, W, g, side, g, side]; channel w of patch (y, x) of a square is at (w, y, x) of its token
        squares = squares.unflatten(3, (-1, self.side)).unflatten(2, (-1, self.side))
        tokens = squares.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # [I, g * g, W * side * side]
        return self.fc2(F.gelu(self.fc1(tokens)))


def adaptor_of(config: ModelConfig) -> nn.Module:
    """The adaptor of a model: of tiles, of both towers, or of SigLIP alone."""
    if config.tiling is not None:
        return TileAdaptor(config)
    return HybridAdaptor(config) if config.sam else SiglipAdaptor(config)
