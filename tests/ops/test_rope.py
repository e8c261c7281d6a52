"""Rotary positions against transformers' Llama and DeepSeek-V2."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import apply_rotary_emb
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from megavl.ops.rope import rotary_tables, rotate_halves, rotate_latent

POSITIONS = torch.tensor([0, 1, 2, 3, 0, 1, 4095, 16383])


def test_equals_llama():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(len(POSITIONS), heads, 16, generator=generator) for heads in (4, 2))
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=4, rope_parameters={"rope_type": "default", "rope_theta": 5000.0}
    )
    their_cos, their_sin = LlamaRotaryEmbedding(config)(q, POSITIONS[None])
    their_q, their_k = apply_rotary_pos_emb(q, k, their_cos[0], their_sin[0])  # [T, heads, d]: unsqueezed at dim 1
    cos, sin = rotary_tables(POSITIONS, 16, 5000.0)
    ours_q, ours_k = rotate_halves(q, k, cos, sin)
    for our, their in ((ours_q, their_q), (ours_k, their_k)):
        assert (our - their).abs().max() < 5e-7  # measured 2.4e-7: the sum of two products is rounded once


NOPE, VALUE = 6, 5


def latent(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The positioned channels of `rotate_latent`: q [T, H, d], k [T, 1, d] -> [T, H, d] each."""
    q = torch.cat((q.new_zeros(*q.shape[:2], NOPE), q), -1)
    q, k, _ = rotate_latent(q, q.new_zeros(*q.shape[:2], NOPE + VALUE), k, cos, sin)
    return q[..., NOPE:], k[..., NOPE:]


def test_pairs_equal_deepseek_v2():
    generator = torch.Generator().manual_seed(0)
    q, kv, k_rope = (
        torch.randn(len(POSITIONS), heads, width, generator=generator)
        for heads, width in ((4, NOPE + 16), (4, NOPE + VALUE), (1, 16))
    )
    cos, sin = rotary_tables(POSITIONS, 16, 5000.0)
    turns = torch.complex(cos, sin).transpose(0, 1)  # [1, T, width / 2]
    # [1, heads, T, d]
    theirs = apply_rotary_emb(q[..., NOPE:].transpose(0, 1)[None], k_rope.transpose(0, 1)[None], turns)
    their_q, their_k = (each[0].transpose(0, 1) for each in theirs)
    ours_q, ours_k, v = rotate_latent(q, kv, k_rope, cos, sin)
    for ours, theirs in ((ours_q, their_q), (ours_k, their_k.expand(-1, 4, -1))):
        assert (ours[..., NOPE:] - theirs).abs().max() < 5e-7  # measured 2.4e-7, as above
    assert torch.equal(ours_q[..., :NOPE], q[..., :NOPE]) and torch.equal(ours_k[..., :NOPE], kv[..., :NOPE])
    assert torch.equal(v, kv[..., NOPE:])
    assert (rotate_halves(q[..., NOPE:], k_rope, cos, sin)[0] - their_q).abs().max() > 1


@pytest.mark.parametrize("rotate", [rotate_halves, latent])
def test_scores_depend_on_distance_alone(rotate):
    q, k = torch.randn(2, 16, generator=torch.Generator().manual_seed(1))

    def score(query_position: int, key_position: int) -> float:
        cos, sin = rotary_tables(torch.tensor([query_position, key_position]), 16, 10000.0)
        rotated_q, rotated_k = rotate(q.expand(2, 1, 16), k.expand(2, 1, 16), cos, sin)  # [2, 1, 16] each
        return (rotated_q[0, 0] @ rotated_k[1, 0]).item()

    assert abs(score(7, 3) - score(107, 103)) < 1e-4  # measured 0; 2.1 and 0.1 at another distance
    assert abs(score(7, 3) - score(7, 4)) > 1e-2


@pytest.mark.parametrize("rotate", [rotate_halves, latent])
def test_bfloat16_is_rotated_in_fp32(rotate):
    generator = torch.Generator().manual_seed(2)
    q, k = (torch.randn(2, heads, 16, generator=generator).bfloat16() for heads in (3, 1))
    cos, sin = rotary_tables(torch.tensor([16382, 16383]), 16, 10000.0)
    assert cos.dtype == sin.dtype == torch.float32
    for ours, exact in zip(rotate(q, k, cos, sin), rotate(q.float(), k.float(), cos, sin), strict=True):
        assert torch.equal(ours, exact.bfloat16())
