"""The layout of transformers: `deepseek_vl_hybrid` with a SAM tower, `deepseek_vl` without.

The SigLIP tower is written under `model.vision_model.vision_model`, as the published checkpoints have it; newer
versions of transformers name it with one `vision_model` and read both.
"""

import re

from megavl.checkpoint.maps.fields import Fields
from megavl.checkpoint.maps.llama import llama_decoder, llama_json, llama_names
from megavl.checkpoint.maps.rule import Names, Rule, Shape, rules
from megavl.config.model import ModelConfig, SamConfig, SiglipConfig
from megavl.config.parameters import parameters

MODEL_TYPES = ("deepseek_vl_hybrid", "deepseek_vl")

_SIGLIP = "model.vision_model.vision_model"
_SAM = "model.high_res_vision_model.vision_encoder"
_TEXT = "model.language_model"
# SigLIP's by its approximation.
_ACTIVATION = {"none": "gelu", "tanh": "gelu_pytorch_tanh"}

NAMES: Names = llama_names(_TEXT, "lm_head") | {
    "stem.siglip.patch_embed.@": f"{_SIGLIP}.embeddings.patch_embedding.@",
    "stem.siglip.pos_embed": f"{_SIGLIP}.embeddings.position_embedding.weight",
    "stem.siglip.blocks.#.norm1.@": f"{_SIGLIP}.encoder.layers.#.layer_norm1.@",
    "stem.siglip.blocks.#.attn.qkv.@": tuple(f"{_SIGLIP}.encoder.layers.#.self_attn.{part}_proj.@" for part in "qkv"),
    "stem.siglip.blocks.#.attn.proj.@": f"{_SIGLIP}.encoder.layers.#.self_attn.out_proj.@",
    "stem.siglip.blocks.#.norm2.@": f"{_SIGLIP}.encoder.layers.#.layer_norm2.@",
    "stem.siglip.blocks.#.mlp.fc1.@": f"{_SIGLIP}.encoder.layers.#.mlp.fc1.@",
    "stem.siglip.blocks.#.mlp.fc2.@": f"{_SIGLIP}.encoder.layers.#.mlp.fc2.@",
    "stem.siglip.norm.@": f"{_SIGLIP}.post_layernorm.@",
    "stem.sam.patch_embed.@": f"{_SAM}.patch_embed.projection.@",
    "stem.sam.pos_embed": f"{_SAM}.pos_embed",
    "stem.sam.blocks.#.norm1.@": f"{_SAM}.layers.#.layer_norm1.@",
    "stem.sam.blocks.#.attn.qkv.@": f"{_SAM}.layers.#.attn.qkv.@",
    "stem.sam.blocks.#.attn.proj.@": f"{_SAM}.layers.#.attn.proj.@",
    "stem.sam.blocks.#.attn.rel_pos_h": f"{_SAM}.layers.#.attn.rel_pos_h",
    "stem.sam.blocks.#.attn.rel_pos_w": f"{_SAM}.layers.#.attn.rel_pos_w",
    "stem.sam.blocks.#.norm2.@": f"{_SAM}.layers.#.layer_norm2.@",
    "stem.sam.blocks.#.mlp.lin1.@": f"{_SAM}.layers.#.mlp.lin1.@",
    "stem.sam.blocks.#.mlp.lin2.@": f"{_SAM}.layers.#.mlp.lin2.@",
    "stem.sam.neck.0.@": f"{_SAM}.neck.conv1.@",
    "stem.sam.neck.1.@": f"{_SAM}.neck.layer_norm1.@",
    "stem.sam.neck.2.@": f"{_SAM}.neck.conv2.@",
    "stem.sam.neck.3.@": f"{_SAM}.neck.layer_norm2.@",
    "stem.sam.neck_hd.0.@": "model.high_res_vision_neck.conv1.@",
    "stem.sam.neck_hd.1.@": "model.high_res_vision_neck.layer_norm1.@",
    "stem.sam.neck_hd.2.@": "model.high_res_vision_neck.conv2.@",
    "stem.sam.neck_hd.3.@": "model.high_res_vision_neck.layer_norm2.@",
    "stem.sam.downsamples.0.@": "model.high_res_vision_proj.conv1.@",
    "stem.sam.downsamples.1.@": "model.high_res_vision_proj.conv2.@",
    "stem.sam.hd_alpha_downsamples": "model.high_res_vision_alpha",
    "stem.adaptor.high_up_proj.@": "model.aligner.high_res_vision_proj.@",
    "stem.adaptor.low_up_proj.@": "model.aligner.vision_proj.@",
    "stem.adaptor.proj.@": "model.aligner.proj.@",
    "stem.adaptor.fc1.@": "model.aligner.linear1.@",
    "stem.adaptor.fc2.@": "model.aligner.linear2.@",
}

# Of SigLIP's pooling head, which the model never uses, and of a buffer that old versions saved.
UNUSED = re.compile(rf"{re.escape(_SIGLIP)}\.(head\.|embeddings\.position_ids$)")


def tensor_rules(model: ModelConfig) -> list[Rule]:
    """A rule for every parameter of the model."""
    return rules(parameters(model), NAMES, flat=frozenset({"stem.siglip.pos_embed"}))


def unused_shapes(model: ModelConfig) -> dict[str, Shape]:
    """Tensors that the layout wants besides the parameters: none."""
    return {}


def canonical(name: str) -> str:
    """The name that `tensor_rules` knows, whether the tower is nested once or twice."""
    return re.sub(r"^model\.vision_model\.(?!vision_model\.)", f"{_SIGLIP}.", name)


def config_json(model: ModelConfig, dtype: str, tokens: dict[str, int]) -> dict:
    """What transformers builds the model from. `tokens`: ids by the names "bos", "eos" and "pad", where known."""
    hybrid = model.sam is not None
    config = {
        "architectures": [
            "DeepseekVLHybridForConditionalGeneration" if hybrid else "DeepseekVLForConditionalGeneration"
        ],
        "model_type": MODEL_TYPES[0] if hybrid else MODEL_TYPES[1],
        "image_token_id": model.image_token_id,
        # The class ties by default, and would then drop lm_head.weight when it saves.
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "text_config": llama_json(model, tokens),
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": model.siglip.width,
            "intermediate_size": model.siglip.mlp_width,
            "num_hidden_layers": model.siglip.layers,
            "num_attention_heads": model.siglip.heads,
            "image_size": model.siglip.image_size,
            "patch_size": model.siglip.patch_size,
            "layer_norm_eps": model.siglip.norm_eps,
            "hidden_act": _ACTIVATION[model.siglip.gelu_approximation],
            "vision_use_head": False,
        },
    }
    if hybrid:
        config["high_res_vision_config"] = {
            "model_type": "sam_vision_model",
            "hidden_size": model.sam.width,
            "mlp_dim": model.sam.mlp_width,
            "num_hidden_layers": model.sam.layers,
            "num_attention_heads": model.sam.heads,
            "image_size": model.sam.image_size,
            "patch_size": model.sam.patch_size,
            "window_size": model.sam.window,
            "global_attn_indexes": list(model.sam.global_layers),
            "output_channels": model.sam.neck_width,
            "layer_norm_eps": model.sam.norm_eps,
            "hidden_act": "gelu",
        }
    return config


def processor_json(model: ModelConfig, image_token: str) -> dict[str, dict]:
    """preprocessor_config.json and processor_config.json; the tokenizer's files name `image_token`."""
    hybrid = model.sam is not None
    family = "DeepseekVLHybrid" if hybrid else "DeepseekVL"
    image = {
        "image_processor_type": f"{family}ImageProcessor",
        "processor_class": f"{family}Processor",
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_pad": True,
        "min_size": 14,
        "rescale_factor": 1 / 255,
        "size": {"height": model.siglip.image_size, "width": model.siglip.image_size},
        # Pillow's numbers: the hybrid's SigLIP image is a bilinear resize of SAM's, all else is bicubic.
        "resample": 2 if hybrid else 3,
        "image_mean": list(model.siglip.pixel_mean),
        "image_std": list(model.siglip.pixel_std),
    }
    if hybrid:
        image |= {
            "high_res_size": {"height": model.sam.image_size, "width": model.sam.image_size},
            "high_res_resample": 3,
            "high_res_image_mean": list(model.sam.pixel_mean),
            "high_res_image_std": list(model.sam.pixel_std),
        }
    processor = {"processor_class": f"{family}Processor", "num_image_tokens": model.tile_features}
    return {"preprocessor_config.json": image, "processor_config.json": processor}


def model_config(config: Fields, image: Fields, name: str) -> ModelConfig:
    """The shapes that config.json and preprocessor_config.json describe. Absent fields have the defaults of the classes
    of transformers, which it does not always write.

    Raises:
        CheckpointError: they describe a model that megavl does not compute.
    """
    hybrid = config.get("model_type", "") == MODEL_TYPES[0]
    vision = config.section("vision_config")
    approximations = {activation: name for name, activation in _ACTIVATION.items()}
    siglip = SiglipConfig(
        image_size=vision.get("image_size", 224),
        patch_size=vision.get("patch_size", 16),
        width=vision.get("hidden_size", 768),
        layers=vision.get("num_hidden_layers", 12),
        heads=vision.get("num_attention_heads", 12),
        mlp_width=vision.get("intermediate_size", 3072),
        gelu_approximation=vision.choose("hidden_act", approximations, default="gelu_pytorch_tanh"),
        norm_eps=vision.get("layer_norm_eps", 1e-6),
        pixel_mean=image.get("image_mean", SiglipConfig().pixel_mean),
        pixel_std=image.get("image_std", SiglipConfig().pixel_std),
    )
    return ModelConfig(
        name=name,
        siglip=siglip,
        sam=_sam(config.section("high_res_vision_config"), image) if hybrid else None,
        decoder=llama_decoder(config.section("text_config")),
        image_token_id=config.get("image_token_id", 100015),
        init_std=config.section("text_config").get("initializer_range", 0.02),
    )


def _sam(vision: Fields, image: Fields) -> SamConfig:
    vision.require("hidden_act", "gelu", default="gelu")
    vision.require("use_rel_pos", True, default=True)
    vision.require("use_abs_pos", True, default=True)
    vision.require("qkv_bias", True, default=True)
    width = vision.get("hidden_size", 768)
    return SamConfig(
        image_size=vision.get("image_size", 1024),
        patch_size=vision.get("patch_size", 16),
        width=width,
        layers=vision.get("num_hidden_layers", 12),
        heads=vision.get("num_attention_heads", 12),
        mlp_width=vision.get("mlp_dim", int(width * vision.get("mlp_ratio", 4.0))),
        window=vision.get("window_size", 14),
        global_layers=vision.get("global_attn_indexes", (2, 5, 8, 11)),
        neck_width=vision.get("output_channels", 256),
        norm_eps=vision.get("layer_norm_eps", 1e-6),
        pixel_mean=image.get("high_res_image_mean", SamConfig().pixel_mean),
        pixel_std=image.get("high_res_image_std", SamConfig().pixel_std),
    )
