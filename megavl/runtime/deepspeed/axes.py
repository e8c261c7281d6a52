"""The axes of the mesh under the names that DeepSpeed uses."""

import deepspeed

from megavl.parallel.groups import Mesh


class ModelParallelUnit:
    """The `mpu` argument of `deepspeed.initialize`.

    DeepSpeed sums the squared gradient norm over the model-parallel group (tensor and pipeline ranks), and counts a
    parameter that is not cut on tensor rank 0 only: so its "model parallel rank" is the tensor rank.
    """

    def __init__(self, mesh: Mesh):
        self._mesh = mesh

    def get_model_parallel_rank(self) -> int:
        return self._mesh.tp.rank

    def get_model_parallel_world_size(self) -> int:
        return self._mesh.model.size

    def get_model_parallel_group(self):
        return self._mesh.model.group

    def get_data_parallel_rank(self) -> int:
        return self._mesh.dp.rank

    def get_data_parallel_world_size(self) -> int:
        return self._mesh.dp.size

    def get_data_parallel_group(self):
        return self._mesh.dp.group

    def get_data_parallel_group_ranks(self) -> list[int]:
        return next(ranks for ranks in self._mesh.topology.groups("dp") if deepspeed.comm.get_rank() in ranks)

    def get_tensor_model_parallel_rank(self) -> int:
        return self._mesh.tp.rank

    def get_tensor_model_parallel_world_size(self) -> int:
        return self._mesh.tp.size

    def get_tensor_model_parallel_group(self):
        return self._mesh.tp.group

    def get_pipeline_model_parallel_world_size(self) -> int:
        return self._mesh.pp.size

    def get_pipeline_model_parallel_group(self):
        return self._mesh.pp.group
