"""The layout of the released checkpoints of DeepSeek-VL2: `deepseek_vl_v2`, read by DeepSeek's own `deepseek_vl2`."""

import re
from math import ceil

from megavl.checkpoint.error import CheckpointError
from megavl.checkpoint.maps.deepseek_v2 import LATENT_NORM_EPS, decoder_json, decoder_names, read_decoder
from megavl.checkpoint.maps.fields import Fields
from megavl.checkpoint.maps.rule import Names, Rule, Shape, rules
from megavl.checkpoint.maps.siglip_vit import pool_shapes, siglip_names
from megavl.config.model import ModelConfig, SiglipConfig, TilingConfig
from megavl.config.parameters import parameters
from megavl.config.presets import PRESETS
from megavl.config.tiles import Tiling
from megavl.config.tokens import IGNORE_INDEX

MODEL_TYPES = ("deepseek_vl_v2",)

# Id of the placeholder by the size of the vocabulary: the released config.json does not say, its tokenizer does.
_RELEASED = {model.decoder.vocab_size: model.image_token_id for model in (PRESETS["vl2_base"], PRESETS["vl2_small"])}

# The released spelling of the separator is "seperator".
NAMES: Names = (
    decoder_names("language.model", "language.lm_head")
    | siglip_names("vision")
    | {
        "stem.adaptor.fc1.@": "projector.layers.0.@",
        "stem.adaptor.fc2.@": "projector.layers.2.@",
        "stem.newline": "image_newline",
        "stem.separator": "view_seperator",
    }
)

# Built by the released code and never used in its forward pass.
UNUSED = re.compile(r"vision\.attn_pool\.")


def tensor_rules(model: ModelConfig) -> list[Rule]:
    """A rule for every parameter of the model."""
    return rules(parameters(model), NAMES)


def unused_shapes(model: ModelConfig) -> dict[str, Shape]:
    """Tensors that the released code wants besides the parameters, though its forward pass never reads them."""
    return pool_shapes("vision", model.siglip)


def canonical(name: str) -> str:
    """There is one name for each tensor."""
    return name


def config_json(model: ModelConfig, dtype: str, tokens: dict[str, int]) -> dict:
    """The released config.json.

    Raises:
        CheckpointError: the released code computes something else, and cannot be told.
    """
    _check_fixed(model)
    siglip = model.siglip
    return {
        "architectures": ["DeepseekVLV2ForCausalLM"],
        "model_type": MODEL_TYPES[0],
        "torch_dtype": dtype,
        "image_token_id": model.image_token_id,
        "tie_word_embeddings": False,
        "candidate_resolutions": _resolutions(model),
        "tile_tag": "2D",
        "global_view_pos": "head",
        "vision_config": {
            "model_type": "vision",
            "model_name": f"siglip_so400m_patch{siglip.patch_size}_{siglip.image_size}",
            "image_size": siglip.image_size,
            "patch_size": siglip.patch_size,
            "width": siglip.width,
            "layers": siglip.layers,
            "heads": siglip.heads,
            # The released code rounds the product with the width down.
            "mlp_ratio": ceil(siglip.mlp_width / siglip.width * 1e4) / 1e4,
        },
        "projector_config": {
            "model_type": "mlp_projector",
            "projector_type": "downsample_mlp_gelu",
            "input_dim": siglip.width,
            "n_embed": model.decoder.width,
            "depth": 2,
            "mlp_ratio": 1,
            "downsample_ratio": model.tiling.shuffle,
        },
        "language_config": {**decoder_json(model, tokens), "torch_dtype": dtype},
    }


def processor_json(model: ModelConfig, image_token: str) -> dict[str, dict]:
    """processor_config.json of the released DeepseekVLV2Processor."""
    processor = {
        "processor_class": "DeepseekVLV2Processor",
        "candidate_resolutions": _resolutions(model),
        "patch_size": model.siglip.patch_size,
        "downsample_ratio": model.tiling.shuffle,
        "image_mean": list(model.siglip.pixel_mean),
        "image_std": list(model.siglip.pixel_std),
        "normalize": True,
        "image_token": image_token,
        "pad_token": "<｜▁pad▁｜>",
        "add_special_token": False,
        "sft_format": "deepseek",
        "mask_prompt": True,
        "ignore_id": IGNORE_INDEX,
    }
    return {"processor_config.json": processor}


def model_config(config: Fields, image: Fields, name: str) -> ModelConfig:
    """The shapes that config.json describes.

    Raises:
        CheckpointError: they describe a model that megavl does not compute.
    """
    config.require("tile_tag", "2D", default=None)
    config.require("global_view_pos", "head", default="head")
    projector = config.section("projector_config")
    projector.require("projector_type", "downsample_mlp_gelu", default="downsample_mlp_gelu")
    projector.require("depth", 2, default=2)
    projector.require("mlp_ratio", 1, default=1)
    projector.require("token_pooling", False, default=False)
    decoder = read_decoder(config.section("language_config"))
    siglip = _siglip(config.section("vision_config"), image)
    projector.require("input_dim", siglip.width, default=1152)
    projector.require("n_embed", decoder.width, default=2048)
    candidates = config.get("candidate_resolutions", [[384, 384]])
    tiles = max(width * height for width, height in candidates) // siglip.image_size**2
    model = ModelConfig(
        name=name,
        siglip=siglip,
        sam=None,
        tiling=TilingConfig(max_tiles=tiles, shuffle=projector.get("downsample_ratio", 2)),
        decoder=decoder,
        image_token_id=_placeholder(config, decoder.vocab_size),
        init_std=config.section("language_config").get("initializer_range", 0.02),
    )
    config.require("candidate_resolutions", _resolutions(model), default=[[384, 384]])
    return model


def _check_fixed(model: ModelConfig) -> None:
    """Refuse what differs from the released code where config.json has no field for it."""
    fixed = [
        ("siglip.gelu_approximation", model.siglip.gelu_approximation, "tanh"),
        ("siglip.norm_eps", model.siglip.norm_eps, 1e-6),
        ("tiling.max_images", model.tiling.max_images, 2),
    ]
    if model.decoder.mla is not None:
        fixed.append(("decoder.norm_eps", model.decoder.norm_eps, LATENT_NORM_EPS))
    differing = [f"{name} = {here}, there {there}" for name, here, there in fixed if here != there]
    if differing:
        raise CheckpointError(
            f"the released code of DeepSeek-VL2 has {'; '.join(differing)}, and its config.json cannot say otherwise: "
            "the export would compute something else. Nothing was written"
        )


def _resolutions(model: ModelConfig) -> list[list[int]]:
    """Width and height in pixels of what each grid's tiles make together."""
    size = model.siglip.image_size
    return [[grid.columns * size, grid.rows * size] for grid in Tiling(model).grids]


def _siglip(vision: Fields, image: Fields) -> SiglipConfig:
    """Absent fields have the defaults of the released `VisionEncoderConfig`."""
    width = vision.get("width", 1024)
    return SiglipConfig(
        image_size=vision.get("image_size", 384),
        patch_size=vision.get("patch_size", 16),
        width=width,
        layers=vision.get("layers", 24),
        heads=vision.get("heads", 16),
        mlp_width=int(width * vision.get("mlp_ratio", 4)),
        gelu_approximation="tanh",
        pixel_mean=image.get("image_mean", SiglipConfig().pixel_mean),
        pixel_std=image.get("image_std", SiglipConfig().pixel_std),
    )


def _placeholder(config: Fields, vocab_size: int) -> int:
    id = config.get("image_token_id", _RELEASED.get(vocab_size))
    if id is None:
        raise CheckpointError(
            f"config.json has no image_token_id, and a vocabulary of {vocab_size} is of no released tokenizer: write "
            "the id of <image> there"
        )
    return id
