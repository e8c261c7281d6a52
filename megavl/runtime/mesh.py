"""Device mesh of a run, from its configuration."""

from datetime import timedelta

import torch

from megavl.config.run import RunConfig
from megavl.parallel.groups import Mesh, build_mesh
from megavl.parallel.topology import Topology

# Longest time between the first and the last rank that finishes writing a checkpoint to a shared disk.
_SLOW_DISK = timedelta(minutes=30)


def mesh_of(config: RunConfig, world: int, device: torch.device) -> Mesh:
    """The mesh of `world` ranks; the data axis has those that tensor and pipeline leave. Collective.

    The timeout of the control group exceeds `data.timeout_s`, so that a rank without data can tell the others why it
    ends.
    """
    parallel = config.parallel
    return build_mesh(
        Topology(parallel.pipeline, world // parallel.model, parallel.tensor, parallel.expert),
        parallel.sequence,
        parallel.vision == "sharded",
        parallel.expert_width == "cut",
        device=device,
        timeout=timedelta(seconds=config.train.timeout_s),
        control_timeout=timedelta(seconds=config.data.timeout_s) + _SLOW_DISK,
    )
