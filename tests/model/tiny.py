"""Modules of tiny models with random weights, and batches for them."""

import torch
from torch import Tensor, nn

from megavl.batch import Batch
from megavl.config.model import DecoderConfig, ModelConfig
from megavl.config.tiles import Grid, Tiling
from megavl.config.tokens import IGNORE_INDEX
from megavl.model.layout import PackLayout
from megavl.model.vlm import VLM
from megavl.ops.dispatch import choose
from megavl.parallel.groups import TensorAxis
from tests.models import SIGLIP_ONLY

OPS = choose(torch.device("cpu"))
ONE = TensorAxis()


def model(config: ModelConfig) -> VLM:
    """The whole model in this process, without values."""
    return VLM(config, ONE, OPS, 0, config.layers)


_ROUTER_BIASES = ("router.bias", "e_score_correction_bias")


@torch.no_grad()
def randomise(model: nn.Module, seed: int) -> None:
    """Values with which every part speaks, for megavl's models and for transformers'. What training starts at zero
    (hd_alpha, relative positions, biases) or at one (norms) would hide errors."""
    generator = torch.Generator().manual_seed(seed)
    biases = [(name, each) for name, each in model.named_buffers() if name.endswith(_ROUTER_BIASES)]
    for name, parameter in [*model.named_parameters(), *biases]:
        noise = torch.randn(parameter.shape, generator=generator)
        if "alpha" in name:
            parameter.fill_(0.7)
        elif "norm" in name and name.endswith("weight"):
            parameter.copy_(1 + 0.2 * noise)
        elif parameter.dim() == 1 or "rel_pos" in name or "pos_embed" in name or "position_embedding" in name:
            parameter.copy_(0.3 * noise)
        elif "experts" in name:
            parameter.copy_(noise / parameter.shape[-1] ** 0.5)
        else:
            parameter.copy_(noise / parameter[0].numel() ** 0.5)


def random_model(config: ModelConfig, seed: int = 0) -> VLM:
    """The whole model in this process with the values of `randomise`."""
    whole = model(config)
    randomise(whole, seed)
    return whole


def pixels(config: ModelConfig, images: int, seed: int) -> Tensor:
    """Random images, or tiles of images: uint8 [images, 3, S, S]."""
    generator, size = torch.Generator().manual_seed(seed), config.pixel_tower.image_size
    return torch.randint(256, (images, 3, size, size), dtype=torch.uint8, generator=generator)


def document(config: ModelConfig, text: tuple[int, ...], seed: int, grids: tuple[Grid, ...] | None = None) -> Tensor:
    """Tokens int64 [T]: runs of random text of the given lengths with one image between any two of them. `grids` of the
    images are those of DeepSeek-VL where none are given."""
    generator = torch.Generator().manual_seed(seed)
    layout = Tiling(config).layout
    sizes = [0] + [len(layout(grid)) for grid in grids or (Grid(0, 0),) * (len(text) - 1)]
    runs = [torch.randint(config.image_token_id, (length,), generator=generator) for length in text]
    images = [torch.full((size,), config.image_token_id) for size in sizes]
    return torch.cat([part for both in zip(images, runs, strict=True) for part in both])


def layout(decoder: DecoderConfig, lengths: tuple[int, ...]) -> PackLayout:
    """One pack of documents of these lengths."""
    tokens = torch.zeros(sum(lengths), dtype=torch.int64)
    return PackLayout.of(Batch.of(Tiling(SIGLIP_ONLY), tokens, labels=tokens, lengths=lengths, packs=1), decoder)


def pack(documents: list[Tensor], images: Tensor, config: ModelConfig, grids: tuple[Grid, ...] | None = None) -> Batch:
    """Documents end to end. Each token's label is the next one, except before an image and at a document's end. `grids`
    of the images are those of DeepSeek-VL where none are given."""
    labels = [torch.cat((tokens[1:], torch.tensor([IGNORE_INDEX]))) for tokens in documents]
    flat = torch.cat(labels)
    return Batch.of(
        Tiling(config),
        tokens=torch.cat(documents),
        labels=flat.masked_fill(flat == config.image_token_id, IGNORE_INDEX),
        lengths=[len(tokens) for tokens in documents],
        packs=1,
        grids=(Grid(0, 0),) * len(images) if grids is None else grids,
        pixels=images,
    )
