"""Uses of the ops in a run, for the trial at its start."""

import torch

from megavl.config.run import RunConfig
from megavl.ops.cases import cross_entropy_case, norm_case, rotary_case, swiglu_case
from megavl.ops.trial import Case

_MOST_ROWS_OF_LOGITS = 4096


def cases_of(config: RunConfig) -> dict[str, Case]:
    """By op, the shapes of its costliest use in the decoder on one rank; all ranks have the same."""
    decoder, parallel = config.model.decoder, config.parallel
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    tokens, tp = config.data.seq_len * config.train.micro_batch, parallel.tensor
    stream_tokens = tokens // tp if parallel.sequence else tokens
    heads, kv_heads = decoder.heads // tp, decoder.kv_heads // tp
    rotary = (heads, kv_heads, decoder.head_width) if decoder.mla is None else (heads, 1, decoder.mla.rope_width)
    rows, hidden = tokens, decoder.mlp_width // tp
    if decoder.moe is not None:
        # Rows of all experts together, if they are chosen equally often. Tensor ranks share the rows or the channels.
        hidden = decoder.moe.width // (tp if parallel.expert_width == "cut" else 1)
        rows = tokens * decoder.moe.per_token // (1 if parallel.expert_width == "cut" else tp)
    # The reference of the cross entropy in fp32 takes 20 bytes for each logit; its rows do not depend on one another.
    supervised_tokens = min(tokens, _MOST_ROWS_OF_LOGITS)
    return {
        "rms_norm": norm_case(stream_tokens, decoder.width, decoder.norm_eps, dtype),
        "swiglu": swiglu_case(rows, hidden, dtype),
        "rotary": rotary_case(tokens, *rotary, pairs=decoder.mla is not None, dtype=dtype),
        "cross_entropy": cross_entropy_case(supervised_tokens, decoder.vocab_size // tp, dtype),
    }
