"""Rules between data, model and batch that the sampler and the loader of a run depend on.

`megavl.config.rules.check` reports them with all others before a run starts; `Sampler` and `Loader` refuse by the same
ones, so that building one directly is as safe. Each rule returns its problems: what, the values, the consequence, the
remedy.
"""

from megavl.config.model import ModelConfig
from megavl.config.run import DataConfig, TrainConfig
from megavl.config.tiles import Tiling


def sampler_problems(data: DataConfig, model: ModelConfig) -> list[str]:
    """What keeps the documents of `data` from being packed for `model`, one line each."""
    images = image_problems(Tiling(model), data.seq_len, data.max_tiles) if data.multimodal else []
    return [*_modalities(data), *images]


def image_problems(tiling: Tiling, seq_len: int, max_tiles: int | None) -> list[str]:
    """What keeps images from packs of at most `seq_len` tokens and `max_tiles` tiles (None: any), one line each."""
    return [*_image_tokens(tiling, seq_len), *_image_tiles(tiling, max_tiles)]


def loader_problems(train: TrainConfig, dp: int) -> list[str]:
    """What keeps a global batch from being cut into equal micro-batches for `dp` data-parallel ranks, one line each."""
    packs = dp * train.micro_batch
    if train.global_batch % packs == 0:
        return []
    fewer = next((ranks for ranks in range(dp, 0, -1) if train.global_batch % (ranks * train.micro_batch) == 0), None)
    return [
        f"train.global_batch = {train.global_batch} is not divisible by data-parallel ranks * train.micro_batch = "
        f"{dp} * {train.micro_batch} = {packs}: packs would be left over; change the batch to "
        f"{nearest_multiples(train.global_batch, packs)}"
        + (f", or the data-parallel ranks to {fewer}" if fewer else "")
    ]


def nearest_multiples(number: int, divisor: int) -> str:
    """The nearest multiples of `divisor` above zero: "16 or 24" for 19 and 8, "8" for 5 and 8."""
    below = number // divisor * divisor
    return f"{below} or {below + divisor}" if below else f"{divisor}"


def _modalities(data: DataConfig) -> list[str]:
    (least, most), problems = data.text_ratio.extremes, []
    if most > 0 and not data.text:
        problems.append(
            f"data.text_ratio = {most:g} asks for text steps, but data.text is empty: add a source, or set "
            "data.text_ratio=0"
        )
    if least < 1 and not data.multimodal:
        problems.append(
            f"data.text_ratio = {least:g} asks for multimodal steps, but data.multimodal is empty: add a source, or "
            "set data.text_ratio=1"
        )
    return problems


def _image_tokens(tiling: Tiling, seq_len: int) -> list[str]:
    tokens = int(tiling.tokens.max())
    # An image of exactly seq_len tokens still fits, but alone: of its text, only the first token is predicted from it.
    if tokens < seq_len:
        return []
    return [
        f"an image takes up to {tokens} tokens and is never split, so data.seq_len = {seq_len} leaves no room for "
        f"text beside it: the text would be learned without its image; set data.seq_len well above {tokens}"
    ]


def _image_tiles(tiling: Tiling, max_tiles: int | None) -> list[str]:
    tiles = int(tiling.tiles.max())
    if max_tiles is None or tiles <= max_tiles:
        return []
    return [
        f"an image takes up to {tiles} tiles, its overview included, and is never split, so no pack of "
        f"data.max_tiles = {max_tiles} could hold it: set data.max_tiles to {tiles} or more, or lower "
        "model.tiling.max_tiles"
    ]
