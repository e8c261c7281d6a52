"""Rotary positions against transformers' Llama."""

import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from megavl.ops.rope import rotate, rotation

POSITIONS = torch.tensor([0, 1, 2, 3, 0, 1, 4095, 16383])


def test_equals_llama():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(len(POSITIONS), heads, 16, generator=generator) for heads in (4, 2))
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=4, rope_parameters={"rope_type": "default", "rope_theta": 5000.0}
    )
    their_cos, their_sin = LlamaRotaryEmbedding(config)(q, POSITIONS[None])
    their_q, their_k = apply_rotary_pos_emb(q, k, their_cos[0], their_sin[0])  # [T, heads, d]: unsqueezed at dim 1
    cos, sin = rotation(POSITIONS, 16, 5000.0)
    assert torch.equal(rotate(q, cos, sin), their_q)
    assert torch.equal(rotate(k, cos, sin), their_k)


def test_scores_depend_on_distance_alone():
    q, k = torch.randn(2, 16, generator=torch.Generator().manual_seed(1))

    def score(query_position: int, key_position: int) -> float:
        cos, sin = rotation(torch.tensor([query_position, key_position]), 16, 10000.0)
        turned_q, turned_k = rotate(torch.stack([q, k])[:, None], cos, sin)[:, 0]
        return (turned_q @ turned_k).item()

    assert abs(score(7, 3) - score(107, 103)) < 1e-4  # measured 0; 2.1 at another distance
    assert abs(score(7, 3) - score(7, 4)) > 1e-2


def test_bfloat16_is_turned_in_fp32():
    x = torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(2)).bfloat16()
    cos, sin = rotation(torch.tensor([16382, 16383]), 16, 10000.0)
    assert cos.dtype == sin.dtype == torch.float32
    assert torch.equal(rotate(x, cos, sin), rotate(x.float(), cos, sin).bfloat16())
