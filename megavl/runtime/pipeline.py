"""The forward and backward passes of a step over this rank's stages, in the order of the pipeline schedule.

Only hidden states and their gradients, of one fixed shape, move between ranks. Token ids, document borders and images
stay on the rank, where each stage takes the micro-batches in order.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from megavl.batch import Batch, StepBatch
from megavl.config.run import RunConfig
from megavl.ops.dispatch import Ops
from megavl.parallel.groups import Mesh
from megavl.plan.schedule import Pass, consumer_of, programs, stages_of
from megavl.runtime.deepspeed.engine import Engine, ExpectLast
from megavl.runtime.exchange import Exchange
from megavl.runtime.feed import Feed
from megavl.runtime.stage import Stage
from megavl.runtime.vision import AheadEncoder


class Pipeline:
    """Runs steps. Gradients accumulate in the engine, which is told which backward pass brings a stage's last ones.

    ahead: encodes the tiles of a step before its passes; None where the first stage encodes those of a micro-batch
    """

    def __init__(
        self,
        engine: Engine,
        stages: nn.ModuleList,
        config: RunConfig,
        mesh: Mesh,
        ops: Ops,
        expect_last: ExpectLast,
    ):
        parallel, train = config.parallel, config.train
        self._engine, self._parallel, self._mesh, self._products = engine, parallel, mesh, ops.products
        self._expect_last = expect_last
        self._stages = dict(zip(stages_of(mesh.pp.rank, parallel), stages, strict=True))
        tokens = config.data.seq_len * train.micro_batch // (mesh.tp.size if mesh.tp.sequence else 1)
        self._hidden_shape = (tokens, config.model.decoder.width)
        self._dtype = torch.bfloat16 if train.precision == "bf16" else torch.float32
        self.ahead = AheadEncoder(stages, config, mesh, engine.device) if parallel.encodes_ahead else None

    def train(self, batch: StepBatch) -> Tensor:
        """Forward and backward passes of a step.

        The loss is the sum over the supervised tokens of the global batch divided by their number. DeepSpeed averages
        gradients over the data axis, so each rank's share is multiplied by its size.

        Returns:
            This rank's part of the loss, float32 []; 0 on ranks without the last stage.
        """
        return self._run(batch, backward=True)

    def evaluate(self, batch: StepBatch) -> Tensor:
        """Forward passes alone, without gradients; returns what `train` does."""
        with torch.no_grad():
            return self._run(batch, backward=False)

    def _run(self, batch: StepBatch, backward: bool) -> Tensor:
        device = self._engine.device
        program = programs(self._parallel, len(batch.micro_batches), backward=backward)[self._mesh.pp.rank]
        feed = Feed(batch.micro_batches, device)
        exchange = Exchange(self._mesh.pp, self._hidden_shape, self._dtype, device)
        normaliser = batch.supervised_tokens / self._mesh.dp.size
        last = {each.stage: each for each in program if isinstance(each, Pass) and each.kind == "backward"}
        with self._products:
            micro_batches = self._micro_batches(batch, feed)
            passes = _Passes(self._engine, self._stages, self._parallel.num_stages, micro_batches, exchange, normaliser)
            for action in program:
                match action:
                    case Pass(kind="forward"):
                        passes.forward(action)
                    case Pass(kind="backward"):
                        if action == last[action.stage]:
                            self._expect_last(self._stages[action.stage].parameters())
                        passes.backward(action)
                    case transfers:
                        exchange.post(transfers)
            exchange.finish()
            if self.ahead is not None and backward:
                self.ahead.backward()
        losses = passes.losses or [torch.zeros((), device=device)]
        return torch.stack(losses).sum() / self._mesh.dp.size

    def _micro_batches(self, batch: StepBatch, feed: Feed) -> dict[int, Iterator[Batch]]:
        """What each stage of this rank takes, in the order of its forward passes."""
        with_images = feed.batches() if self.ahead is None else feed.featured(self.ahead.forward(batch))
        return {index: feed.texts() if stage.vlm.stem is None else with_images for index, stage in self._stages.items()}


class _Passes:
    """The passes of one step on this rank.

    losses: float32 [] for each micro-batch that passed the last stage: summed loss / normaliser, detached
    """

    def __init__(
        self,
        engine: Engine,
        stages: Mapping[int, Stage],
        num_stages: int,
        micro_batches: Mapping[int, Iterator[Batch]],
        exchange: Exchange,
        normaliser: float,
    ):
        self._engine, self._stages, self._num_stages = engine, stages, num_stages
        self._micro_batches, self._exchange, self._normaliser = micro_batches, exchange, normaliser
        # Input and graph of each forward pass that awaits its backward pass, keyed by the backward pass. The edge does
        # not keep the output, which is freed once it is sent; the engine's backward pass needs the output itself.
        self._graphs: dict[Pass, tuple[Tensor | None, Tensor | GradientEdge]] = {}
        self.losses: list[Tensor] = []

    def forward(self, action: Pass) -> None:
        h = self._exchange.take(action)
        if h is not None and torch.is_grad_enabled():
            h.requires_grad_()
        # ZeRO-2 and 3 need the engine's own forward and backward passes; it knows a single stage.
        stage = self._engine if self._num_stages == 1 else self._stages[action.stage]
        output = stage(h, next(self._micro_batches[action.stage]))
        if action.stage == self._num_stages - 1:
            # DeepSpeed accumulates gradients in hooks, so the loss is divided before the backward pass.
            output = output / self._normaliser
            self.losses.append(output.detach())
        else:
            self._exchange.put(consumer_of(action, self._num_stages), output.detach())
        if torch.is_grad_enabled():
            graph = output if self._num_stages == 1 else get_gradient_edge(output)
            self._graphs[Pass("backward", action.stage, action.micro_batch)] = h, graph

    def backward(self, action: Pass) -> None:
        h, graph = self._graphs.pop(action)
        if self._num_stages == 1:
            self._engine.backward(graph, scale_wrt_gas=False)
        else:
            torch.autograd.backward(graph, self._exchange.take(action))
        if h is not None:
            self._exchange.put(consumer_of(action, self._num_stages), h.grad)
