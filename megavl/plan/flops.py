"""Work of a dataflow: floating-point operations of its forward and backward pass.

Conventions. A multiplication and its addition are two FLOPs; only matrix products and convolutions count. Causal
attention in packs costs what it needs: a document of s tokens has s (s + 1) / 2 pairs of query and key. SAM's windowed
layers are counted on the padded grid, as the released code computes them. A token goes through the routed experts that
it is sent to, and through no other. The backward pass of a product is counted in its two halves, gradient of the input
and gradient of the weight, each where autograd needs it: nothing flows back into a part with nothing trainable before
it, and a frozen weight has no gradient. The backward pass of attention is four products, twice the forward; the scores
that flash kernels compute again are not counted.

What this implementation computes beyond that is `overhead`: see `Work`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from megavl.config.dataflow import Attention, BalanceLoss, Block, Branches, Flow, Parameter
from megavl.config.run import ParallelConfig
from megavl.plan.work import Work


@dataclass(frozen=True)
class FlopCounter:
    """Counts the work of flows over the tokens and tiles of a step.

    An activation is live if it needs a gradient, which it does if anything before it is trainable.

    trains:      whether the optimizer changes the parameter of a name
    recomputes:  whether blocks of a part ("decoder" or "tower") are recomputed in the backward pass
    tokens:      of all documents, those of images included
    labels:      tokens that are supervised
    pairs:       of query and key within the documents
    tiles:       of all images
    micro_batch: packs of one forward pass
    """

    trains: Callable[[str], bool]
    recomputes: Callable[[str], bool]
    tokens: int
    labels: int
    pairs: int
    tiles: int
    micro_batch: int
    parallel: ParallelConfig

    def work(self, flow: Flow, live: bool) -> tuple[Work, bool]:
        """Work of a flow on an input that is live or not, and whether its output is."""
        match flow:
            case Parameter():
                trained = flow.trained and self.trains(flow.name)
                return self._product(flow, live, trained), live or trained
            case Attention(positions=()):
                attended = self._attend(flow, flow.key_width + flow.value_width, live)
                filled = self._attend(flow, flow.key_width - flow.value_width, live)
                return attended + filled.as_overhead(), live
            case Attention():
                return self._attend_with_positions(flow, live)
            case BalanceLoss():
                return self._balance_loss(flow, live), live
            case Branches(flows):
                results = [self.work(branch, live) for branch in flows]
                return sum((work for work, _ in results), Work()), any(live for _, live in results)
            case Block(part, flows):
                work, live = self.work(flows, live)
                return work + self._recomputation(flows) if live and self.recomputes(part) else work, live
        total = Work()
        for part in flow:
            work, live = self.work(part, live)
            total += work
        return total, live

    def _recomputation(self, flow: Flow) -> Work:
        """Work of the second forward pass of a flow that is recomputed in the backward pass."""
        return self.repeated_forward(_without_last_product(flow))

    def repeated_forward(self, flow: Flow) -> Work:
        """Work of one more forward pass of a flow, as overhead."""
        forward, _ = replace(self, trains=lambda name: False).work(flow, live=False)
        return forward.as_overhead()

    def _product(self, parameter: Parameter, live: bool, trained: bool) -> Work:
        product = parameter.product
        if product is None:
            return Work()
        of_tiles = product.per == "tile"
        rows = product.rows * {"token": self.tokens, "label": self.labels, "tile": self.tiles}[product.per]
        flops = 2 * rows * product.d_in * product.d_out
        repeated = self._repeats_tiles if of_tiles else self._repeats_tokens and parameter.tensor_dim is None
        return Work(flops, flops * live, flops * trained).repeated_if(repeated)

    def _attend(self, attention: Attention, channels: int, live: bool) -> Work:
        """Scores and weighted sums of values over `channels` channels. Backward needs the gradients of both factors:
        twice the forward."""
        of_tiles = attention.pairs_per_tile is not None
        pairs = self.tiles * attention.pairs_per_tile if of_tiles else self.pairs
        flops = 2 * pairs * channels
        return Work(flops, 2 * flops * live).repeated_if(of_tiles and self._repeats_tiles)

    def _attend_with_positions(self, attention: Attention, live: bool) -> tuple[Work, bool]:
        """Relative positions, then attention. Their padding, and the channels that carry them in queries, keys and
        values, are overhead (`megavl/model/sam.py`)."""
        positions, positions_live = self.work(Branches(attention.positions), live)
        padding, _ = self.work(Branches(tuple(map(_padding, attention.positions))), live)
        live = live or positions_live
        attended = self._attend(attention, attention.key_width + attention.value_width, live)
        carried = self._attend(attention, 2 * _carried_width(attention), live)
        return positions + attended + (padding + carried).as_overhead(), live

    def _balance_loss(self, loss: BalanceLoss, live: bool) -> Work:
        """Choices and scores of each expert, summed over each pack by a product; only the scores have a gradient."""
        flops = 2 * self.tokens * self.micro_batch * loss.experts
        return Work(2 * flops, flops * live).as_overhead().repeated_if(self._repeats_tokens)

    @property
    def _repeats_tiles(self) -> bool:
        """Whether every tensor rank encodes all tiles: no rank encodes a tile of another where they share them, within
        the first stage or before the passes."""
        return self.parallel.vision == "replicated"

    @property
    def _repeats_tokens(self) -> bool:
        """Whether every tensor rank has all tokens of the residual stream."""
        return not self.parallel.sequence


def _without_last_product(flow: Flow) -> Flow:
    """What is computed before the product that a flow ends with: a recomputation stops there, since no gradient needs
    its result. Branches are kept whole: the weighted sum that joins experts needs their results."""
    match flow:
        case Parameter():
            return ()
        case (*before, Parameter(name=name)) if name.endswith(".bias"):
            return _without_last_product(tuple(before))
        case (*before, last):
            return (*before, _without_last_product(last))
    return flow


def _padding(positions: Parameter) -> Parameter:
    """The zeros that fill a query's relative positions up to a multiple of 8."""
    product = positions.product
    return replace(positions, product=replace(product, d_out=-product.d_out % 8))


def _carried_width(attention: Attention) -> int:
    """Channels in which queries and keys carry relative positions, all heads together."""
    products = [positions.product for positions in attention.positions]
    return sum(attention.key_width // product.d_in * (product.d_out + -product.d_out % 8) for product in products)
