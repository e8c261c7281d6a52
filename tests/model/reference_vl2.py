"""DeepSeek-VL2 of transformers' parts, since it has no such model: its SigLIP and the decoders of the same shapes as
VL2's. What lies between them is computed here in the plainest way, tile by tile and row by row.

Decoders: deepseek_v2 (latent attention, softmax router), deepseek_v3 (latent attention, sigmoid router with a bias) and
the text model of deepseek_ocr2 (ordinary attention, softmax router).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.initialization import no_init_weights
from transformers.models.deepseek_ocr2.configuration_deepseek_ocr2 import DeepseekOcr2TextConfig
from transformers.models.deepseek_ocr2.modeling_deepseek_ocr2 import DeepseekOcr2TextModel

from megavl.config.model import DecoderConfig, ModelConfig
from megavl.config.tiles import Grid


class _Ocr2Text(nn.Module):
    """The text model of deepseek_ocr2 with a head, which transformers has only behind its vision part."""

    def __init__(self, config: DeepseekOcr2TextConfig):
        super().__init__()
        self.model = DeepseekOcr2TextModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        return self.lm_head(self.model(inputs_embeds=inputs_embeds, use_cache=False).last_hidden_state)


class Reference(nn.Module):
    """The whole model on one document at a time."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        width, side = config.decoder.width, config.tiling.shuffle
        self.side = side
        self.image_token_id = config.image_token_id
        with no_init_weights():
            self.vision = SiglipVisionModel(_vision_config(config)).eval()
            self.language = _language(config.decoder).eval()
        self.fc1 = nn.Linear(config.siglip.width * side**2, width)
        self.fc2 = nn.Linear(width, width)
        self.newline, self.separator = nn.Parameter(torch.empty(width)), nn.Parameter(torch.empty(width))

    def features(self, pixels: Tensor) -> Tensor:
        """[tiles, 3, S, S] -> [tiles, h, h, D]: the patches of each tile as an image of as many channels, of which
        `F.unfold` cuts the squares."""
        found = []
        for tile in self.vision(pixel_values=pixels).last_hidden_state:  # [G * G, W]
            grid = int(len(tile) ** 0.5)
            image = tile.T.reshape(1, -1, grid, grid)
            missing = -grid % self.side
            squares = F.unfold(F.pad(image, (0, missing, 0, missing)), self.side, stride=self.side)[0].T
            found.append(self.fc2(F.gelu(self.fc1(squares))))  # [h * h, D]
        side = (grid + missing) // self.side
        return torch.stack(found).unflatten(1, (side, side))

    def embed(self, tokens: Tensor, pixels: Tensor, grids: Sequence[Grid]) -> Tensor:
        """[T] -> [T, D]: the words' embeddings, and the images' rows in the places of the placeholders."""
        words = self.language.model.embed_tokens(tokens)
        if not grids:
            return words
        rows, tiles = [], list(self.features(pixels))  # each [h, h, D]
        for grid in grids:
            for line in tiles.pop(0):
                rows += [*line, self.newline]
            rows.append(self.separator)
            local = [[tiles.pop(0) for _ in range(grid.columns)] for _ in range(grid.rows)]
            for across in local:
                for index in range(len(across[0])):
                    rows += [feature for tile in across for feature in tile[index]] + [self.newline]
        assert not tiles
        images = iter(rows)
        return torch.stack(
            [next(images) if token == self.image_token_id else word for token, word in zip(tokens, words, strict=True)]
        )

    def forward(self, tokens: Tensor, pixels: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Logits [T, V] of one document."""
        h = self.embed(tokens, pixels, grids)[None]
        if isinstance(self.language, _Ocr2Text):
            return self.language(h)[0]
        return self.language(inputs_embeds=h, use_cache=False).logits[0]


def _vision_config(config: ModelConfig) -> SiglipVisionConfig:
    siglip = config.siglip
    return SiglipVisionConfig(
        hidden_size=siglip.width,
        intermediate_size=siglip.mlp_width,
        num_hidden_layers=siglip.layers,
        num_attention_heads=siglip.heads,
        image_size=siglip.image_size,
        patch_size=siglip.patch_size,
        layer_norm_eps=siglip.norm_eps,
        hidden_act="gelu_pytorch_tanh",
        vision_use_head=False,
        attn_implementation="eager",
    )


def _language(decoder: DecoderConfig) -> nn.Module:
    moe, mla = decoder.moe, decoder.mla
    common = {
        "hidden_size": decoder.width,
        "intermediate_size": decoder.mlp_width,
        "num_hidden_layers": decoder.layers,
        "num_attention_heads": decoder.heads,
        "num_key_value_heads": decoder.kv_heads,
        "vocab_size": decoder.vocab_size,
        "max_position_embeddings": decoder.max_positions,
        "rope_parameters": {"rope_type": "default", "rope_theta": decoder.rope_theta},
        "rms_norm_eps": decoder.norm_eps,
        "n_routed_experts": moe.experts,
        "n_shared_experts": moe.shared,
        "num_experts_per_tok": moe.per_token,
        "moe_intermediate_size": moe.width,
        "routed_scaling_factor": moe.scale,
        "attn_implementation": "eager",
        "experts_implementation": "eager",
        "pad_token_id": None,
    }
    if mla is None:
        dense = ["dense"] * moe.dense_layers + ["sparse"] * (decoder.layers - moe.dense_layers)
        return _Ocr2Text(DeepseekOcr2TextConfig(mlp_layer_types=dense, **common))
    common |= {
        "first_k_dense_replace": moe.dense_layers,
        "kv_lora_rank": mla.kv_rank,
        "q_lora_rank": None,
        "qk_nope_head_dim": mla.nope_width,
        "qk_rope_head_dim": mla.rope_width,
        "v_head_dim": mla.value_width,
        "norm_topk_prob": moe.normalise,
    }
    if moe.router == "softmax":
        return DeepseekV2ForCausalLM(DeepseekV2Config(topk_method="greedy", **common))
    return DeepseekV3ForCausalLM(DeepseekV3Config(n_group=1, topk_group=1, **common))


def translate(config: ModelConfig, theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of `Reference` (weights, or gradients of them) under megavl's names. Each is used once."""
    left = dict(theirs)
    ours = {f"stem.{name}": left.pop(name) for name in ("newline", "separator")}

    def move(mine: str, their: str, *leaves: str) -> None:
        for leaf in leaves:
            if f"{their}.{leaf}" in left:
                ours[f"{mine}.{leaf}"] = left.pop(f"{their}.{leaf}")

    move("stem.adaptor.fc1", "fc1", "weight", "bias")
    move("stem.adaptor.fc2", "fc2", "weight", "bias")
    move("stem.embedding", "language.model.embed_tokens", "weight")
    move("head.norm", "language.model.norm", "weight")
    move("head.proj", "language.lm_head", "weight")
    for i in range(config.decoder.layers):
        mine, their = f"blocks.{i}", f"language.model.layers.{i}"
        move(f"{mine}.attn_norm", f"{their}.input_layernorm", "weight")
        move(f"{mine}.mlp_norm", f"{their}.post_attention_layernorm", "weight")
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            move(f"{mine}.attn.{part}", f"{their}.self_attn.{part}", "weight")
        for part, name in (
            ("kv_down_proj", "kv_a_proj_with_mqa"),
            ("kv_norm", "kv_a_layernorm"),
            ("kv_up_proj", "kv_b_proj"),
        ):
            move(f"{mine}.attn.{part}", f"{their}.self_attn.{name}", "weight")
        for part in ("gate_proj", "up_proj", "down_proj"):
            move(f"{mine}.mlp.{part}", f"{their}.mlp.{part}", "weight")
            move(f"{mine}.mlp.shared.{part}", f"{their}.mlp.shared_experts.{part}", "weight")
        if config.decoder.has_experts(i):
            move(f"{mine}.mlp.router", f"{their}.mlp.gate", "weight")
            if f"{their}.mlp.gate.e_score_correction_bias" in left:
                ours[f"{mine}.mlp.router.bias"] = left.pop(f"{their}.mlp.gate.e_score_correction_bias")
            gate, up = left.pop(f"{their}.mlp.experts.gate_up_proj").chunk(2, dim=1)  # [E, F, D] each
            ours[f"{mine}.mlp.experts.gate_proj"], ours[f"{mine}.mlp.experts.up_proj"] = gate, up
            move(f"{mine}.mlp.experts", f"{their}.mlp.experts", "down_proj")

    mine, their = "stem.siglip", "vision"
    move(f"{mine}.patch_embed", f"{their}.embeddings.patch_embedding", "weight", "bias")
    ours[f"{mine}.pos_embed"] = left.pop(f"{their}.embeddings.position_embedding.weight").unsqueeze(0)
    move(f"{mine}.norm", f"{their}.post_layernorm", "weight", "bias")
    for i in range(config.siglip.layers):
        mine, their = f"stem.siglip.blocks.{i}", f"vision.encoder.layers.{i}"
        for part, name in (
            ("norm1", "layer_norm1"),
            ("norm2", "layer_norm2"),
            ("attn.proj", "self_attn.out_proj"),
            ("mlp.fc1", "mlp.fc1"),
            ("mlp.fc2", "mlp.fc2"),
        ):
            move(f"{mine}.{part}", f"{their}.{name}", "weight", "bias")
        for leaf in ("weight", "bias"):
            ours[f"{mine}.attn.qkv.{leaf}"] = torch.cat(
                [left.pop(f"{their}.self_attn.{part}_proj.{leaf}") for part in "qkv"]
            )
    assert not left, left.keys()
    return ours
