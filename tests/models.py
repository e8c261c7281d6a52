"""Tiny models of both families, and how a test changes fields of them."""

from typing import Any, TypeVar

from megavl.config.model import (
    DecoderConfig,
    MlaConfig,
    ModelConfig,
    MoeConfig,
    SamConfig,
    Section,
    SiglipConfig,
    TilingConfig,
)

AnySection = TypeVar("AnySection", bound=Section)


def changed(section: AnySection, **changes) -> AnySection:
    """`changed(HYBRID, sam=None, decoder={"layers": 3})`: a mapping changes fields of a nested section, any other value
    replaces the field. Raises pydantic's ValidationError, also for a field that does not exist."""
    return type(section).model_validate(merged(section.model_dump(), changes))


def merged(base: Any, changes: Any) -> Any:
    """`base` with `changes`, where both are mappings merged key by key; else `changes`."""
    if not (isinstance(base, dict) and isinstance(changes, dict)):
        return changes
    return base | {key: merged(base.get(key), value) for key, value in changes.items()}


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
    decoder=DecoderConfig(layers=2, width=32, heads=4, kv_heads=4, mlp_width=56, vocab_size=64),
    image_token_id=61,
    init_std=0.02,
)
SIGLIP_ONLY = changed(HYBRID, name="siglip_only", sam=None)
GROUPED = changed(SIGLIP_ONLY, name="grouped_queries", decoder={"kv_heads": 2})

# Tiles of 15 pixels (the last 3 are not read), with heads of 18 channels; 3 x 3 patches are padded to become 2 x 2
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
        moe=MoeConfig(experts=6, per_token=2, shared=2, width=20),
    ),
    image_token_id=61,
    init_std=0.02,
)
# No two widths of the attention are equal, so that none stands for another unnoticed.
MLA_SOFTMAX = changed(
    MHA_SOFTMAX,
    name="mla_softmax",
    decoder={"mla": MlaConfig(kv_rank=24, nope_width=10, rope_width=6, value_width=8)},
)
SIGMOID_ROUTER = {"router": "sigmoid", "normalise": True, "scale": 2.0}
MLA_SIGMOID = changed(MLA_SOFTMAX, name="mla_sigmoid", decoder={"moe": SIGMOID_ROUTER})
# The decoders of Tiny, Small and Base.
VL2 = (MHA_SOFTMAX, MLA_SOFTMAX, MLA_SIGMOID)
