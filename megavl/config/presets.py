"""Named model shapes. Numbers: DeepSeek-VL section 3 and the published config files."""

from megavl.config.model import DecoderConfig, ModelConfig, SamConfig, SiglipConfig

_IMAGE_PLACEHOLDER = 100015

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
}
