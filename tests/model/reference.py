"""transformers' DeepSeek-VL models of a ModelConfig, and their tensors under megavl's names."""

import torch
from torch import Tensor, nn
from transformers import (
    DeepseekVLConfig,
    DeepseekVLForConditionalGeneration,
    DeepseekVLHybridConfig,
    DeepseekVLHybridForConditionalGeneration,
)
from transformers.initialization import no_init_weights

from megavl.config.model import ModelConfig


def build(config: ModelConfig, attention: str = "eager") -> nn.Module:
    """The same model in transformers. Its weights have no values yet: `tiny.randomise` gives them."""
    with no_init_weights():
        return _build(config, attention)


def _build(config: ModelConfig, attention: str) -> nn.Module:
    decoder, siglip, sam = config.decoder, config.siglip, config.sam
    common = {
        "text_config": {
            "model_type": "llama",
            "hidden_size": decoder.width,
            "intermediate_size": decoder.mlp_width,
            "num_hidden_layers": decoder.layers,
            "num_attention_heads": decoder.heads,
            "num_key_value_heads": decoder.kv_heads,
            "vocab_size": decoder.vocab_size,
            "max_position_embeddings": decoder.max_positions,
            "rope_parameters": {"rope_type": "default", "rope_theta": decoder.rope_theta},
            "rms_norm_eps": decoder.norm_eps,
            "attn_implementation": attention,
        },
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": siglip.width,
            "intermediate_size": siglip.mlp_width,
            "num_hidden_layers": siglip.layers,
            "num_attention_heads": siglip.heads,
            "image_size": siglip.image_size,
            "patch_size": siglip.patch_size,
            "layer_norm_eps": siglip.norm_eps,
            "hidden_act": "gelu",
            "vision_use_head": False,
            "attn_implementation": attention,
        },
        "image_token_id": config.image_token_id,
        "tie_word_embeddings": False,
        "attn_implementation": attention,
    }
    if sam is None:
        return DeepseekVLForConditionalGeneration(DeepseekVLConfig(**common)).eval()
    high_res = {
        "model_type": "sam_vision_model",
        "hidden_size": sam.width,
        "mlp_dim": sam.mlp_width,
        "num_hidden_layers": sam.layers,
        "num_attention_heads": sam.heads,
        "image_size": sam.image_size,
        "patch_size": sam.patch_size,
        "layer_norm_eps": sam.norm_eps,
        "window_size": sam.window,
        "global_attn_indexes": list(sam.global_layers),
        "output_channels": sam.neck_width,
        "attn_implementation": attention,
    }
    return DeepseekVLHybridForConditionalGeneration(
        DeepseekVLHybridConfig(high_res_vision_config=high_res, **common)
    ).eval()


def translate(config: ModelConfig, theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' tensors (weights, or gradients of them) under megavl's names. Every tensor is used exactly once."""
    left = dict(theirs)

    def take(name: str) -> Tensor:
        return left.pop(name)

    ours = {
        "stem.embedding.weight": take("model.language_model.embed_tokens.weight"),
        "head.norm.weight": take("model.language_model.norm.weight"),
        "head.proj.weight": take("lm_head.weight"),
    }

    def both(mine: str, their: str) -> None:
        for leaf in ("weight", "bias"):
            ours[f"{mine}.{leaf}"] = take(f"{their}.{leaf}")

    for i in range(config.decoder.layers):
        mine, their = f"blocks.{i}", f"model.language_model.layers.{i}"
        ours[f"{mine}.attn_norm.weight"] = take(f"{their}.input_layernorm.weight")
        ours[f"{mine}.mlp_norm.weight"] = take(f"{their}.post_attention_layernorm.weight")
        for leaf in ("q_proj", "k_proj", "v_proj", "o_proj"):
            ours[f"{mine}.attn.{leaf}.weight"] = take(f"{their}.self_attn.{leaf}.weight")
        for leaf in ("gate_proj", "up_proj", "down_proj"):
            ours[f"{mine}.mlp.{leaf}.weight"] = take(f"{their}.mlp.{leaf}.weight")

    mine, their = "stem.siglip", "model.vision_model"
    both(f"{mine}.patch_embed", f"{their}.embeddings.patch_embedding")
    ours[f"{mine}.pos_embed"] = take(f"{their}.embeddings.position_embedding.weight").unsqueeze(0)
    both(f"{mine}.norm", f"{their}.post_layernorm")
    for i in range(config.siglip.layers):
        mine, their = f"stem.siglip.blocks.{i}", f"model.vision_model.encoder.layers.{i}"
        both(f"{mine}.norm1", f"{their}.layer_norm1")
        both(f"{mine}.norm2", f"{their}.layer_norm2")
        both(f"{mine}.attn.proj", f"{their}.self_attn.out_proj")
        both(f"{mine}.mlp.fc1", f"{their}.mlp.fc1")
        both(f"{mine}.mlp.fc2", f"{their}.mlp.fc2")
        for leaf in ("weight", "bias"):
            parts = [take(f"{their}.self_attn.{part}_proj.{leaf}") for part in "qkv"]
            ours[f"{mine}.attn.qkv.{leaf}"] = torch.cat(parts)

    if config.sam is None:
        both("stem.adaptor.fc1", "model.aligner.linear1")
        both("stem.adaptor.fc2", "model.aligner.linear2")
        assert not left
        return ours

    both("stem.adaptor.high_up_proj", "model.aligner.high_res_vision_proj")
    both("stem.adaptor.low_up_proj", "model.aligner.vision_proj")
    both("stem.adaptor.proj", "model.aligner.proj")
    mine, their = "stem.sam", "model.high_res_vision_model.vision_encoder"
    both(f"{mine}.patch_embed", f"{their}.patch_embed.projection")
    ours[f"{mine}.pos_embed"] = take(f"{their}.pos_embed")
    ours[f"{mine}.hd_alpha_downsamples"] = take("model.high_res_vision_alpha")
    for i in range(2):
        ours[f"{mine}.downsamples.{i}.weight"] = take(f"model.high_res_vision_proj.conv{i + 1}.weight")
    for neck, source in (("neck", f"{their}.neck"), ("neck_hd", "model.high_res_vision_neck")):
        for i in range(2):
            ours[f"{mine}.{neck}.{2 * i}.weight"] = take(f"{source}.conv{i + 1}.weight")
            both(f"{mine}.{neck}.{2 * i + 1}", f"{source}.layer_norm{i + 1}")
    for i in range(config.sam.layers):
        block, source = f"{mine}.blocks.{i}", f"{their}.layers.{i}"
        both(f"{block}.norm1", f"{source}.layer_norm1")
        both(f"{block}.norm2", f"{source}.layer_norm2")
        for part in ("attn.qkv", "attn.proj", "mlp.lin1", "mlp.lin2"):
            both(f"{block}.{part}", f"{source}.{part}")
        for part in ("attn.rel_pos_h", "attn.rel_pos_w"):
            ours[f"{block}.{part}"] = take(f"{source}.{part}")
    assert not left
    return ours


def image_features(model: nn.Module, pixels: dict[str, Tensor]) -> dict[str, Tensor]:
    """Features of each tower [I, image_tokens, W] and the adaptor's output [I, image_tokens, D]."""
    if "sam" not in pixels:
        out = model.model.get_image_features(pixels["siglip"], return_dict=True)
        return {"siglip": out.last_hidden_state, "adaptor": out.pooler_output}
    out = model.model.get_image_features(pixels["siglip"], pixels["sam"], return_dict=True)
    return {
        "siglip": out.last_hidden_state,
        "sam": out.high_res_vision_last_hidden_state,
        "adaptor": out.pooler_output,
    }


def logits(model: nn.Module, tokens: Tensor, pixels: dict[str, Tensor]) -> Tensor:
    """[T, V] of one document: tokens int64 [T] with the images [I, 3, S, S] of its placeholders, I may be 0."""
    images = {"pixel_values": pixels["siglip"], "high_res_pixel_values": pixels.get("sam")}
    given = {name: value for name, value in images.items() if value is not None and len(value)}
    return model(input_ids=tokens[None], use_cache=False, **given).logits[0]
