"""Uses of the ops in a run, for the trial at its start."""

import torch

from megavl.config.run import RunConfig
from megavl.ops.cases import (
    attention_case,
    cross_entropy_case,
    expert_mlp_case,
    grouped_linear_case,
    latent_rotary_case,
    norm_case,
    permutation_case,
    rotary_case,
    router_case,
    swiglu_case,
)
from megavl.ops.trial import Case

_MOST_ROWS_OF_LOGITS = 4096


def cases_of(config: RunConfig) -> dict[str, Case]:
    """By op, the shapes of its costliest use in the decoder on one rank; all ranks have the same."""
    decoder, parallel = config.model.decoder, config.parallel
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    tokens, tp = config.data.seq_len * config.train.micro_batch, parallel.tensor
    stream_tokens = tokens // tp if parallel.sequence else tokens
    heads, kv_heads = decoder.heads // tp, decoder.kv_heads // tp
    if decoder.mla is None:
        attention = (heads, kv_heads, decoder.head_width, decoder.head_width)
        rotary = rotary_case(tokens, heads, kv_heads, decoder.head_width, dtype)
    else:
        mla = decoder.mla
        attention = (heads, heads, mla.key_width, mla.value_width)
        rotary = latent_rotary_case(tokens, heads, mla.nope_width, mla.rope_width, mla.value_width, dtype)
    rows, hidden, experts = tokens, decoder.mlp_width // tp, {}
    if decoder.moe is not None:
        moe, cut = decoder.moe, parallel.expert_width == "cut"
        # Rows of all experts together, if they are chosen equally often. Tensor ranks share the rows or the channels.
        hidden, sent = moe.width // (tp if cut else 1), tokens // (1 if cut else tp)
        rows, here = sent * moe.per_token, moe.experts // parallel.expert
        experts = {
            "router": router_case(stream_tokens, moe.experts, decoder.width, dtype),
            "permutation": permutation_case(sent, moe.per_token, moe.experts, decoder.width, dtype),
            "grouped_linear": grouped_linear_case(rows, here, decoder.width, hidden, dtype),
            "expert_mlp": expert_mlp_case(rows, here, decoder.width, hidden, dtype),
        }
    # The reference of the cross entropy in fp32 takes 20 bytes for each logit; its rows do not depend on one another.
    supervised_tokens = min(tokens, _MOST_ROWS_OF_LOGITS)
    first, second = tokens // 2, tokens // 4  # documents of unequal length, as in a pack
    return experts | {
        "attention": attention_case((first, second, tokens - first - second), *attention, dtype=dtype),
        "rms_norm": norm_case(stream_tokens, decoder.width, decoder.norm_eps, dtype),
        "swiglu": swiglu_case(rows, hidden, dtype),
        "rotary": rotary,
        "cross_entropy": cross_entropy_case(supervised_tokens, decoder.vocab_size // tp, dtype),
    }
