"""The axes of a run, as its configuration asks for them."""

from megavl.config.run import ParallelConfig
from megavl.parallel.groups import Mesh, build_mesh
from megavl.parallel.topology import Topology


def mesh_of(parallel: ParallelConfig, world: int) -> Mesh:
    """The mesh of `world` ranks; the data axis has those that tensor and pipeline leave. Collective."""
    topology = Topology(parallel.pipeline, world // parallel.model, parallel.tensor, parallel.expert)
    return build_mesh(topology, parallel.sequence, parallel.vision == "sharded", parallel.expert_width == "cut")
