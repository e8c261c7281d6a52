"""Origin of a run's weights: its newest checkpoint, another run's checkpoint, or random numbers."""

from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megavl.checkpoint.error import CheckpointError
from megavl.checkpoint.layout import latest
from megavl.config.run import RunConfig
from megavl.model.init import initialise, zero_buffers
from megavl.parallel.agree import gather, on_every_rank
from megavl.runtime.stage import Initialise


@dataclass(frozen=True)
class Origin:
    """Where a run starts. The same on every rank.

    checkpoint: of this run, to be resumed; None where there is none yet
    weights:    of a new run, `checkpoint.init_from`: anything that `locate` finds; None where they are drawn
    """

    checkpoint: Path | None
    weights: str | None

    @property
    def initialise(self) -> Initialise:
        """Values of the parameters before a checkpoint is read.

        Reading one fills every parameter or fails, so none are drawn for it: those of the 7B take 85 s of one process.
        """
        return initialise if self.checkpoint is None and self.weights is None else zero_buffers


def find_origin(config: RunConfig, checkpoints: Path, control: dist.ProcessGroup | None) -> Origin:
    """Look for the newest checkpoint in the directory `checkpoints`. Collective.

    Raises:
        CheckpointError: on all ranks, where the directory cannot be read.
    """
    # A shared disk may show another directory to each rank for a while.
    newest, *_ = gather(on_every_rank(lambda: latest(checkpoints), control, CheckpointError), control)
    return Origin(newest, config.checkpoint.init_from)
