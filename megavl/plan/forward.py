"""The operations of a micro-batch on one rank, item by item of the model list."""

from megavl.config.run import RunConfig
from megavl.plan.decoder import DecoderRecorder
from megavl.plan.tape import Activation, Operation, Tape
from megavl.plan.vision import StemRecorder


def operations(
    config: RunConfig, *, tokens: int, supervised_tokens: int, tiles: int
) -> tuple[tuple[Operation, ...], ...]:
    """Operations of each item: stem, decoder blocks, head.

    Where the model has several stages, each of them gets hidden states that require a gradient; so do the blocks of one
    stage with routers, whose counters need a backward pass. Every block is taken to be in that place: only those that
    share the first stage with a stem without trainable parameters can be in another.

    Args:
        tokens: of the micro-batch, images included; all tensor ranks together have these
        supervised_tokens: those with a label
        tiles: of all images; 0 is a step of text, in which the towers do not run. In a multimodal step a micro-batch
            without images encodes one blank tile
    """
    decoder = config.model.decoder
    stem = StemRecorder(config, tokens, tiles=tiles)
    h = stem.stem()
    blocks = DecoderRecorder(config, tokens, labels=supervised_tokens)
    h = Activation(h.storage, h.bytes, h.live or config.parallel.num_stages > 1 or decoder.moe is not None)
    items = [stem.tape.operations]
    for item in range(1, decoder.layers + 2):
        blocks.tape = Tape(item)
        h = blocks.head(h) if item > decoder.layers else blocks.block(h, item - 1)
        items.append(blocks.tape.operations)
    return tuple(map(tuple, items))
