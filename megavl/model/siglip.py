"""SigLIP vision transformer on the low-resolution image (arXiv 2303.15343; DeepSeek-VL section 3.1).

The tower of the released `siglip_large_patch16_384`: pre-norm blocks, exact GELU, final norm; every patch is a token.
It has no class token, and its attention pooling, which the released model carries but never calls, is left out.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megavl.config.model import SiglipConfig
from megavl.model.run_block import RunBlock, call_block
from megavl.ops.small_products import attend


class SiglipAttention(nn.Module):
    """All patches of an image see each other. [I, N, W] -> [I, N, W]."""

    def __init__(self, config: SiglipConfig):
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        head_width = x.shape[2] // self.heads
        qkv = self.qkv(x).unflatten(2, (3, self.heads, head_width))  # [I, N, 3, heads, d]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [I, heads, N, d] each
        attended = attend(q, k, v)  # [I, heads, N, d]
        return self.proj(attended.transpose(1, 2).flatten(2))  # [I, N, W]


class SiglipMlp(nn.Module):
    """[..., W] -> [..., W]."""

    def __init__(self, config: SiglipConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.mlp_width)
        self.fc2 = nn.Linear(config.mlp_width, config.width)
        self.approximation = config.gelu_approximation

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate=self.approximation))


class SiglipBlock(nn.Module):
    """[I, N, W] -> [I, N, W]."""

    def __init__(self, config: SiglipConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, config.norm_eps)
        self.attn = SiglipAttention(config)
        self.norm2 = nn.LayerNorm(config.width, config.norm_eps)
        self.mlp = SiglipMlp(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Siglip(nn.Module):
    """Normalised pixels float32 [I, 3, S, S] -> features [I, G * G, W] in the parameters' dtype."""

    def __init__(self, config: SiglipConfig, run_block: RunBlock = call_block):
        super().__init__()
        self.run_block = run_block
        self.patch_embed = nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size)
        self.pos_embed = nn.Parameter(torch.empty(1, config.grid**2, config.width))
        self.blocks = nn.ModuleList(SiglipBlock(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, config.norm_eps)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embed(pixels.to(self.patch_embed.weight.dtype))  # [I, W, G, G]
        x = patches.flatten(2).transpose(1, 2) + self.pos_embed  # [I, G * G, W]
        for block in self.blocks:
            x = self.run_block(block, x)
        return self.norm(x)
