"""The model as a list, [Stem, Block, ..., Block, Head], and a slice of it as a module."""

from torch import Tensor, nn

from megavl.batch import Batch
from megavl.config.model import ModelConfig
from megavl.model.block import Block
from megavl.model.head import Head
from megavl.model.moe import Moe, Router
from megavl.model.stem import Stem
from megavl.ops.dispatch import Ops
from megavl.parallel.groups import ExpertAxis, TensorAxis

_ALL_EXPERTS = ExpertAxis()


class VLM(nn.Module):
    """Items [first, stop) of the model list; parameters have the names that they have in the whole model.

    Item 0 is the stem, item i the block i - 1, item `config.layers - 1` the head. The parameters hold no values yet:
    `megavl.model.init.initialise` or a checkpoint gives them.
    """

    def __init__(
        self, config: ModelConfig, tp: TensorAxis, ops: Ops, first: int, stop: int, ep: ExpertAxis = _ALL_EXPERTS
    ):
        super().__init__()
        if not 0 <= first < stop <= config.layers:
            raise ValueError(f"items [{first}, {stop}) are not a slice of the {config.layers} items of {config.name}")
        last = config.layers - 1
        self.stem = Stem(config, tp) if first == 0 else None
        self.blocks = nn.ModuleDict(
            {
                str(item - 1): Block(config.decoder, item - 1, tp, ep, ops)
                for item in range(max(first, 1), min(stop, last))
            }
        )
        self.head = Head(config.decoder, tp, ops) if stop > last else None

    @property
    def layers(self) -> list[nn.Module]:
        """The items of this slice, in order."""
        return [layer for layer in (self.stem, *self.blocks.values(), self.head) if layer is not None]

    @property
    def routers(self) -> dict[int, Router]:
        """Of the blocks of this slice that have routed experts, by the index of the block in the whole model."""
        return {int(index): block.mlp.router for index, block in self.blocks.items() if isinstance(block.mlp, Moe)}

    def forward(self, h: Tensor | None, batch: Batch) -> Tensor:
        """h: None where this slice begins with the stem, else the output [T, D] of the slice before ([T / tp, D] under
        sequence parallelism). Returns the next slice's h, or behind the head the summed loss, float32 []."""
        for layer in self.layers:
            h = layer(h, batch)
        return h

    def logits(self, batch: Batch) -> Tensor:
        """[T, V / tp] of the whole model (all items in this slice)."""
        h = None
        for layer in self.layers[:-1]:
            h = layer(h, batch)
        return self.head.logits(h)
