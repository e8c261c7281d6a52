"""Vision encoder: towers and adaptor, as a part of the stem or alone (DeepSeek-VL section 3.3)."""

from collections.abc import Callable

from torch import Tensor, nn

from megavl.batch import tile_share
from megavl.config.model import ModelConfig
from megavl.model.adaptor import adaptor_of
from megavl.model.pixels import tower_inputs
from megavl.model.run_block import RunBlock, call_block
from megavl.model.sam import Sam
from megavl.model.siglip import Siglip
from megavl.parallel.collectives import join_shares, summing_gradients
from megavl.parallel.groups import TensorAxis

_Layer = Callable[..., Tensor]


def _features(pixels: Tensor, config: ModelConfig, siglip: _Layer, sam: _Layer | None, adaptor: _Layer) -> Tensor:
    """uint8 [tiles, 3, S, S] -> [tiles, tile_features, D]."""
    inputs = tower_inputs(pixels, config)
    of_siglip = siglip(inputs["siglip"])  # [tiles, G * G, W_siglip]
    return adaptor(of_siglip) if sam is None else adaptor(of_siglip, sam(inputs["sam"]))


class TileEncoder(nn.Module):
    """Towers and adaptor without the rest of the stem; parameters have the names that they have in it.

    Pixels uint8 [tiles, 3, S, S], at least one tile, to features [tiles, tile_features, D].
    """

    def __init__(self, config: ModelConfig, run_block: RunBlock = call_block):
        super().__init__()
        self.config = config
        self.siglip = Siglip(config.siglip, run_block)
        self.sam = Sam(config.sam, config.siglip.grid, run_block) if config.sam else None
        self.adaptor = adaptor_of(config)

    def forward(self, pixels: Tensor) -> Tensor:
        return _features(pixels, self.config, self.siglip, self.sam, self.adaptor)


class Encoder:
    """Features of the tiles of a micro-batch. The stem owns the towers and the adaptor, and calls this.

    By default every tensor rank encodes all tiles, as in the paper. If the ranks share the tiles, each rank encodes its
    share and the features are all-gathered.
    """

    def __init__(self, config: ModelConfig, siglip: Siglip, sam: Sam | None, adaptor: nn.Module, tp: TensorAxis):
        self._config = config
        self._siglip, self._sam, self._adaptor, self._tp = siglip, sam, adaptor, tp

    def __call__(self, pixels: Tensor, tiles: int) -> Tensor:
        """Encode the tiles.

        Args:
            pixels: uint8 [tiles of this rank, 3, S, S]; at least one tile, as in `Batch`
            tiles: of all images of the micro-batch

        Returns:
            [tiles, tile_features, D]; without tiles the features of the blank one, [1, tile_features, D].

        Raises:
            ValueError: the pixels are not those of all tiles, or of this rank's share.
        """
        share = tile_share(tiles, self._tp.rank, self._tp.size) if self._tp.shares_images else range(tiles)
        self._check(len(pixels), len(share), tiles)
        # Without tiles every rank encodes a blank one; a sum of zero gradients needs no all-reduce.
        if not (self._tp.shares_images and tiles):
            return self._encode(pixels, lambda module: module)
        mine = self._encode(pixels, lambda module: summing_gradients(module, self._tp))
        return join_shares(mine, tiles, self._tp)  # cuts off blank tiles

    def _encode(self, pixels: Tensor, called: Callable[[nn.Module], _Layer]) -> Tensor:
        sam = None if self._sam is None else called(self._sam)
        return _features(pixels, self._config, called(self._siglip), sam, called(self._adaptor))

    def _check(self, here: int, share: int, tiles: int) -> None:
        tp = self._tp
        if here != max(1, share):
            where = f" on tensor rank {tp.rank} of {tp.size}, which share them" if tp.shares_images else ""
            raise ValueError(
                f"pixels of {here} tiles are here{where}, but the images of the micro-batch have {tiles}, of which "
                f"{share} belong here (a blank one where there is none): features would land on the wrong tokens"
            )
