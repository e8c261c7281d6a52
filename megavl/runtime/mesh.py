"""The axes of a run, as its configuration asks for them."""

from datetime import timedelta

import torch

from megavl.config.run import RunConfig
from megavl.parallel.groups import Mesh, build_mesh
from megavl.parallel.topology import Topology

# Ranks may finish writing a checkpoint to a shared disk that long after one another.
_SLOW_DISK = timedelta(minutes=30)


def mesh_of(config: RunConfig, world: int, device: torch.device) -> Mesh:
    """The mesh of `world` ranks; the data axis has those that tensor and pipeline leave. Collective.

    Control messages have a longer timeout than a rank has for its data, so that the others hear why it ends.
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
