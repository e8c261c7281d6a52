"""First item of the model list: towers, adaptor, token embedding, splice (DeepSeek-VL section 3.3)."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from megavl.batch import Batch
from megavl.config.model import ModelConfig
from megavl.config.tiles import NEWLINE, SEPARATOR, Grid, Tiling
from megavl.model.adaptor import HybridAdaptor, SiglipAdaptor, TileAdaptor
from megavl.model.encoder import Encoder
from megavl.model.sam import Sam
from megavl.model.siglip import Siglip
from megavl.parallel.collectives import split_tokens
from megavl.parallel.embedding import VocabEmbedding
from megavl.parallel.groups import TensorAxis


class Stem(nn.Module):
    """Tokens and images to the decoder's input, [T, D] ([T / tp, D] under sequence parallelism)."""

    def __init__(self, config: ModelConfig, tp: TensorAxis):
        super().__init__()
        self.config, self.tp = config, tp
        self.embedding = VocabEmbedding(config.decoder.vocab_size, config.decoder.width, tp)
        self.siglip = Siglip(config.siglip)
        self.sam = Sam(config.sam, config.siglip.grid) if config.sam else None
        if config.tiling:
            self.adaptor = TileAdaptor(config)
            self.newline = nn.Parameter(torch.empty(config.decoder.width))
            self.separator = nn.Parameter(torch.empty(config.decoder.width))
        else:
            self.adaptor = HybridAdaptor(config) if config.sam else SiglipAdaptor(config)
        self.encode = Encoder(self.siglip, self.sam, self.adaptor, tp)
        self._layouts = {
            grid: torch.from_numpy(tiling.layout(grid)) for tiling in [Tiling(config)] for grid in tiling.grids
        }

    def image_features(self, pixels: Mapping[str, Tensor], grids: Sequence[Grid]) -> Tensor:
        """What stands in the places of the images' tokens, one after another: [placeholders, D].

        pixels: normalised float32 [tiles, 3, S, S] by tower, or this rank's share of them
        """
        features = self.encode(pixels, sum(grid.tiles for grid in grids)).flatten(0, 1)  # [tiles * tile_features, D]
        if self.config.tiling is None:
            return features
        layout = self._layout(grids)  # [placeholders]
        # Found before they are on the device, which would have to be waited for.
        of_features, of_newlines, of_separators = (
            places.nonzero().squeeze(1).to(features.device)
            for places in (layout >= 0, layout == NEWLINE, layout == SEPARATOR)
        )
        order = layout[layout >= 0].to(features.device)  # [tiles * tile_features]
        return (
            features.new_empty(len(layout), features.shape[1])
            .index_copy(0, of_features, features[order])
            .index_copy(0, of_newlines, self.newline.expand(len(of_newlines), -1))
            .index_copy(0, of_separators, self.separator.expand(len(of_separators), -1))
        )

    def _layout(self, grids: Sequence[Grid]) -> Tensor:
        """Index of the feature at each placeholder, among those of all tiles, or what stands there instead."""
        parts, first = [torch.empty(0, dtype=torch.int64)], 0
        for grid in grids:
            layout = self._layouts[grid]
            parts.append(torch.where(layout >= 0, layout + first, layout))
            first += grid.tiles * self.config.tile_features
        return torch.cat(parts)  # [placeholders]

    def forward(self, h: None, batch: Batch) -> Tensor:
        """`h` is what every other layer gets from the one before. Raises ValueError where the images of the batch do
        not fill its placeholders."""
        is_image = batch.tokens == self.config.image_token_id
        slots = is_image.nonzero().squeeze(1)  # [placeholders]
        expected = sum(len(self._layouts[grid]) for grid in batch.grids)
        if len(slots) != expected:
            raise ValueError(
                f"{len(slots)} placeholder tokens (id {self.config.image_token_id}) for {len(batch.grids)} images that "
                f"take {expected}: features would land on the wrong tokens. Every image needs its own run of "
                "placeholders, and no text may hold their id."
            )
        features = self.image_features(batch.pixels, batch.grids)  # [placeholders, D]
        # A placeholder's own embedding is never read: it is looked up as token 0, which gets no gradient from it.
        words = self.embedding(batch.tokens.masked_fill(is_image, 0))  # [T, D]
        return split_tokens(words.index_copy(0, slots, features), self.tp)
