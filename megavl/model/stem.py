"""First item of the model list: towers, adaptor, token embedding, splice (DeepSeek-VL section 3.3)."""

from collections.abc import Mapping

from torch import Tensor, nn

from megavl.batch import Batch
from megavl.config.model import ModelConfig
from megavl.model.adaptor import HybridAdaptor, SiglipAdaptor
from megavl.model.sam import Sam
from megavl.model.siglip import Siglip
from megavl.parallel.collectives import split_tokens
from megavl.parallel.embedding import VocabEmbedding
from megavl.parallel.groups import TensorAxis


class Stem(nn.Module):
    """Tokens and images to the decoder's input, [T, D] ([T / tp, D] under sequence parallelism).

    The towers are computed in full on every tensor rank, as the paper has it. They run for every batch, also over no
    image: each of their parameters then gets a gradient of zeros, and no rank differs from another in which gradients
    it has.
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
        siglip = self.siglip(pixels["siglip"])  # [I, image_tokens, W_siglip]
        if self.sam is None:
            return self.adaptor(siglip)
        return self.adaptor(siglip, self.sam(pixels["sam"]))

    def forward(self, h: None, batch: Batch) -> Tensor:
        """`h` is what every other layer gets from the one before. Raises ValueError where the images of the batch do
        not fill its placeholders."""
        features = self.image_features(batch.pixels).flatten(0, 1)  # [I * image_tokens, D]
        is_image = batch.tokens == self.config.image_token_id
        slots = is_image.nonzero().squeeze(1)  # [placeholders]
        if len(slots) != len(features):
            raise ValueError(
                f"{len(slots)} placeholder tokens (id {self.config.image_token_id}) for {len(features)} image features "
                f"({len(batch.pixels['siglip'])} images of {self.config.image_tokens} tokens): features would land on "
                "the wrong tokens. Every image needs its own run of placeholders, and no text may hold their id."
            )
        # A placeholder's own embedding is never read: it is looked up as token 0, which gets no gradient from it.
        words = self.embedding(batch.tokens.masked_fill(is_image, 0))  # [T, D]
        return split_tokens(words.index_copy(0, slots, features), self.tp)
