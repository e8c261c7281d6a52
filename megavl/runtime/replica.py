"""One copy of the model over its ranks: what this rank holds of it, and a step of training or evaluation."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from torch import Tensor, nn

from megavl.batch import StepBatch
from megavl.checkpoint.error import CheckpointError
from megavl.checkpoint.fragments import Fragment
from megavl.checkpoint.layout import read_state
from megavl.checkpoint.load import load, load_weights
from megavl.checkpoint.save import save
from megavl.config.load import dump_run
from megavl.config.run import RunConfig
from megavl.model.init import initialise
from megavl.ops.dispatch import Ops
from megavl.parallel.agree import RunError, on_every_rank
from megavl.parallel.groups import Mesh
from megavl.runtime.balance import Balance, Load
from megavl.runtime.deepspeed.adamw import choose_adamw, set_step
from megavl.runtime.deepspeed.engine import build_engine
from megavl.runtime.deepspeed.state import fragments
from megavl.runtime.env import Env
from megavl.runtime.operators import choose_ops
from megavl.runtime.optim import set_learning_rate
from megavl.runtime.origin import Origin
from megavl.runtime.pipeline import Pipeline
from megavl.runtime.stage import Initialise, build_stages


@dataclass(frozen=True)
class Step:
    """Result of an optimizer step, the same on every rank.

    loss:      mean over the supervised tokens of the global batch, nats
    grad_norm: global norm of the gradient before it is clipped
    load:      of the routed experts; None where the model has none
    """

    loss: float
    grad_norm: float
    load: Load | None


class Replica:
    """Mesh, stages, engine and pipeline of this rank. Its creation and its methods are collective.

    stages: of this rank, in pipeline order
    lines:  which implementation serves each operator and the optimizer, and why
    """

    def __init__(self, config: RunConfig, mesh: Mesh, ops: Ops, stages: nn.ModuleList):
        self.config, self.mesh, self.stages = config, mesh, stages
        adamw = choose_adamw(next(stages.parameters()).device, config.parallel.zero)
        self.lines = (*ops.lines, adamw.line)
        self.engine, expect_last = build_engine(stages, config, mesh, adamw)
        self.pipeline = Pipeline(self.engine, stages, config, mesh, ops, expect_last)
        self.balance = Balance(stages, config, mesh)

    @property
    def has_stem(self) -> bool:
        """Whether this rank has the first item of the model list."""
        return any(stage.vlm.stem is not None for stage in self.stages)

    def step(self, batch: StepBatch, lr: float) -> Step:
        """One optimizer step.

        Args:
            batch: this rank's part of the global batch
            lr: peak learning rate times the schedule's ratio; each group has its own multiple of it

        Raises:
            RunError: loss or gradient norm is not finite; after a loss that is not, nothing has been updated.
        """
        loss = self.accumulate(batch)
        grad_norm, load = self.update(batch.step, lr)
        return Step(loss, grad_norm, load)

    def accumulate(self, batch: StepBatch) -> float:
        """The first half of a step: forward and backward passes. Returns and raises what `step` does."""
        loss = self._over_the_world(self.pipeline.train(batch))
        _refuse_infinite("loss", loss, batch.step)
        return loss

    def update(self, step: int, lr: float) -> tuple[float, Load | None]:
        """The second half: the optimizer step. Returns the gradient norm and the load, and raises what `step` does.

        Args:
            step: its number from 0, for messages
            lr: as in `step`
        """
        set_learning_rate(self.engine.basic_optimizer, lr)
        self.engine.step()
        if self.pipeline.ahead is not None:
            self.pipeline.ahead.weights_moved()
        load = self.balance.step()
        grad_norm = float(self.engine.get_global_grad_norm())
        _refuse_infinite("gradient norm", grad_norm, step)
        return grad_norm, load

    def evaluate(self, batch: StepBatch) -> float:
        """The loss of a batch under the current weights, as `Step.loss`; nothing is changed or counted."""
        return self._over_the_world(self.pipeline.evaluate(batch))

    def fragments(self) -> list[Fragment]:
        """What this rank holds of parameters, masters and moments, as views."""
        return fragments(self.engine, self.stages, self.mesh.dp.rank)

    def resume(self, origin: Origin) -> dict:
        """Read the checkpoint from which the run starts, if it starts from one.

        Returns:
            The state of this run's checkpoint, whose "step" is the number of steps done; {"step": 0} without one.

        Raises:
            CheckpointError: on all ranks, when the files are not whole or of another model.
        """
        model, control = self.config.model, self.mesh.control
        held = self.fragments()
        if origin.checkpoint is None:
            if origin.weights is not None:
                load_weights(origin.weights, held, model, control)
                self._weights_loaded()
            return {"step": 0}
        state = on_every_rank(lambda: _state_of_a_run(origin.checkpoint), control, CheckpointError)
        load(origin.checkpoint, held, model, control)
        self._weights_loaded()
        set_step(self.engine.basic_optimizer, state["optimizer_step"])
        return state | {"path": origin.checkpoint}

    def save(self, checkpoints: Path, done: int, progress: dict) -> Path:
        """Write a checkpoint after `done` steps, with `progress` in its state. Returns its path.

        The step and the seed of the configuration determine the stream of data, and nothing else in a run is random.
        """
        state = {"optimizer_step": done, "config": dump_run(self.config), **progress}
        return save(checkpoints, done, self.fragments(), state, self.config.checkpoint.keep, self.mesh.control)

    def _weights_loaded(self) -> None:
        if self.pipeline.ahead is not None:
            self.pipeline.ahead.weights_loaded()

    def _over_the_world(self, loss: Tensor) -> float:
        """Sum of the loss over the world; every tensor rank has a copy of the same part."""
        loss = loss / self.mesh.tp.size
        dist.all_reduce(loss)
        return loss.item()


def build_replica(config: RunConfig, mesh: Mesh, env: Env, initialise: Initialise = initialise) -> Replica:
    """The replica of a run on `mesh`. Collective.

    Args:
        initialise: as in `build_stages`
    """
    ops = choose_ops(config, mesh, env)
    stages = on_every_rank(lambda: build_stages(config, mesh, ops, env.device, initialise), mesh.control)
    return Replica(config, mesh, ops, stages)


def _state_of_a_run(checkpoint: Path) -> dict:
    """Raises CheckpointError for a checkpoint that no run has written, such as a converted one."""
    state = read_state(checkpoint)
    if "optimizer_step" not in state:
        raise CheckpointError(
            f"{checkpoint} has no optimizer_step, so no run can go on from it; give it as checkpoint.init_from to "
            "start a run from its weights, or remove it"
        )
    return state


def _refuse_infinite(what: str, value: float, step: int) -> None:
    """Every rank has the same value."""
    if not math.isfinite(value):
        raise RunError(
            f"the {what} of step {step + 1} is {value}: this run has diverged, and the weights in memory are lost; "
            "start again from the last checkpoint with a lower optim.lr, or look at the data of this step"
        )
