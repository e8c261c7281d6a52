"""Vision encoder: towers and adaptor, replicated or with the tiles shared out over tp (DeepSeek-VL section 3.3)."""

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from megavl.batch import tile_share
from megavl.model.sam import Sam
from megavl.model.siglip import Siglip
from megavl.parallel.collectives import join_shares, summing_gradients
from megavl.parallel.groups import TensorAxis

_Layer = Callable[..., Tensor]


class Encoder:
    """Towers and adaptor over the tiles of a micro-batch; they belong to the stem, which calls it.

    The towers are computed in full on every tensor rank, as the paper has it; or, where the ranks share the tiles, each
    computes its own, and all get the features of all.
    """

    def __init__(self, siglip: Siglip, sam: Sam | None, adaptor: nn.Module, tp: TensorAxis):
        self._siglip, self._sam, self._adaptor, self._tp = siglip, sam, adaptor, tp

    def __call__(self, pixels: Mapping[str, Tensor], tiles: int) -> Tensor:
        """The features of all `tiles` of a micro-batch: [tiles, tile_features, D]; of the blank tile, [1, ...], where
        there are none.

        pixels: normalised float32 [tiles here, 3, S, S] by tower, at least one, as `Batch` has them

        Raises ValueError where not all tiles are here, or not this rank's share of them.
        """
        share = tile_share(tiles, self._tp.rank, self._tp.size) if self._tp.shares_images else range(tiles)
        self._check(len(pixels["siglip"]), len(share), tiles)
        # Without a tile every rank has a blank one, and their gradients of zeros need not be added up.
        if not (self._tp.shares_images and tiles):
            return self._encode(pixels, lambda module: module)
        mine = self._encode(pixels, lambda module: summing_gradients(module, self._tp))
        return join_shares(mine, tiles, self._tp)  # the features of a blank tile are beyond the last one

    def _encode(self, pixels: Mapping[str, Tensor], called: Callable[[nn.Module], _Layer]) -> Tensor:
        siglip = called(self._siglip)(pixels["siglip"])  # [tiles, G * G, W_siglip]
        if self._sam is None:
            return called(self._adaptor)(siglip)
        return called(self._adaptor)(siglip, called(self._sam)(pixels["sam"]))

    def _check(self, here: int, share: int, tiles: int) -> None:
        tp = self._tp
        if here != max(1, share):
            where = f" on tensor rank {tp.rank} of {tp.size}, which share them" if tp.shares_images else ""
            raise ValueError(
                f"pixels of {here} tiles are here{where}, but the images of the micro-batch have {tiles}, of which "
                f"{share} belong here (a blank one where there is none): features would land on the wrong tokens"
            )
