"""The decoder as a Llama, whose names all layouts have and whose configuration those of DeepSeek-VL have."""

from megavl.checkpoint.maps.fields import Fields
from megavl.checkpoint.maps.rule import Names
from megavl.config.model import DecoderConfig, ModelConfig


def llama_names(text: str, head: str) -> Names:
    """The names of its parameters; `text` and `head` are those of the model without its head, and of the head."""
    layer = f"{text}.layers.#"
    names = {
        "stem.embedding.@": f"{text}.embed_tokens.@",
        "blocks.#.attn_norm.@": f"{layer}.input_layernorm.@",
        "blocks.#.mlp_norm.@": f"{layer}.post_attention_layernorm.@",
        "head.norm.@": f"{text}.norm.@",
        "head.proj.@": f"{head}.@",
    }
    names |= {f"blocks.#.attn.{part}_proj.@": f"{layer}.self_attn.{part}_proj.@" for part in "qkvo"}
    return names | {f"blocks.#.mlp.{part}_proj.@": f"{layer}.mlp.{part}_proj.@" for part in ("gate", "up", "down")}


def llama_json(model: ModelConfig, tokens: dict[str, int]) -> dict:
    """The decoder's fields. `tokens`: ids by the names "bos", "eos" and "pad", where known."""
    decoder = model.decoder
    return {
        "model_type": "llama",
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
        "bos_token_id": tokens.get("bos"),
        "eos_token_id": tokens.get("eos"),
        "pad_token_id": tokens.get("pad"),
    }


def llama_decoder(text: Fields) -> DecoderConfig:
    """The decoder of a Llama configuration.

    Raises:
        CheckpointError: it is a Llama that megavl does not compute.
    """
    text.require("model_type", "llama", default="llama")
    text.require("hidden_act", "silu", default="silu")
    text.require("attention_bias", False, default=False)
    text.require("mlp_bias", False, default=False)
    text.require("rope_scaling", None, default=None)
    rope = text.section("rope_parameters")
    rope.require("rope_type", "default", default="default")
    width, heads = text.get("hidden_size", 4096), text.get("num_attention_heads", 32)
    text.require("head_dim", width // heads, default=width // heads)
    return DecoderConfig(
        layers=text.get("num_hidden_layers", 32),
        width=width,
        heads=heads,
        kv_heads=text.get("num_key_value_heads", heads),
        mlp_width=text.get("intermediate_size", 11008),
        vocab_size=text.get("vocab_size", 32000),
        max_positions=text.get("max_position_embeddings", 2048),
        rope_theta=rope.get("rope_theta", text.get("rope_theta", 10000.0)),
        norm_eps=text.get("rms_norm_eps", 1e-6),
    )
