"""Named model shapes. Numbers: DeepSeek-VL section 3, DeepSeek-VL2 Table 1 and the published config files."""

from megavl.config.model import (
    DecoderConfig,
    MlaConfig,
    ModelConfig,
    MoeConfig,
    SamConfig,
    SiglipConfig,
    TilingConfig,
)

_IMAGE_PLACEHOLDER = 100015
# <image>, as the released processor prints it when it loads each tokenizer: the one with 129,280 entries (quoted in
# deepseek-ai/DeepSeek-VL2, issue 17) and Small's with 102,400 (issue 64).
_VL2_IMAGE = 128815
_VL2_SMALL_IMAGE = 100003

_SO400M = SiglipConfig(
    image_size=384, patch_size=14, width=1152, layers=27, heads=16, mlp_width=4304, gelu_approximation="tanh"
)

_DEBUG_SIGLIP = SiglipConfig(image_size=32, patch_size=8, width=48, layers=2, heads=4, mlp_width=96)
_DEBUG_SAM = SamConfig(
    image_size=64,
    patch_size=8,
    width=32,
    layers=4,
    heads=4,
    mlp_width=64,
    window=3,
    global_layers=(1, 3),
    neck_width=12,
)
# 24 heads, 22 blocks (24 items with stem and head) and widths that divide by 2, 3, 4, 6 and 8: any small topology fits.
_DEBUG_DECODER = DecoderConfig(
    layers=22, width=96, heads=24, kv_heads=24, mlp_width=240, vocab_size=2400, max_positions=512
)
# As in SO400M, 2 pixels of each side are not read, and 7 x 7 patches are padded to become 4 x 4 features.
_DEBUG_SO400M = SiglipConfig(
    image_size=30, patch_size=4, width=48, layers=2, heads=4, mlp_width=96, gelu_approximation="tanh"
)
_DEBUG_TILING = TilingConfig(max_tiles=4)
_DEBUG_MOE = MoeConfig(experts=8, per_token=3, shared=2, width=32)
_DEBUG_MLA = MlaConfig(kv_rank=32, nope_width=16, rope_width=8, value_width=16)


def _debug_vl2(name: str, mla: MlaConfig | None, moe: MoeConfig) -> ModelConfig:
    """Every part of a VL2 model in small; 6 blocks, with stem and head 8 items."""
    decoder = DecoderConfig(
        layers=6, width=96, heads=8, kv_heads=8, mlp_width=240, vocab_size=2400, max_positions=512, mla=mla, moe=moe
    )
    return ModelConfig(
        name=name,
        siglip=_DEBUG_SO400M,
        sam=None,
        tiling=_DEBUG_TILING,
        decoder=decoder,
        image_token_id=2399,
        init_std=0.02,
    )


PRESETS = {
    "vl_1b": ModelConfig(
        name="vl_1b",
        siglip=SiglipConfig(),
        sam=None,
        decoder=DecoderConfig(layers=24, width=2048, heads=16, kv_heads=16, mlp_width=5632, vocab_size=102400),
        image_token_id=_IMAGE_PLACEHOLDER,
    ),
    "vl_7b": ModelConfig(
        name="vl_7b",
        siglip=SiglipConfig(),
        sam=SamConfig(),
        decoder=DecoderConfig(layers=30, width=4096, heads=32, kv_heads=32, mlp_width=11008, vocab_size=102400),
        image_token_id=_IMAGE_PLACEHOLDER,
    ),
    "vl_debug": ModelConfig(
        name="vl_debug",
        siglip=_DEBUG_SIGLIP,
        sam=_DEBUG_SAM,
        decoder=_DEBUG_DECODER,
        image_token_id=2399,
        init_std=0.02,
    ),
    "vl_debug_siglip": ModelConfig(
        name="vl_debug_siglip",
        siglip=_DEBUG_SIGLIP,
        sam=None,
        decoder=_DEBUG_DECODER,
        image_token_id=2399,
        init_std=0.02,
    ),
    "vl2_tiny": ModelConfig(
        name="vl2_tiny",
        siglip=_SO400M,
        sam=None,
        tiling=TilingConfig(),
        decoder=DecoderConfig(
            layers=12,
            width=1280,
            heads=10,
            kv_heads=10,
            mlp_width=6848,
            vocab_size=129280,
            max_positions=4096,
            moe=MoeConfig(experts=64, per_token=6, shared=2, width=896),
        ),
        image_token_id=_VL2_IMAGE,
    ),
    "vl2_small": ModelConfig(
        name="vl2_small",
        siglip=_SO400M,
        sam=None,
        tiling=TilingConfig(),
        decoder=DecoderConfig(
            layers=27,
            width=2048,
            heads=16,
            kv_heads=16,
            mlp_width=10944,
            vocab_size=102400,
            max_positions=4096,
            mla=MlaConfig(),
            moe=MoeConfig(experts=64, per_token=6, shared=2, width=1408),
        ),
        image_token_id=_VL2_SMALL_IMAGE,
    ),
    "vl2_base": ModelConfig(
        name="vl2_base",
        siglip=_SO400M,
        sam=None,
        tiling=TilingConfig(),
        decoder=DecoderConfig(
            layers=30,
            width=2560,
            heads=32,
            kv_heads=32,
            mlp_width=12288,
            vocab_size=129280,
            max_positions=4096,
            mla=MlaConfig(),
            moe=MoeConfig(experts=72, per_token=6, shared=2, width=1536, router="sigmoid", normalise=True, scale=2.0),
        ),
        image_token_id=_VL2_IMAGE,
    ),
    # The three decoders of the family: Tiny's, Small's and Base's.
    "vl2_debug_mha": _debug_vl2("vl2_debug_mha", None, _DEBUG_MOE),
    "vl2_debug_mla": _debug_vl2("vl2_debug_mla", _DEBUG_MLA, _DEBUG_MOE),
    "vl2_debug": _debug_vl2(
        "vl2_debug",
        _DEBUG_MLA,
        _DEBUG_MOE.model_copy(update={"router": "sigmoid", "normalise": True, "scale": 2.0}),
    ),
}
