"""Vision encoder ahead of the passes: the tiles of a step are encoded before its passes, by all ranks of the replica
or of the world (`parallel.vision: pipelined, balanced`).

before the passes: each rank encodes its run of tiles in chunks; an all-to-all brings the features to the tensor ranks
                   of the first stage
passes:            features are leaves of the first stage's graphs, in which their gradients accumulate
after the passes:  an all-to-all brings the gradients back; the chunks run backward; gradients of the weights are summed
                   over the replica and enter the engine as any others

The engine's parameters of towers and adaptor are on pipeline rank 0. Every rank encodes with a working copy. On
pipeline rank 0 it has their storage; elsewhere a broadcast fills it when a multimodal step finds that weights may have
changed. A text step does none of this.

Source: DeepSeek-VL2 section 4.2 balances tiles over data-parallel ranks.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from megavl.batch import StepBatch, TilesAhead
from megavl.config.recompute import encodes_again
from megavl.config.run import RunConfig
from megavl.model.encoder import TileEncoder
from megavl.model.stem import Stem
from megavl.parallel.groups import Axis, Mesh
from megavl.parallel.tiles import EncoderGroup, TileRoutes, even_share, overlap
from megavl.runtime.flat import Flat
from megavl.runtime.optim import freeze


def encoder_group(config: RunConfig, mesh: Mesh) -> EncoderGroup:
    """The ranks with which this one shares the tiles of their packs."""
    rank = mesh.topology.rank(mesh.pp.rank, mesh.dp.rank, mesh.tp.rank)
    return EncoderGroup.of(mesh.topology, rank, config.parallel.vision == "balanced")


@dataclass
class _Weights:
    """Parameters of the working copy that are broadcast together.

    flat:  where they lie beyond pipeline rank 0; None there
    stale: whether those of pipeline rank 0 may have changed since the last broadcast
    """

    parameters: list[nn.Parameter]
    flat: Flat | None
    stale: bool = True


@dataclass
class _Step:
    """What the backward pass of a step needs; runs are numbered as in `TileRoutes`.

    ahead:  the tiles of this rank
    routes: of the group
    graphs: run of each chunk and its graph, or None where it is encoded again
    leaves: run and features of each micro-batch; empty ones beyond pipeline rank 0
    """

    ahead: TilesAhead
    routes: TileRoutes
    graphs: list[tuple[range, GradientEdge | None]]
    leaves: list[tuple[range, Tensor]]


class AheadEncoder:
    """Encodes the tiles of a step, before and after its passes. Collective over the ranks that share the tiles and over
    the pipeline; its creation is local."""

    def __init__(self, stages: nn.ModuleList, config: RunConfig, mesh: Mesh, device: torch.device):
        """Beyond pipeline rank 0 the working copy takes the memory of towers and adaptor once more.

        Args:
            stages: of this rank, whose parameters the engine has taken over
        """
        self._mesh, self._device, self._chunk_tiles = mesh, device, config.parallel.vision_chunk
        self._dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
        self._feature_shape = (config.model.tile_features, config.model.decoder.width)
        self._group = encoder_group(config, mesh)
        world = Axis(self._group.rank, mesh.topology.world, dist.group.WORLD)
        self._axis = world if config.parallel.vision == "balanced" else mesh.model
        self._encodes_again = encodes_again(config)
        stem = next((stage.vlm.stem for stage in stages if stage.vlm.stem is not None), None)
        self._encoder, self._weights = self._working_copy(config, stem)
        trained = {name: copy for name, copy in self._encoder.named_parameters() if copy.requires_grad}
        self._trained = list(trained.values())
        # The engine's, in the same order.
        self._parameters = [] if stem is None else [stem.get_parameter(name) for name in trained]
        for index, parameter in enumerate(self._trained):
            parameter.register_post_accumulate_grad_hook(partial(self._accumulate, index))
        self._sums: Flat | None = None  # of the gradients, fp32, while chunks run backward
        self._step: _Step | None = None

    @property
    def weights(self) -> Iterator[nn.Parameter]:
        """The parameters that it encodes with; where the engine's serve, these."""
        return self._encoder.parameters()

    def weights_moved(self) -> None:
        """The optimizer has updated the trainable weights."""
        self._weights["trained"].stale = True

    def weights_loaded(self) -> None:
        """All weights may have other values."""
        for weights in self._weights.values():
            weights.stale = True

    def forward(self, batch: StepBatch) -> list[Tensor | None]:
        """Encode this rank's tiles and deliver the features. Nothing happens in a step without tiles.

        Returns:
            The features of each micro-batch, [tiles, tile_features, D], leaves that require a gradient where gradients
            are enabled and something of the encoder trains. None in a step without tiles, and beyond pipeline rank 0.

        Raises:
            ValueError: the pixels are not those of this rank's tiles.
        """
        if not batch.tiles:
            return [None] * len(batch.micro_batches)
        self._refresh()
        routes = self._group.routes(batch.ahead.by_replica)
        mine, needed = routes.encoded[self._axis.rank], routes.needed[self._axis.rank]
        _check(batch, mine, needed)
        trains = torch.is_grad_enabled() and bool(self._trained)
        with torch.set_grad_enabled(trains and not self._encodes_again):
            outputs = [(chunk, self._encode(batch.ahead, mine, chunk)) for chunk in self._chunks(mine)]
        rows = self._rows([(chunk, output.detach()) for chunk, output in outputs], routes.needed)
        arrived = self._exchange(rows, routes, *routes.features(self._axis.rank))  # [tiles needed, tile_features, D]
        leaves = [
            (run, arrived[run.start - needed.start : run.stop - needed.start].detach().requires_grad_(trains))
            for run in _runs(batch, needed)
        ]
        if trains:
            # An edge does not keep the features themselves, which have been sent.
            graphs = [(chunk, None if self._encodes_again else get_gradient_edge(output)) for chunk, output in outputs]
            self._step = _Step(batch.ahead, routes, graphs, leaves)
        return [leaf for _, leaf in leaves] if self._mesh.pp.rank == 0 else [None] * len(batch.micro_batches)

    def backward(self) -> None:
        """Return the gradients of the features that the passes of the step have left, run this rank's chunks backward,
        and hand the sum over the replica to the engine. Nothing happens without tiles or where all is frozen."""
        step, self._step = self._step, None
        if step is None:
            return
        rank = self._axis.rank
        rows = self._rows([(run, leaf.grad) for run, leaf in step.leaves], [step.routes.returned[rank]])
        step.leaves.clear()
        gradients = self._exchange(rows, step.routes, *step.routes.gradients(rank))  # [tiles encoded, tile_features, D]
        self._sums = Flat([parameter.shape for parameter in self._trained], torch.float32, self._device)
        mine = step.routes.encoded[rank]
        while step.graphs:
            chunk, graph = step.graphs.pop(0)
            if graph is None:
                graph = get_gradient_edge(self._encode(step.ahead, mine, chunk))
            torch.autograd.backward(graph, gradients[chunk.start - mine.start : chunk.stop - mine.start])
        sums, self._sums = self._sums, None
        self._sum_over_replica(sums.buffer)
        if self._parameters:
            # In bf16 this rounds the sum once, as the gradient of every micro-batch is where the stage encodes.
            torch.autograd.backward(self._parameters, [view.to(self._dtype) for view in sums.views])

    def _working_copy(self, config: RunConfig, stem: Stem | None) -> tuple[TileEncoder, dict[str, _Weights]]:
        with torch.device("meta"):
            encoder = TileEncoder(config.model)
        freeze(((f"stem.{name}", parameter) for name, parameter in encoder.named_parameters()), config.optim)
        values, flats = {}, {}
        for kind, requires_grad in (("frozen", False), ("trained", True)):
            shapes = {name: p.shape for name, p in encoder.named_parameters() if p.requires_grad == requires_grad}
            if stem is None:
                flats[kind] = Flat(list(shapes.values()), self._dtype, self._device)
                values |= dict(zip(shapes, flats[kind].views, strict=True))
            else:
                flats[kind] = None
                values |= {name: stem.get_parameter(name).detach() for name in shapes}
        encoder.load_state_dict(values, assign=True)
        parameters = list(encoder.parameters())
        return encoder, {
            kind: _Weights([p for p in parameters if p.requires_grad == (kind == "trained")], flat)
            for kind, flat in flats.items()
        }

    @torch.no_grad()
    def _refresh(self) -> None:
        """Broadcast from pipeline rank 0 what may have changed: one message for frozen weights, one for the others."""
        pp = self._mesh.pp
        for weights in self._weights.values():
            if not (weights.stale and weights.parameters):
                continue
            weights.stale = False
            if pp.size == 1:
                continue
            flat = weights.flat
            if flat is None:
                flat = Flat([parameter.shape for parameter in weights.parameters], self._dtype, self._device)
                torch._foreach_copy_(flat.views, weights.parameters)
            dist.broadcast(flat.buffer, group=pp.group, group_src=0)

    def _chunks(self, mine: range) -> list[range]:
        count = -(-len(mine) // self._chunk_tiles)
        return [even_share(mine, index, count) for index in range(count)]

    def _encode(self, ahead: TilesAhead, mine: range, chunk: range) -> Tensor:
        """Features of some of this rank's tiles, [chunk, tile_features, D]."""
        start, parts = mine.start, []
        for piece in ahead.pixels:
            held = range(start, start + len(piece))
            if common := overlap(held, chunk):
                part = piece[common.start - start : common.stop - start]
                parts.append(part.to(self._device, non_blocking=True))
            start = held.stop
        return self._encoder(torch.cat(parts) if len(parts) > 1 else parts[0])

    def _rows(self, held: Sequence[tuple[range, Tensor]], wanted: Iterable[range]) -> Tensor:
        """Rows of the wanted runs, one run after another, from those that are held: [rows, tile_features, D]."""
        parts = [
            rows[common.start - run.start : common.stop - run.start]
            for want in wanted
            for run, rows in held
            if (common := overlap(run, want))
        ]
        if not parts:
            return torch.empty(0, *self._feature_shape, dtype=self._dtype, device=self._device)
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _exchange(self, rows: Tensor, routes: TileRoutes, sent: list[int], received: list[int]) -> Tensor:
        """All-to-all of rows; the result is in the order of the tiles.

        Args:
            sent, received: tiles to and from each rank
        """
        if self._axis.size == 1 or not routes.tiles:
            return rows
        arrived = rows.new_empty(sum(received), *self._feature_shape)
        dist.all_to_all_single(arrived, rows.contiguous(), received, sent, group=self._axis.group)
        return arrived

    def _accumulate(self, index: int, parameter: nn.Parameter) -> None:
        """Add the gradient of a chunk to the sum in fp32."""
        self._sums.views[index].add_(parameter.grad)
        parameter.grad = None

    def _sum_over_replica(self, gradients: Tensor) -> None:
        """In place; every tensor rank of pipeline rank 0 has the sum."""
        pp, tp = self._mesh.pp, self._mesh.tp
        if pp.size > 1:
            dist.reduce(gradients, group=pp.group, group_dst=0)
        if tp.size > 1 and pp.rank == 0:
            dist.all_reduce(gradients, group=tp.group)


def _runs(batch: StepBatch, needed: range) -> list[range]:
    """Run of each micro-batch; beyond pipeline rank 0 no rank needs any."""
    runs, start = [], needed.start
    for micro_batch in batch.micro_batches:
        runs.append(range(start, start + micro_batch.tiles) if needed else range(0))
        start = runs[-1].stop
    return runs


def _check(batch: StepBatch, mine: range, needed: range) -> None:
    here, of_packs = sum(map(len, batch.ahead.pixels)), sum(each.tiles for each in batch.micro_batches)
    if here != len(mine):
        raise ValueError(
            f"pixels of {here} tiles are here, but this rank encodes {len(mine)} of the {sum(batch.ahead.by_replica)} "
            "tiles of the step: features would land on the wrong tokens"
        )
    if needed and of_packs != len(needed):
        raise ValueError(
            f"the images of this rank's micro-batches have {of_packs} tiles, but those of its replica are said to have "
            f"{len(needed)}: features would land on the wrong tokens"
        )
