"""Rotary positions against transformers' Llama and DeepSeek-V2."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import apply_rotary_emb
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from megavl.ops.rope import rotate_halves, rotate_pairs, rotation

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
    assert torch.equal(rotate_halves(q, cos, sin), their_q)
    assert torch.equal(rotate_halves(k, cos, sin), their_k)


def test_pairs_equal_deepseek_v2():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(len(POSITIONS), heads, 16, generator=generator) for heads in (4, 1))
    cos, sin = rotation(POSITIONS, 16, 5000.0)
    turns = torch.complex(cos, sin).transpose(0, 1)  # [1, T, width / 2]
    their_q, their_k = apply_rotary_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], turns)  # [1, heads, T, d]
    for ours, theirs in ((rotate_pairs(q, cos, sin), their_q), (rotate_pairs(k, cos, sin), their_k)):
        assert torch.equal(ours, theirs[0].transpose(0, 1))
    assert (rotate_halves(q, cos, sin) - rotate_pairs(q, cos, sin)).abs().max() > 1


@pytest.mark.parametrize("rotate", [rotate_halves, rotate_pairs])
def test_scores_depend_on_distance_alone(rotate):
    q, k = torch.randn(2, 16, generator=torch.Generator().manual_seed(1))

    def score(query_position: int, key_position: int) -> float:
        cos, sin = rotation(torch.tensor([query_position, key_position]), 16, 10000.0)
        turned_q, turned_k = rotate(torch.stack([q, k])[:, None], cos, sin)[:, 0]
        return (turned_q @ turned_k).item()

    assert abs(score(7, 3) - score(107, 103)) < 1e-4  # measured 0; 2.1 and 0.1 at another distance
    assert abs(score(7, 3) - score(7, 4)) > 1e-2


@pytest.mark.parametrize("rotate", [rotate_halves, rotate_pairs])
def test_bfloat16_is_turned_in_fp32(rotate):
    x = torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(2)).bfloat16()
    cos, sin = rotation(torch.tensor([16382, 16383]), 16, 10000.0)
    assert cos.dtype == sin.dtype == torch.float32
    assert torch.equal(rotate(x, cos, sin), rotate(x.float(), cos, sin).bfloat16())
