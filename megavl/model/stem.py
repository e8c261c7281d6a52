"""First item of the model list: towers, adaptor, token embedding, splice (DeepSeek-VL section 3.3)."""

import torch
from torch import Tensor, nn
from torch.autograd import Function

from megavl.batch import Batch, ImagePlaces
from megavl.config.model import ModelConfig
from megavl.model.adaptor import adaptor_of
from megavl.model.encoder import Encoder
from megavl.model.run_block import RunBlock, call_block
from megavl.model.sam import Sam
from megavl.model.siglip import Siglip
from megavl.parallel.collectives import split_tokens
from megavl.parallel.embedding import VocabEmbedding
from megavl.parallel.groups import TensorAxis


class Splice(Function):
    """Words [T, D] with features [tiles, tile_features, D], a newline [D] and a separator [D] written over their
    placeholders -> [T, D]. The last two are None without tiling.

    Without images it is the identity on the words. Its backward still gives the other inputs gradients of zeros, so
    that every rank has the same gradients in the same order.
    """

    @staticmethod
    def forward(
        ctx, words: Tensor, features: Tensor, newline: Tensor | None, separator: Tensor | None, places: ImagePlaces
    ) -> Tensor:
        ctx.places, ctx.shape = places, features.shape
        if not len(places.features):
            return words.view_as(words)
        h = words.index_copy(0, places.features, features.flatten(0, 1))  # [T, D]
        if newline is not None:
            h.index_copy_(0, places.newlines, newline.expand(len(places.newlines), -1))
            h.index_copy_(0, places.separators, separator.expand(len(places.separators), -1))
        return h

    @staticmethod
    def backward(ctx, grad: Tensor):
        places, tiled = ctx.places, ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
        if not len(places.features):
            nothing = grad.new_zeros(grad.shape[1]) if tiled else None  # [D]
            return grad, grad.new_zeros(ctx.shape), nothing, nothing, None
        for_words = grad.index_fill(0, places.features, 0.0)  # [T, D]
        for_newline = for_separator = None
        if tiled:
            for_newline = grad.index_select(0, places.newlines).sum(0)  # [D]
            for_separator = grad.index_select(0, places.separators).sum(0)  # [D]
        for indices in (places.newlines, places.separators):
            if len(indices):
                for_words.index_fill_(0, indices, 0.0)
        for_features = None
        if ctx.needs_input_grad[1]:
            for_features = grad.index_select(0, places.features).view(ctx.shape)  # [tiles, tile_features, D]
        return for_words, for_features, for_newline, for_separator, None


class Stem(nn.Module):
    """Tokens and images to the decoder's input, [T, D] ([T / tp, D] under sequence parallelism).

    Args:
        run_block: how each block of the towers is called
    """

    def __init__(self, config: ModelConfig, tp: TensorAxis, run_block: RunBlock = call_block):
        super().__init__()
        self.config, self.tp = config, tp
        self.embedding = VocabEmbedding(config.decoder.vocab_size, config.decoder.width, tp)
        self.siglip = Siglip(config.siglip, run_block)
        self.sam = Sam(config.sam, config.siglip.grid, run_block) if config.sam else None
        self.adaptor = adaptor_of(config)
        if config.tiling:
            self.newline = nn.Parameter(torch.empty(config.decoder.width))
            self.separator = nn.Parameter(torch.empty(config.decoder.width))
        else:
            self.newline = self.separator = None
        self.encode = Encoder(config, self.siglip, self.sam, self.adaptor, tp)

    def forward(self, batch: Batch) -> Tensor:
        features = self._features(batch)  # [tiles, tile_features, D]
        if features is None:
            return split_tokens(self.embedding(batch.tokens), self.tp)
        # A placeholder's own embedding is never read: it is looked up as token 0, which gets no gradient from it.
        is_image = batch.tokens == self.config.image_token_id
        words = self.embedding(batch.tokens.masked_fill(is_image, 0))  # [T, D]
        return split_tokens(Splice.apply(words, features, self.newline, self.separator, batch.places), self.tp)

    def _features(self, batch: Batch) -> Tensor | None:
        """[tiles, tile_features, D], computed here or before the pass; None in a text step.

        Raises:
            ValueError: neither pixels nor features of the batch's tiles are here.
        """
        if batch.pixels is not None:
            return self.encode(batch.pixels, batch.tiles) if len(batch.pixels) else None
        if batch.features is None and batch.tiles:
            raise ValueError(
                f"neither pixels nor features are here, but the images of the micro-batch have {batch.tiles} tiles: "
                "their placeholders would be read as text"
            )
        return batch.features
