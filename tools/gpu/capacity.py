"""Number of blocks of a model that fit the free memory."""

from dataclasses import dataclass

from megavl.config.run import RunConfig
from megavl.plan.cost import item_parameters

# bf16 parameter 2, fp32 gradient 4, fp32 master 4, Adam's moments 8.
_TRAINED_BYTES, _FROZEN_BYTES = 18, 2
# Activations of a block kept for its backward pass, bytes for each token and channel: of the residual stream (norms in
# fp32, projections), of a feed-forward layer (gate, up, their product), of the rows sent to routed experts.
_STREAM_BYTES, _MLP_BYTES, _ROW_BYTES = 40, 8, 8
# Logits in bf16, their softmax in fp32 and its gradient, for each token and entry of the vocabulary.
_LOGIT_BYTES = 10
# Towers, temporary buffers of the optimizer step, fragmentation, and the context of CUDA.
_OTHER_BYTES = 8 << 30


@dataclass(frozen=True)
class Capacity:
    """Bytes that one process needs: of everything but the blocks, and of each block."""

    fixed_bytes: int
    block_bytes: tuple[int, ...]

    def blocks(self, free_bytes: int) -> int:
        """The most blocks, from the first on, that fit."""
        needed, count = self.fixed_bytes, 0
        for each in self.block_bytes:
            needed += each
            if needed > free_bytes:
                break
            count += 1
        return count


def capacity(config: RunConfig) -> Capacity:
    """What a run of one process needs, ZeRO-1 in bf16, one pack at a time."""
    state = [count.trainable * _TRAINED_BYTES + count.frozen * _FROZEN_BYTES for count in item_parameters(config)]
    decoder, tokens = config.model.decoder, config.data.seq_len
    stem, *blocks, head = state
    activations = [_activation_bytes(config, index) for index in range(decoder.layers)]
    fixed = stem + head + tokens * decoder.vocab_size * _LOGIT_BYTES + _OTHER_BYTES
    return Capacity(fixed, tuple(map(sum, zip(blocks, activations, strict=True))))


def _activation_bytes(config: RunConfig, index: int) -> int:
    decoder, moe = config.model.decoder, config.model.decoder.moe
    if decoder.has_experts(index):
        channels = moe.shared_width + moe.per_token * moe.width
        rows = moe.per_token * decoder.width
    else:
        channels, rows = decoder.mlp_width, 0
    of_a_token = decoder.width * _STREAM_BYTES + channels * _MLP_BYTES + rows * _ROW_BYTES
    return config.data.seq_len * of_a_token
