"""The example of a new layer in CONTRIBUTING.md, applied to a copy of the tree."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

USE = """
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megavl.batch import Batch
from megavl.config.load import load_run
from megavl.config.parameters import parameters
from megavl.config.tiles import Tiling
from megavl.model.init import initialise
from megavl.model.vlm import VLM
from megavl.ops.dispatch import choose
from megavl.parallel.groups import TensorAxis
from megavl.parallel.shard import shard_of
from megavl.plan.cost import step_flops

config = load_run("RECIPE", ["model.decoder.feed_forward=gelu", "model.decoder.layers=2"])
model, cpu = config.model, torch.device("cpu")
for tensor in (1, 2):
    vlm = VLM(model, TensorAxis(0, tensor), choose(cpu), 0, model.layers)
    local = {name: shard_of(held).full_shape(tuple(held.shape)) for name, held in vlm.named_parameters()}
    assert local == {parameter.name: parameter.shape for parameter in parameters(model)}, "names or shapes differ"
vlm = VLM(model, TensorAxis(), choose(cpu), 0, model.layers)
initialise(vlm, model, seed=0)
assert abs(vlm.blocks["0"].mlp.up_proj.weight.std() / model.init_std - 1) < 0.05, "another initial deviation"
tokens = torch.arange(50)
for name, parameter in vlm.named_parameters():
    parameter.requires_grad_(config.optim.lr_multiplier(name) > 0)
with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
    vlm(None, Batch.of(Tiling(model), tokens, tokens, [50], 1, pixels=torch.empty(0, dtype=torch.uint8))).backward()
# torch counts causal attention over all pairs.
counts = {"tokens": 50, "supervised_tokens": 50, "squared_tokens": 2 * 50**2 - 50, "tiles": 0}
assert step_flops(config, **counts).hardware == counter.get_total_flops()
print("the layer is counted, initialised and cut")
"""


def test_the_example_in_contributing_works(tmp_path):
    (patch,) = re.findall(r"```diff\n(.*?\n)```", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.DOTALL)
    assert patch.count("diff --git") == 4
    shutil.copytree(ROOT / "megavl", tmp_path / "megavl", ignore=shutil.ignore_patterns("__pycache__"))
    applied = subprocess.run(["git", "apply", "-"], cwd=tmp_path, input=patch, text=True, capture_output=True)
    assert applied.returncode == 0, applied.stderr
    recipe = ROOT / "launch/recipes/vl_debug.yaml"
    done = subprocess.run(
        [sys.executable, "-c", USE.replace("RECIPE", str(recipe))],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "the layer is counted, initialised and cut\n", done.stderr
