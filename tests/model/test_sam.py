"""Parts of SAM that parity could hide: windows, and branches that would be silent."""

import pytest
import torch

from megavl.model.pixels import tower_inputs
from megavl.model.sam import SamAttention, from_windows, to_windows
from tests.model import tiny
from tests.models import HYBRID


@pytest.mark.parametrize(("grid", "window"), [(10, 4), (8, 4), (3, 5)])
def test_windows_round_trip(grid, window):
    x = torch.randn(2, grid, grid, 3)
    windows = to_windows(x, window)
    per_side = -(-grid // window)
    assert windows.shape == (2 * per_side**2, window, window, 3)
    assert torch.equal(from_windows(windows, 2, grid), x)
    assert torch.equal(
        windows[0], torch.nn.functional.pad(x[0, :window, :window], (0, 0) + 2 * (0, max(0, window - grid)))
    )
    assert windows.sum() == pytest.approx(x.sum().item(), abs=1e-4), "the padding is zero"


def test_attention_is_the_softmax_with_relative_bias():
    """The channels that carry the relative positions add up to the bias of the formula."""
    side, heads, head_width = 5, 3, 8
    attention = SamAttention(HYBRID.sam, side)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    x = torch.randn(2, side, side, heads * head_width, generator=torch.Generator().manual_seed(0))

    q, k, v = attention.qkv(x).reshape(2, side * side, 3, heads, head_width).permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(-2, -1) / head_width**0.5
    for query in range(side * side):
        for key in range(side * side):
            row = attention.rel_pos_h[query // side - key // side + side - 1]
            column = attention.rel_pos_w[query % side - key % side + side - 1]
            scores[:, :, query, key] += q[:, :, query] @ (row + column)
    expected = (scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape)
    error = (attention(x) - attention.proj(expected)).abs().max().item()
    assert error < 1e-5  # measured 1.7e-6


@pytest.mark.parametrize(
    "name",
    [
        "hd_alpha_downsamples",
        "neck_hd.0.weight",
        "neck.0.weight",
        "blocks.0.attn.rel_pos_h",
        "blocks.1.attn.rel_pos_w",
        "blocks.3.mlp.lin1.weight",
    ],
)
@torch.no_grad()
def test_every_branch_reaches_the_features(name):
    sam = tiny.random_model(HYBRID).stem.sam
    pixels = tower_inputs(tiny.pixels(HYBRID, 1, seed=0), HYBRID)["sam"]
    before = sam(pixels)
    # One half only: the norm behind a neck's convolution would undo a change of the whole.
    weight = sam.get_parameter(name)
    weight[: -(-len(weight) // 2)].mul_(1.5)
    assert (sam(pixels) - before).abs().max() > 1e-2 * before.abs().max()


@torch.no_grad()
def test_detail_comes_from_the_first_global_block():
    """With hd_alpha at zero the neck alone speaks; what comes after the first global block does not change the rest."""
    sam = tiny.random_model(HYBRID).stem.sam
    pixels = tower_inputs(tiny.pixels(HYBRID, 1, seed=0), HYBRID)["sam"]

    def detail() -> torch.Tensor:
        with_detail = sam(pixels)
        alpha = sam.hd_alpha_downsamples.clone()
        sam.hd_alpha_downsamples.zero_()
        without = sam(pixels)
        sam.hd_alpha_downsamples.copy_(alpha)
        return with_detail - without

    before = detail()
    sam.blocks[2].mlp.lin2.weight.mul_(2)  # after the first global block, which is block 1
    torch.testing.assert_close(detail(), before, rtol=0, atol=1e-5)
    sam.blocks[1].mlp.lin2.weight.mul_(2)
    assert (detail() - before).abs().max() > 1e-3
