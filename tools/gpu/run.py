"""The run that a stage measures: a recipe at full width or tiny, and the engine of one process."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
from benchmarks.one_process import load_one_process
from torch import nn

from megavl.batch import Kind, StepBatch
from megavl.config.model import ModelConfig
from megavl.config.run import RunConfig
from megavl.ops.dispatch import Ops
from megavl.parallel.groups import Mesh
from megavl.rehearsal.packs import grid_of, made_up_step
from megavl.runtime.env import Env, read_env, start_process_group
from megavl.runtime.feed import Feed
from megavl.runtime.mesh import mesh_of
from megavl.runtime.operators import choose_ops
from megavl.runtime.replica import Replica
from megavl.runtime.stage import build_stages

# Images of each pack of a multimodal step.
IMAGES = 3
# Recipe of each model, and the tiny preset that has all of its parts.
_RECIPES: Mapping[str, tuple[str, str]] = {
    "vl_7b": ("launch/recipes/vl_7b_stage2.yaml", "vl_debug"),
    "vl_1b": ("launch/recipes/vl_1b_stage2.yaml", "vl_debug_siglip"),
    "vl2_small": ("launch/recipes/vl2_small_stage2.yaml", "vl2_debug_mla"),
    "vl2_tiny": ("launch/recipes/vl2_tiny_stage2.yaml", "vl2_debug_mha"),
}
MODELS = tuple(_RECIPES)


def full_width(model: str, *overrides: str) -> RunConfig:
    """The recipe of a model in one process: 8 micro-batches of 4096 tokens."""
    recipe, _ = _RECIPES[model]
    return load_one_process(recipe, "train.global_batch=8", *overrides)


def tiny(model: str, *overrides: str) -> RunConfig:
    """The same recipe with a tiny model: 2 micro-batches of 256 tokens, 3 blocks."""
    recipe, preset = _RECIPES[model]
    sizes = (f"model={preset}", "model.decoder.layers=3", "data.seq_len=256", "train.global_batch=2")
    return load_one_process(recipe, *sizes, *overrides)


def start() -> Env:
    """Start the process group of a single process."""
    env = read_env()
    start_process_group(env, timeout=timedelta(minutes=5))
    return env


def mesh_of_one(config: RunConfig, env: Env) -> Mesh:
    """The mesh of a single process."""
    return mesh_of(config, env.world, env.device)


@torch.no_grad()
def initialise_on_device(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Initial values drawn on the model's own device. The project draws on the CPU so that no topology changes a value,
    which takes minutes at full width; what is measured here does not depend on the values."""
    generators: dict[torch.device, torch.Generator] = {}
    for module in model.modules():
        is_norm = "norm" in type(module).__name__.lower()
        for name, parameter in module.named_parameters(recurse=False):
            device = parameter.device
            generator = generators.setdefault(device, torch.Generator(device).manual_seed(seed))
            if parameter.dim() == 1:
                parameter.fill_(1.0 if is_norm and name == "weight" else 0.0)
            else:
                parameter.normal_(std=config.init_std, generator=generator)
        for buffer in module.buffers(recurse=False):
            buffer.zero_()


@dataclass(frozen=True)
class Run:
    """A replica in one process, and the packs that it is fed with."""

    config: RunConfig
    env: Env
    replica: Replica

    def packs(self, kind: Kind, documents: int = 4) -> StepBatch:
        """A made-up step, in page-locked memory where there is a GPU."""
        return packs(self.config, self.env, self.replica.mesh, kind, documents)

    def passes(self, batch: StepBatch) -> None:
        """Forward and backward passes of a step whose gradients are dropped."""
        self.replica.pipeline.train(batch)
        self.replica.engine.optimizer.zero_grad()

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.env.device.type == "cuda":
            torch.cuda.synchronize()


def packs(config: RunConfig, env: Env, mesh: Mesh, kind: Kind, documents: int = 4) -> StepBatch:
    """A made-up step whose micro-batches are one and the same pack."""
    batch = made_up_step(config, mesh, kind, IMAGES, grid_of(config, None), documents)
    pack = batch.micro_batches[0]
    pinned = pack.pin_memory() if env.device.type == "cuda" else pack
    return dataclasses.replace(batch, micro_batches=(pinned,) * len(batch.micro_batches))


def one_micro_batch(batch: StepBatch) -> StepBatch:
    """The first micro-batch of a step alone."""
    return dataclasses.replace(batch, micro_batches=batch.micro_batches[:1])


def quick_stages(config: RunConfig, mesh: Mesh, ops: Ops, device: torch.device) -> nn.ModuleList:
    """The stages of one process, with quick values."""
    return build_stages(config, mesh, ops, device, initialise_on_device)


def build(config: RunConfig, env: Env) -> Run:
    """The run of a recipe in one process."""
    mesh = mesh_of_one(config, env)
    ops = choose_ops(config, mesh, env)
    return Run(config, env, Replica(config, mesh, ops, quick_stages(config, mesh, ops, env.device)))


def summed_loss(stages: Sequence[nn.Module], batch: StepBatch) -> torch.Tensor:
    """Summed loss of the first micro-batch through the stage of one process, without an engine: float32 []."""
    (stage,) = stages
    return stage(None, next(Feed(batch.micro_batches[:1], next(stage.parameters()).device).batches()))
