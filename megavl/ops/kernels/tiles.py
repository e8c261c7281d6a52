"""Tiles of heads: how many heads of a token a program has in registers at a time."""

import triton

# Most elements of a tile, in fp32 in registers.
_TILE_ELEMENTS = 2048
_ELEMENTS_PER_WARP = 256


def heads_per_tile(heads: int, channels: int) -> int:
    """Heads that a program loads at a time, `channels` channels of each."""
    return min(triton.next_power_of_2(heads), max(_TILE_ELEMENTS // triton.next_power_of_2(channels), 1))


def warps(heads: int, channels: int) -> int:
    """Warps of a program that loads `heads` heads at a time, `channels` channels of each."""
    return min(max(heads * channels // _ELEMENTS_PER_WARP, 1), 4)
