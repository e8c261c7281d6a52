"""Every rank chooses the same operators."""

import pytest
import torch
import torch.distributed as dist

from megavl.ops.trial import Result
from megavl.parallel.agree import RunError
from megavl.runtime.env import Env
from megavl.runtime.mesh import mesh_of
from megavl.runtime.operators import agreed, choose_ops
from tests.runtime.cases import run_config

FAST, SLOW = Result("triton", 1e-3), Result("triton", 4e-3)
WRONG = Result("triton", 1e-3, "result 0 is off by 1")
BROKEN = Result("triton", None, "RuntimeError: no compiler")
TORCH = Result("torch", 2e-3)


@pytest.mark.parametrize(
    ("of_nodes", "expected"),
    [
        ([[FAST, TORCH], [FAST, TORCH]], [FAST, TORCH]),
        ([[FAST, TORCH], [SLOW, TORCH]], [SLOW, TORCH]),
        ([[FAST, TORCH], [WRONG, TORCH]], [WRONG, TORCH]),
        ([[FAST, TORCH], [BROKEN, TORCH]], [BROKEN, TORCH]),
        ([[FAST, TORCH], [TORCH]], [TORCH]),  # a node without Triton
        ([[TORCH], [FAST, TORCH]], [TORCH]),
    ],
)
def test_a_candidate_must_pass_on_every_node(of_nodes, expected):
    assert agreed([{"rms_norm": results} for results in of_nodes]) == {"rms_norm": expected}


def lines(forced: dict) -> tuple[str, ...] | str:
    config = run_config(dist.get_world_size())
    config = config.model_copy(update={"ops": config.ops.model_copy(update=forced)})
    env = Env(dist.get_rank(), dist.get_rank(), dist.get_world_size())
    try:
        return choose_ops(config, mesh_of(config, env.world, torch.device("cpu")), env).lines
    except RunError as error:
        return str(error)


def test_a_cpu_tries_nothing(pool):
    first, second = pool.run(2, lines, {})
    assert first == second and any(line.startswith("rms_norm: torch (triton: needs CUDA") for line in first)


def test_an_operator_that_does_not_serve_is_refused(pool):
    (message,) = set(pool.run(2, lines, {"rms_norm": "triton"}))
    assert "ops.rms_norm = triton cannot serve this run: needs CUDA, the device is cpu" in message
