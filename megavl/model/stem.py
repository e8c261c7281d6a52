"""First item of the model list: towers, adaptor, token embedding, splice (DeepSeek-VL section 3.3)."""

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from megavl.batch import Batch, image_share
from megavl.config.model import ModelConfig
from megavl.model.adaptor import HybridAdaptor, SiglipAdaptor
from megavl.model.sam import Sam
from megavl.model.siglip import Siglip
from megavl.parallel.collectives import join_shares, split_tokens, summing_gradients
from megavl.parallel.embedding import VocabEmbedding
from megavl.parallel.groups import TensorAxis

Encoder = Callable[..., Tensor]


class Stem(nn.Module):
    """Tokens and images to the decoder's input, [T, D] ([T / tp, D] under sequence parallelism).

    The towers are computed in full on every tensor rank, as the paper has it; or, where the ranks share the images,
    each computes its own, and all get the features of all. They run for every batch, also over no image: each of their
    parameters then gets a gradient of zeros, and no rank differs from another in which gradients it has.
    """

    def __init__(self, config: ModelConfig, tp: TensorAxis):
        super().__init__()
        self.config, self.tp = config, tp
        self.embedding = VocabEmbedding(config.decoder.vocab_size, config.decoder.width, tp)
        self.siglip = Siglip(config.siglip)
        self.sam = Sam(config.sam, config.siglip.grid) if config.sam else None
        self.adaptor = HybridAdaptor(config) if config.sam else SiglipAdaptor(config)

    def image_features(self, pixels: Mapping[str, Tensor]) -> Tensor:
        """Normalised float32 [I, 3, S, S] by tower -> [I, image_tokens, D]."""
        return self._encode(pixels, lambda module: module)

    def _encode(self, pixels: Mapping[str, Tensor], called: Callable[[nn.Module], Encoder]) -> Tensor:
        siglip = called(self.siglip)(pixels["siglip"])  # [I, image_tokens, W_siglip]
        if self.sam is None:
            return called(self.adaptor)(siglip)
        return called(self.adaptor)(siglip, called(self.sam)(pixels["sam"]))

    def _shared_features(self, pixels: Mapping[str, Tensor], images: int) -> Tensor:
        """This rank's share of `images` -> the features of all, [I, image_tokens, D]."""
        mine = self._encode(pixels, lambda module: summing_gradients(module, self.tp))
        return join_shares(mine, images, self.tp)

    def forward(self, h: None, batch: Batch) -> Tensor:
        """`h` is what every other layer gets from the one before. Raises ValueError where the images of the batch do
        not fill its placeholders."""
        is_image = batch.tokens == self.config.image_token_id
        slots = is_image.nonzero().squeeze(1)  # [placeholders]
        images = self._count(len(slots), len(batch.pixels["siglip"]))
        # Where there is no image at all, every rank knows it, and no gradient is worth a message.
        shared = self.tp.shares_images and images > 0
        features = self._shared_features(batch.pixels, images) if shared else self.image_features(batch.pixels)
        # A placeholder's own embedding is never read: it is looked up as token 0, which gets no gradient from it.
        words = self.embedding(batch.tokens.masked_fill(is_image, 0))  # [T, D]
        spliced = words.index_copy(0, slots, features.flatten(0, 1))  # [T, D]
        return split_tokens(spliced, self.tp)

    def _count(self, placeholders: int, images: int) -> int:
        """Images of the whole micro-batch. `images` is how many of them are here."""
        each, tp = self.config.image_tokens, self.tp
        total = placeholders // each
        expected = len(image_share(total, tp.rank, tp.size)) if tp.shares_images else total
        if placeholders % each or images != expected:
            share = f" on tensor rank {tp.rank} of {tp.size}, which share them" if tp.shares_images else ""
            raise ValueError(
                f"{placeholders} placeholder tokens (id {self.config.image_token_id}) for {images * each} image "
                f"features ({images} images of {each} tokens){share}: features would land on the wrong tokens. Every "
                "image needs its own run of placeholders, and no text may hold their id."
            )
        return total
