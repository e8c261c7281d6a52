"""The layout of the released checkpoints of DeepSeek-VL: `multi_modality`, read by DeepSeek's own `deepseek_vl`."""

import re
from typing import TypeVar

from megavl.checkpoint.error import CheckpointError
from megavl.checkpoint.maps.fields import Fields
from megavl.checkpoint.maps.llama import llama_decoder, llama_json, llama_names
from megavl.checkpoint.maps.rule import Names, Rule, Shape, rules
from megavl.checkpoint.maps.siglip_vit import pool_shapes, siglip_names
from megavl.config.model import ModelConfig, SamConfig, SiglipConfig
from megavl.config.parameters import parameters
from megavl.config.tokens import IGNORE_INDEX

MODEL_TYPES = ("multi_modality",)

# The tower shapes that the released code knows by name; it takes them from its own tables, not from config.json.
_SIGLIP_L, _SAM_B = "siglip_large_patch16_384", "sam_b_downsample"
_SAM = "vision_model.vision_tower_high.vision_tower"

# Built by the released code and never used in its forward pass.
UNUSED = re.compile(r"vision_model\.((vision_tower_low\.)?vision_tower\.attn_pool|(high|low)_layer_norm)\.")


def names(hybrid: bool) -> Names:
    """The names of the parameters: the SigLIP tower of the hybrid encoder is `vision_tower_low`."""
    table = {
        "stem.sam.": f"{_SAM}.",
        "stem.sam.patch_embed.@": f"{_SAM}.patch_embed.proj.@",
        "stem.adaptor.high_up_proj.@": "aligner.high_up_proj.@",
        "stem.adaptor.low_up_proj.@": "aligner.low_up_proj.@",
        "stem.adaptor.proj.@": "aligner.layers.1.@",
        "stem.adaptor.fc1.@": "aligner.layers.0.@",
        "stem.adaptor.fc2.@": "aligner.layers.2.@",
    }
    return llama_names("language_model.model", "language_model.lm_head") | siglip_names(_siglip(hybrid)) | table


def tensor_rules(model: ModelConfig) -> list[Rule]:
    """A rule for every parameter of the model."""
    return rules(parameters(model), names(model.sam is not None))


def unused_shapes(model: ModelConfig) -> dict[str, Shape]:
    """Tensors that the released code wants besides the parameters, though its forward pass never reads them."""
    shapes = pool_shapes(_siglip(model.sam is not None), model.siglip)
    if model.sam is not None:
        for norm, width in (("high_layer_norm", model.sam.output_width), ("low_layer_norm", model.siglip.width)):
            shapes |= {f"vision_model.{norm}.{part}": (width,) for part in ("weight", "bias")}
    return shapes


def canonical(name: str) -> str:
    """There is one name for each tensor."""
    return name


def config_json(model: ModelConfig, dtype: str, tokens: dict[str, int]) -> dict:
    """The released config.json. Towers of other shapes than the released code has in its tables get names that it
    does not know, with their shapes beside.

    Raises:
        CheckpointError: the adaptor cannot be written in this layout.
    """
    low = _tower("siglip", _SIGLIP_L, model.siglip, SiglipConfig())
    if model.sam is None:
        vision = {"cls": "CLIPVisionTower", "params": low}
    else:
        if model.sam.output_width != model.siglip.width:
            raise CheckpointError(
                f"the deepseek layout has one width for both towers, and SAM's features have {model.sam.output_width} "
                f"channels, SigLIP's {model.siglip.width}. Nothing was written; use the transformers layout"
            )
        high = _tower("sam", _SAM_B, model.sam, SamConfig()) | {"output_dim": model.sam.output_width}
        # Here the towers normalise, and the image processor does not.
        for cfg, tower in ((high, model.sam), (low, model.siglip)):
            cfg |= {"pixel_mean": list(tower.pixel_mean), "pixel_std": list(tower.pixel_std)}
        low["output_dim"] = model.siglip.width
        vision = {
            "cls": "HybridVisionTower",
            "params": {"concat_type": "tuple", "high_res_cfg": high, "low_res_cfg": low},
        }
    projector = "mlp_gelu" if model.sam is None else "low_high_hybrid_split_mlp_gelu"
    aligner = {
        "depth": 2,
        "input_dim": model.siglip.width,
        "n_embed": model.decoder.width,
        "projector_type": projector,
    }
    return {
        "architectures": ["MultiModalityCausalLM"],
        "model_type": "multi_modality",
        "torch_dtype": dtype,
        "image_token_id": model.image_token_id,
        "tie_word_embeddings": False,
        "vision_config": {"model_type": "vision", **vision},
        "aligner_config": {"model_type": "aligner", "cls": "MlpProjector", "params": aligner},
        "language_config": {**llama_json(model, tokens), "torch_dtype": dtype},
    }


def processor_json(model: ModelConfig, image_token: str) -> dict[str, dict]:
    """preprocessor_config.json and processor_config.json."""
    tower = model.siglip if model.sam is None else model.sam
    image = {
        "image_processor_type": "VLMImageProcessor",
        "processor_class": "VLChatProcessor",
        "image_size": tower.image_size,
        "min_size": 14,
        "image_mean": list(tower.pixel_mean),
        "image_std": list(tower.pixel_std),
        "background_color": [int(channel * 255) for channel in tower.pixel_mean],
        "rescale_factor": 1 / 255,
        "do_normalize": model.sam is None,
    }
    processor = {
        "processor_class": "VLChatProcessor",
        "image_tag": image_token,
        "num_image_tokens": model.tile_features,
        "add_special_token": False,
        "mask_prompt": True,
        "ignore_id": IGNORE_INDEX,
        "sft_format": "deepseek",
    }
    return {"preprocessor_config.json": image, "processor_config.json": processor}


def model_config(config: Fields, image: Fields, name: str) -> ModelConfig:
    """The shapes that config.json describes.

    Raises:
        CheckpointError: they describe a model that megavl does not compute.
    """
    vision, language = config.section("vision_config"), config.section("language_config")
    params, aligner = vision.section("params"), config.section("aligner_config").section("params")
    hybrid = vision.get("cls", "") == "HybridVisionTower"
    aligner.require("depth", 2, default=1)
    aligner.require("projector_type", "low_high_hybrid_split_mlp_gelu" if hybrid else "mlp_gelu", default=None)
    if hybrid:
        params.require("concat_type", "tuple", default="tuple")
        siglip = _read_tower(params.section("low_res_cfg"), _SIGLIP_L, SiglipConfig())
        sam = _read_tower(params.section("high_res_cfg"), _SAM_B, SamConfig())
    else:
        vision.require("cls", "CLIPVisionTower", default=None)
        siglip, sam = _read_tower(params, _SIGLIP_L, SiglipConfig(), normalised_by=image), None
    return ModelConfig(
        name=name,
        siglip=siglip,
        sam=sam,
        decoder=llama_decoder(language),
        # The released processor adds the placeholder as the next id after its 100,015 tokens.
        image_token_id=config.get("image_token_id", 100015),
        init_std=language.get("initializer_range", 0.02),
    )


def _siglip(hybrid: bool) -> str:
    """Root of the SigLIP tower."""
    return "vision_model.vision_tower_low.vision_tower" if hybrid else "vision_model.vision_tower"


_PIXELS = {"pixel_mean", "pixel_std"}
Tower = TypeVar("Tower", SiglipConfig, SamConfig)


def _tower(family: str, known_as: str, tower: Tower, known: Tower) -> dict:
    """Parameters of a CLIPVisionTower."""
    cfg = {"ckpt_path": "", "image_size": tower.image_size, "select_feature": "same", "select_layer": -1}
    if tower.model_dump(exclude=_PIXELS) == known.model_dump(exclude=_PIXELS):
        return cfg | {"model_name": known_as}
    return cfg | {"model_name": f"{family}_megavl", "shape": tower.model_dump(mode="json", exclude=_PIXELS)}


def _read_tower(cfg: Fields, known_as: str, known: Tower, normalised_by: Fields | None = None) -> Tower:
    """A tower from the parameters of its CLIPVisionTower, or from its family's known shape."""
    shape = cfg.get("shape", None)
    if shape is None:
        cfg.require("model_name", known_as, default=None)
        cfg.require("image_size", known.image_size, default=None)
    cfg.require("select_layer", -1, default=-2)
    mean = cfg.get("pixel_mean", known.pixel_mean)
    std = cfg.get("pixel_std", known.pixel_std)
    if normalised_by is not None:
        mean, std = normalised_by.get("image_mean", mean), normalised_by.get("image_std", std)
    return type(known)(**(shape or known.model_dump(exclude=_PIXELS)), pixel_mean=mean, pixel_std=std)
