"""The decoder as DeepSeek-VL2 configures it: `DeepseekV2Config` and `modeling_deepseek.py` of the released code."""

from megavl.checkpoint.maps.fields import Fields
from megavl.checkpoint.maps.llama import llama_names
from megavl.checkpoint.maps.rule import Names
from megavl.config.model import DecoderConfig, MlaConfig, ModelConfig, MoeConfig

# How the released code selects experts, by the function that scores them.
_SELECTION = {"softmax": "greedy", "sigmoid": "noaux_tc"}
# Of the norm of the latent in the released code, which config.json does not set.
LATENT_NORM_EPS = 1e-6


def decoder_names(text: str, head: str) -> Names:
    """The names of its parameters; `text` and `head` are those of the model without its head, and of the head."""
    attention, mlp = f"{text}.layers.#.self_attn", f"{text}.layers.#.mlp"
    names = {
        "blocks.#.attn.kv_down_proj.@": f"{attention}.kv_a_proj_with_mqa.@",
        "blocks.#.attn.kv_norm.@": f"{attention}.kv_a_layernorm.@",
        "blocks.#.attn.kv_up_proj.@": f"{attention}.kv_b_proj.@",
        "blocks.#.mlp.router.weight": f"{mlp}.gate.weight",
        "blocks.#.mlp.router.bias": f"{mlp}.gate.e_score_correction_bias",
    }
    for part in ("gate_proj", "up_proj", "down_proj"):
        names[f"blocks.#.mlp.shared.{part}.@"] = f"{mlp}.shared_experts.{part}.@"
        names[f"blocks.#.mlp.experts.{part}"] = f"{mlp}.experts.*.{part}.weight"
    return llama_names(text, head) | names


def decoder_json(model: ModelConfig, tokens: dict[str, int]) -> dict:
    """The decoder's fields. `tokens`: ids by the names "bos", "eos" and "pad", where known."""
    decoder, mla, moe = model.decoder, model.decoder.mla, model.decoder.moe
    fields = {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "hidden_size": decoder.width,
        "intermediate_size": decoder.mlp_width,
        "num_hidden_layers": decoder.layers,
        "num_attention_heads": decoder.heads,
        "num_key_value_heads": decoder.kv_heads,
        "vocab_size": decoder.vocab_size,
        "max_position_embeddings": decoder.max_positions,
        "rope_theta": decoder.rope_theta,
        "rms_norm_eps": decoder.norm_eps,
        "hidden_act": "silu",
        "initializer_range": model.init_std,
        "tie_word_embeddings": False,
        "use_mla": mla is not None,
        "q_lora_rank": None,
        "kv_lora_rank": mla.kv_rank if mla else None,
        "qk_nope_head_dim": mla.nope_width if mla else 0,
        "qk_rope_head_dim": mla.rope_width if mla else 0,
        "v_head_dim": mla.value_width if mla else 0,
        "bos_token_id": tokens.get("bos"),
        "eos_token_id": tokens.get("eos"),
        "pad_token_id": tokens.get("pad"),
    }
    if moe is None:
        return fields | {"n_routed_experts": None, "n_shared_experts": None}
    return fields | {
        "n_routed_experts": moe.experts,
        "n_shared_experts": moe.shared,
        "num_experts_per_tok": moe.per_token,
        "moe_intermediate_size": moe.width,
        "moe_layer_freq": 1,
        "first_k_dense_replace": moe.dense_layers,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": _SELECTION[moe.router],
        "scoring_func": moe.router,
        "norm_topk_prob": moe.normalise,
        "routed_scaling_factor": moe.scale,
    }


def read_decoder(text: Fields) -> DecoderConfig:
    """The decoder of these fields; absent ones have the defaults of the released `DeepseekV2Config`.

    Raises:
        CheckpointError: they describe one that megavl does not compute.
    """
    text.require("hidden_act", "silu", default="silu")
    text.require("attention_bias", False, default=False)
    text.require("rope_scaling", None, default=None)
    width, heads = text.get("hidden_size", 4096), text.get("num_attention_heads", 32)
    mla = _read_mla(text) if text.get("use_mla", True) else None
    return DecoderConfig(
        layers=text.get("num_hidden_layers", 30),
        width=width,
        heads=heads,
        kv_heads=text.get("num_key_value_heads", 32) if mla is None else heads,
        mlp_width=text.get("intermediate_size", 11008),
        vocab_size=text.get("vocab_size", 102400),
        max_positions=text.get("max_position_embeddings", 2048),
        rope_theta=text.get("rope_theta", 10000.0),
        norm_eps=text.get("rms_norm_eps", 1e-6),
        mla=mla,
        moe=_read_moe(text),
    )


def _read_mla(text: Fields) -> MlaConfig:
    # Null means that queries are not compressed; an absent field that they are, but those who write it write null.
    text.require("q_lora_rank", None, default=None)
    text.require("rms_norm_eps", LATENT_NORM_EPS, default=1e-6)
    return MlaConfig(
        kv_rank=text.get("kv_lora_rank", 512),
        nope_width=text.get("qk_nope_head_dim", 128),
        rope_width=text.get("qk_rope_head_dim", 64),
        value_width=text.get("v_head_dim", 128),
    )


def _read_moe(text: Fields) -> MoeConfig | None:
    experts = text.get("n_routed_experts", None)
    if experts is None:
        return None
    router = text.choose("scoring_func", {name: name for name in _SELECTION}, default="softmax")
    text.require("moe_layer_freq", 1, default=1)
    text.require("topk_group", 1, default=1)
    text.require("n_group", 1, default=1)
    text.require("topk_method", _SELECTION[router], default="greedy")
    return MoeConfig(
        experts=experts,
        per_token=text.get("num_experts_per_tok", None),
        shared=text.get("n_shared_experts", None),
        width=text.get("moe_intermediate_size", 1407),
        dense_layers=text.get("first_k_dense_replace", 0),
        router=router,
        normalise=text.get("norm_topk_prob", False),
        scale=text.get("routed_scaling_factor", 1.0),
    )
