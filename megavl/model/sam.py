"""SAM-B on the high-resolution image (arXiv 2304.02643; ViTDet, arXiv 2203.16527; DeepSeek-VL section 3.1).

Blocks attend within padded windows, a few of them globally, all with decomposed relative positions. Two necks read the
tower: `neck` reads its output, and `neck_hd`, which the paper does not mention but the released `sam_hd` has, reads the
output of the first global block. Both maps are resized to four times SigLIP's grid and brought down to it by the same
two strided convolutions; the second is added with the learned weight `hd_alpha_downsamples`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megavl.config.model import SamConfig
from megavl.model.run_block import RunBlock, call_block
from megavl.ops.small_products import attend


class SamAttention(nn.Module):
    """Attention over a square of `side` x `side` patches with decomposed relative positions (arXiv 2112.01526, section
    4.1): [B, side, side, W] -> [B, side, side, W].

    The score of query (h, w) and key (h', w') is q k / sqrt(d) + q R_h[h - h'] + q R_w[w - w']. The last two terms are
    computed in 2 * C channels appended to the d of each head: the query has its terms for every row and column, the key
    has its row and column in one-hot form. Fused attention then serves it, and no [N, N] bias exists: at full size that
    is 0.8 GB in fp32, for each image and global block. C is `side` rounded up to a multiple of 8: kernels read bf16 in
    units of 16 bytes, and a window of 14 would misalign the rows of every operand.

    On a CPU a bias as `attn_mask` is slower too, forward and backward at full size: 1.4 times for the windows of an
    image in fp32 and 2.1 times in bf16, 1.2 and 3.7 times for a global block.
    """

    def __init__(self, config: SamConfig, side: int):
        super().__init__()
        self.heads, self.side, self.spare = config.heads, side, -side % 8
        head_width = config.width // config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)
        self.rel_pos_h = nn.Parameter(torch.empty(2 * side - 1, head_width))
        self.rel_pos_w = nn.Parameter(torch.empty(2 * side - 1, head_width))

    def relative_scores(self, q: Tensor) -> Tensor:
        """q [B, heads, N, d] against each row and each column of keys: [B, heads, N, 2 * C]."""
        steps = torch.arange(self.side, device=q.device)
        distance = steps[:, None] - steps + self.side - 1  # [query, key], from 0 to 2 * side - 2
        q = q.unflatten(2, (self.side, self.side))  # [B, heads, side, side, d]
        row_table, column_table = (
            F.pad(positions[distance], (0, 0, 0, self.spare))  # [side, C, d]
            for positions in (self.rel_pos_h, self.rel_pos_w)
        )
        rows = torch.einsum("bnhwd,hkd->bnhwk", q, row_table)  # [B, heads, side, side, C]
        columns = torch.einsum("bnhwd,wkd->bnhwk", q, column_table)  # [B, heads, side, side, C]
        return torch.cat((rows, columns), dim=-1).flatten(2, 3)  # [B, heads, N, 2 * C]

    def places(self, k: Tensor) -> Tensor:
        """Row and column of each key in one-hot form: [B, heads, N, 2 * C]."""
        one_hot = torch.eye(self.side, self.side + self.spare, dtype=k.dtype, device=k.device)
        rows, columns = one_hot.repeat_interleave(self.side, dim=0), one_hot.repeat(self.side, 1)  # [N, C] each
        return torch.cat((rows, columns), dim=1).expand(*k.shape[:2], -1, -1)  # [B, heads, N, 2 * C]

    def forward(self, x: Tensor) -> Tensor:
        head_width = x.shape[3] // self.heads
        qkv = self.qkv(x.flatten(1, 2)).unflatten(2, (3, self.heads, head_width))  # [B, N, 3, heads, d]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, heads, N, d] each
        q = torch.cat((q * head_width**-0.5, self.relative_scores(q)), dim=-1)  # [B, heads, N, d + 2 * C]
        k = torch.cat((k, self.places(k)), dim=-1)  # [B, heads, N, d + 2 * C]
        v = F.pad(v, (0, 2 * (self.side + self.spare)))  # [B, heads, N, d + 2 * C]: fused kernels want one width
        attended = attend(q, k, v, scale=1.0)[..., :head_width]  # [B, heads, N, d]
        merged = attended.transpose(1, 2).flatten(2)  # [B, N, W]
        return self.proj(merged).unflatten(1, (self.side, self.side))  # [B, side, side, W]


class SamMlp(nn.Module):
    """[..., W] -> [..., W]."""

    def __init__(self, config: SamConfig):
        super().__init__()
        self.lin1 = nn.Linear(config.width, config.mlp_width)
        self.lin2 = nn.Linear(config.mlp_width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin2(F.gelu(self.lin1(x)))


def to_windows(x: Tensor, window: int) -> Tensor:
    """Pad with zeros at the right and the bottom, then cut: [I, G, G, W] -> [I * n^2, window, window, W]."""
    images, grid, _, width = x.shape
    per_side = -(-grid // window)
    padding = per_side * window - grid
    x = F.pad(x, (0, 0, 0, padding, 0, padding))  # [I, n * window, n * window, W]
    x = x.reshape(images, per_side, window, per_side, window, width)
    return x.transpose(2, 3).reshape(images * per_side**2, window, window, width)


def from_windows(x: Tensor, images: int, grid: int) -> Tensor:
    """Undo `to_windows`, dropping the padding: [I * n^2, window, window, W] -> [I, G, G, W]."""
    window, width = x.shape[2:]
    per_side = -(-grid // window)
    x = x.reshape(images, per_side, per_side, window, window, width).transpose(2, 3)
    return x.reshape(images, per_side * window, per_side * window, width)[:, :grid, :grid]  # [I, G, G, W]


class SamBlock(nn.Module):
    """[I, G, G, W] -> [I, G, G, W]; `window` 0 attends over the whole image."""

    def __init__(self, config: SamConfig, window: int):
        super().__init__()
        self.window = window
        self.norm1 = nn.LayerNorm(config.width, config.norm_eps)
        self.attn = SamAttention(config, window or config.grid)
        self.norm2 = nn.LayerNorm(config.width, config.norm_eps)
        self.mlp = SamMlp(config)

    def attend(self, x: Tensor) -> Tensor:
        if not self.window:
            return self.attn(x)
        images, grid = x.shape[:2]
        return from_windows(self.attn(to_windows(x, self.window)), images, grid)

    def forward(self, x: Tensor) -> Tensor:
        # The padding comes after the norm, so that padded patches enter attention as the bias of qkv alone.
        x = x + self.attend(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map: [I, C, H, W] -> [I, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # [I, C, H, W]


def _neck(config: SamConfig) -> nn.Sequential:
    """[I, width, G, G] -> [I, neck_width, G, G]."""
    return nn.Sequential(
        nn.Conv2d(config.width, config.neck_width, 1, bias=False),
        ChannelNorm(config.neck_width, config.norm_eps),
        nn.Conv2d(config.neck_width, config.neck_width, 3, padding=1, bias=False),
        ChannelNorm(config.neck_width, config.norm_eps),
    )


class Sam(nn.Module):
    """Normalised pixels float32 [I, 3, S, S] -> features [I, output_grid^2, 4 * neck_width] in the parameters' dtype.
    `output_grid`: patches along a side of SigLIP's image, to whose tokens these are joined."""

    def __init__(self, config: SamConfig, output_grid: int, run_block: RunBlock = call_block):
        super().__init__()
        self.output_grid, self.run_block = output_grid, run_block
        self.first_global = config.first_global
        self.patch_embed = nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size)
        self.pos_embed = nn.Parameter(torch.empty(1, config.grid, config.grid, config.width))
        self.blocks = nn.ModuleList(
            SamBlock(config, 0 if layer in config.global_layers else config.window) for layer in range(config.layers)
        )
        self.neck = _neck(config)
        self.neck_hd = _neck(config)
        channels = config.neck_width
        self.downsamples = nn.Sequential(
            nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1, bias=False),
            nn.Conv2d(2 * channels, 4 * channels, 3, stride=2, padding=1, bias=False),
        )
        self.hd_alpha_downsamples = nn.Parameter(torch.empty(1))

    def bring_down(self, x: Tensor) -> Tensor:
        """[I, neck_width, G, G] -> [I, 4 * neck_width, output_grid, output_grid]. Resized in fp32, as released."""
        side = 4 * self.output_grid
        resized = F.interpolate(x.float(), size=(side, side), mode="bilinear", align_corners=False)
        return self.downsamples(resized.to(x.dtype))

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch_embed(pixels.to(self.patch_embed.weight.dtype)).permute(0, 2, 3, 1)  # [I, G, G, W]
        x = x + self.pos_embed
        for layer, block in enumerate(self.blocks):
            x = self.run_block(block, x)
            if layer == self.first_global:
                detail = x
        x, detail = x.permute(0, 3, 1, 2), detail.permute(0, 3, 1, 2)  # [I, W, G, G]
        features = self.bring_down(self.neck(x))
        features = features + self.bring_down(self.neck_hd(detail)) * self.hd_alpha_downsamples
        return features.flatten(2).transpose(1, 2)  # [I, output_grid^2, 4 * neck_width]
