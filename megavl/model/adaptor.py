"""Vision-language adaptor: image features to the decoder's width (DeepSeek-VL section 3.1 and Table 10)."""

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
