"""Steps that a run is expected to take, from its configuration alone."""

from dataclasses import dataclass

from megavl.config.run import RunConfig
from megavl.config.tiles import Tiling


@dataclass(frozen=True)
class ExpectedStep:
    """A step of one kind over the whole global batch, each pack one document.

    share:             of the steps of the run, once `data.text_ratio` has reached its final value
    images:            of a pack
    tokens:            those of images included
    supervised_tokens: without those of images
    squared_tokens:    sum over the documents of their lengths squared
    tiles:             of all images
    """

    name: str
    share: float
    images: int
    tokens: int
    supervised_tokens: int
    squared_tokens: int
    tiles: int

    def counts(self, packs: int, of: int) -> dict[str, int]:
        """What the work of `packs` of the `of` packs of the step depends on: arguments of `plan.cost.item_work`."""
        names = ("tokens", "supervised_tokens", "squared_tokens", "tiles")
        return {name: getattr(self, name) * packs // of for name in names}


def expected_steps(config: RunConfig) -> tuple[ExpectedStep, ExpectedStep]:
    """A text step and a multimodal step. The images of the latter are small ones, as many as fill half of a pack within
    `data.max_tiles`."""
    packs, length, tiling = config.train.global_batch, config.data.seq_len, Tiling(config.model)
    tokens_of_image, tiles_of_image = int(tiling.tokens[0]), int(tiling.tiles[0])
    images = max(1, length // 2 // tokens_of_image)
    if config.data.max_tiles is not None:
        images = max(1, min(images, config.data.max_tiles // tiles_of_image))
    text_share = config.data.text_ratio.final
    return tuple(
        ExpectedStep(
            name=name,
            share=share,
            images=of_pack,
            tokens=packs * length,
            supervised_tokens=packs * max(1, length - 1 - of_pack * tokens_of_image),
            squared_tokens=packs * length**2,
            tiles=packs * of_pack * tiles_of_image,
        )
        for name, share, of_pack in (("text", text_share, 0), ("multimodal", 1 - text_share, images))
    )
