"""Tiles of heads: how many heads of a token a program holds in registers at a time."""

import triton

# Of one tile in registers, in fp32.
_TILE_ELEMENTS = 2048
_ELEMENTS_PER_WARP = 256


def heads_per_tile(heads: int, channels: int) -> int:
    """Heads that a program handles at a time, of each `channels` with one load."""
    return min(triton.next_power_of_2(heads), max(_TILE_ELEMENTS // triton.next_power_of_2(channels), 1))


def warps(heads: int, channels: int) -> int:
    """Warps of a program that handles `heads` heads at a time, of each `channels` with one load."""
    return min(max(heads * channels // _ELEMENTS_PER_WARP, 1), 4)
