"""The model as a list, [Stem, Block, ..., Block, Head], and a slice of it as a module."""

from torch import Tensor, nn

from megavl.batch import Batch
from megavl.config.model import ModelConfig
from megavl.model.block import Block
from megavl.model.head import Head
from megavl.model.layout import PackLayout
from megavl.model.moe import Moe, Router
from megavl.model.run_block import RunBlock, call_block
from megavl.model.stem import Stem
from megavl.ops.dispatch import Ops
from megavl.parallel.groups import ExpertAxis, TensorAxis

_ALL_EXPERTS = ExpertAxis()


class VLM(nn.Module):
    """Items [first, stop) of the model list; parameters have the names that they have in the whole model.

    Item 0 is the stem, item i the block i - 1, item `config.layers - 1` the head. The parameters hold no values yet:
    `megavl.model.init.initialise` or a checkpoint gives them.

    Args:
        auxiliary_scale: of all routers, as in `Router`
        run_block: how each decoder block is called, such as with recomputation
        run_tower_block: how each block of the towers is called
    """

    def __init__(
        self,
        config: ModelConfig,
        tp: TensorAxis,
        ops: Ops,
        first: int,
        stop: int,
        ep: ExpertAxis = _ALL_EXPERTS,
        *,
        auxiliary_scale: float = 0.0,
        run_block: RunBlock = call_block,
        run_tower_block: RunBlock = call_block,
    ):
        super().__init__()
        if not 0 <= first < stop <= config.layers:
            raise ValueError(f"items [{first}, {stop}) are not a slice of the {config.layers} items of {config.name}")
        last = config.layers - 1
        self.decoder_config, self.run_block = config.decoder, run_block
        self.stem = Stem(config, tp, run_tower_block) if first == 0 else None
        self.blocks = nn.ModuleDict(
            {
                str(item - 1): Block(config.decoder, item - 1, tp, ep, ops, auxiliary_scale)
                for item in range(max(first, 1), min(stop, last))
            }
        )
        self.head = Head(config.decoder, tp, ops) if stop > last else None

    @property
    def routers(self) -> dict[int, Router]:
        """Of the blocks of this slice that have routed experts, by the index of the block in the whole model."""
        return {int(index): block.mlp.router for index, block in self.blocks.items() if isinstance(block.mlp, Moe)}

    def forward(self, h: Tensor | None, batch: Batch) -> Tensor:
        """Run the items of this slice.

        Args:
            h: None if this slice begins with the stem, else the output [T, D] of the slice before ([T / tp, D] under
                sequence parallelism)
            batch: the micro-batch, on the device of the parameters

        Returns:
            The next slice's h or, if this slice ends with the head, the summed loss, float32 [].
        """
        h = self._hidden(h, batch)
        return h if self.head is None else self.head(h, batch.labels, batch.supervised)

    def logits(self, batch: Batch) -> Tensor:
        """[T, V / tp] of the whole model (all items in this slice)."""
        return self.head.logits(self._hidden(None, batch))

    def _hidden(self, h: Tensor | None, batch: Batch) -> Tensor:
        """Stem and blocks: [T, D], or [T / tp, D] under sequence parallelism."""
        if self.stem is not None:
            h = self.stem(batch)
        if self.blocks:
            layout = PackLayout.of(batch, self.decoder_config)
            for block in self.blocks.values():
                h = self.run_block(block, h, layout)
        return h
