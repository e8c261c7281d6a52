"""A model of a few ten thousand parameters that has every part, and batches for it."""

import torch
from torch import Tensor, nn

from megavl.batch import Batch
from megavl.config.model import (
    DecoderConfig,
    MlaConfig,
    ModelConfig,
    MoeConfig,
    SamConfig,
    SiglipConfig,
    TilingConfig,
)
from megavl.config.tiles import Grid, Tiling
from megavl.config.tokens import IGNORE_INDEX
from megavl.model.layout import PackLayout
from megavl.model.vlm import VLM
from megavl.ops.dispatch import choose
from megavl.parallel.groups import TensorAxis

OPS = choose(torch.device("cpu"))
ONE = TensorAxis()

# 4 x 4 SigLIP tokens per image. SAM: a 10 x 10 grid in windows of 4, so that they are padded to 12 x 12; two global
# blocks, the first of them neither the first nor the last block; 10 -> 16 in the resizing.
HYBRID = ModelConfig(
    name="hybrid",
    siglip=SiglipConfig(image_size=16, patch_size=4, width=24, layers=2, heads=2, mlp_width=40),
    sam=SamConfig(
        image_size=40,
        patch_size=4,
        width=24,
        layers=4,
        heads=3,
        mlp_width=48,
        window=4,
        global_layers=(1, 3),
        neck_width=6,
    ),
    decoder=DecoderConfig(
        layers=2, width=32, heads=4, kv_heads=4, mlp_width=56, vocab_size=64, max_positions=256, norm_eps=1e-6
    ),
    image_token_id=61,
    init_std=0.02,
)
SIGLIP_ONLY = HYBRID.model_copy(update={"name": "siglip_only", "sam": None})
GROUPED = SIGLIP_ONLY.model_copy(
    update={"name": "grouped_queries", "decoder": HYBRID.decoder.model_copy(update={"kv_heads": 2})}
)

# Tiles of 15 pixels, of which 3 are not read, with heads of 18 channels; 3 x 3 patches are padded to become 2 x 2
# features. A dense block and two with experts.
MHA_SOFTMAX = ModelConfig(
    name="mha_softmax",
    siglip=SiglipConfig(
        image_size=15, patch_size=4, width=36, layers=2, heads=2, mlp_width=40, gelu_approximation="tanh"
    ),
    sam=None,
    tiling=TilingConfig(max_tiles=4),
    decoder=DecoderConfig(
        layers=3,
        width=32,
        heads=4,
        kv_heads=4,
        mlp_width=56,
        vocab_size=64,
        max_positions=256,
        moe=MoeConfig(experts=6, per_token=2, shared=2, width=20),
    ),
    image_token_id=61,
    init_std=0.02,
)
_MLA = MHA_SOFTMAX.decoder.model_copy(update={"mla": MlaConfig(kv_rank=24, nope_width=10, rope_width=6, value_width=8)})
MLA_SOFTMAX = MHA_SOFTMAX.model_copy(update={"name": "mla_softmax", "decoder": _MLA})
_SIGMOID = _MLA.moe.model_copy(update={"router": "sigmoid", "normalise": True, "scale": 2.0})
MLA_SIGMOID = MHA_SOFTMAX.model_copy(
    update={"name": "mla_sigmoid", "decoder": _MLA.model_copy(update={"moe": _SIGMOID})}
)
VL2 = (MHA_SOFTMAX, MLA_SOFTMAX, MLA_SIGMOID)


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


def pixels(config: ModelConfig, images: int, seed: int) -> dict[str, Tensor]:
    """Random images, or tiles of images, for each tower: float32 [images, 3, S, S]."""
    generator = torch.Generator().manual_seed(seed)
    towers = {"siglip": config.siglip} | ({"sam": config.sam} if config.sam else {})
    return {
        name: torch.randn(images, 3, tower.image_size, tower.image_size, generator=generator)
        for name, tower in towers.items()
    }


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


def pack(
    documents: list[Tensor], images: dict[str, Tensor], config: ModelConfig, grids: tuple[Grid, ...] | None = None
) -> Batch:
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
        grids=(Grid(0, 0),) * len(images["siglip"]) if grids is None else grids,
        pixels=images if len(images["siglip"]) else {},
    )
