"""What ranks tell each other in a run goes over the control group; tensors of the training never do."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.distributed import distributed_c10d

from megavl.config.run import RunConfig
from megavl.runtime.deepspeed.start import start_deepspeed
from megavl.runtime.env import Env
from megavl.runtime.loop import train
from tests.models import changed
from tests.runtime.test_killed import config as run_of

OBJECTS = ("all_gather_object", "broadcast_object_list", "gather_object", "scatter_object_list")
TENSORS = ("all_reduce", "broadcast", "barrier")
# Functions that reduce tensors over the world: loss, load of the experts, memory, measured peak.
OVER_THE_WORLD = {"_over_the_world", "record", "peak", "_matmul_flops"}


def label(group: dist.ProcessGroup | None) -> str:
    """ "control", an axis, "self" or "world"."""
    if group is None or group == dist.group.WORLD:
        return "world"
    return group.group_desc.removeprefix("megavl:")


@dataclass(frozen=True)
class Call:
    """A collective, the label of its group, and who called it: the last three parts of the file, and the function."""

    collective: str
    group: str
    file: str
    function: str

    @property
    def where(self) -> tuple[str, str]:
        return self.group, self.file


def noting(collective: str, calls: list[Call]) -> Callable:
    """The collective, which notes its calls."""
    called = getattr(distributed_c10d, collective)

    def noted(*args, **kwargs):
        code = sys._getframe(1).f_code
        # Object collectives are made of tensor collectives, which are not calls of their own.
        if code.co_filename != distributed_c10d.__file__:
            group = kwargs.get("group") or next((arg for arg in args if isinstance(arg, dist.ProcessGroup)), None)
            file = "/".join(Path(code.co_filename).parts[-3:])
            calls.append(Call(collective, label(group), file, code.co_name))
        return called(*args, **kwargs)

    return noted


def calls_of_a_run(config: RunConfig, parallel: dict) -> list[Call]:
    """Train, save, and go on from the checkpoint for a step."""
    start_deepspeed("gloo")
    calls: list[Call] = []
    for collective in (*OBJECTS, *TENSORS):
        noted = noting(collective, calls)
        setattr(dist, collective, noted)
        setattr(distributed_c10d, collective, noted)
    env = Env(dist.get_rank(), dist.get_rank(), dist.get_world_size())
    for steps in (1, 2):
        train(changed(config, parallel=parallel, train={"steps": steps}), env)
    return calls


@pytest.mark.parametrize("parallel", [{}, {"pipeline": 2, "stages": (1, 2)}], ids=str)
def test_messages_and_objects_go_over_the_control_group(pool, corpus, tmp_path, parallel):
    config = run_of(corpus, tmp_path, workers=0, micro_batch=1)
    config = changed(config, train={"global_batch": 4}, checkpoint={"every": 1})
    for calls in pool.run(2, calls_of_a_run, config, parallel):
        # Those of this project and those of DCP.
        assert {call.where for call in calls if call.collective in OBJECTS} == {
            ("control", "megavl/parallel/agree.py"),
            ("control", "distributed/checkpoint/utils.py"),
        }
        tensors = [call for call in calls if call.collective in TENSORS]
        assert {call.file for call in tensors if call.group == "control"} == {"megavl/parallel/agree.py"}
        over_the_world = {call.function for call in tensors if call.group == "world"}
        assert {"_over_the_world"} <= over_the_world <= OVER_THE_WORLD
