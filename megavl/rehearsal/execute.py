"""One rank of a run executed on fake tensors: shapes and dtypes without memory, and a process group without peers.

Mesh, stages, DeepSpeed's engine, schedule and optimizer are those of a run. Tensors are of the CPU, because torch's
autograd needs the device of a fake tensor to be there; operators and kernels are those that a GPU would have.
"""

import gc
import itertools
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megavl.batch import Kind, StepBatch
from megavl.config.run import RunConfig
from megavl.model.init import zero_buffers
from megavl.ops.dispatch import Ops
from megavl.parallel.groups import Mesh
from megavl.parallel.topology import Topology
from megavl.plan.mix import expected_steps
from megavl.rehearsal.counts import Counting, Counts
from megavl.rehearsal.gpus import Gpu, gpu_kernels, gpu_ops
from megavl.rehearsal.memory import Memory, Peak
from megavl.rehearsal.modules import casting_in_place
from megavl.rehearsal.packs import grid_of, made_up_step
from megavl.rehearsal.reads import Answers
from megavl.runtime.deepspeed.state import gradients
from megavl.runtime.env import Env, fake_process_group
from megavl.runtime.mesh import mesh_of
from megavl.runtime.replica import Replica
from megavl.runtime.stage import build_stages

_CPU = torch.device("cpu")
_KINDS = {"param": "weights", "master": "masters", "exp_avg": "moments", "exp_avg_sq": "moments"}


@dataclass(frozen=True)
class Step:
    """What a step does on the rank.

    images, tiles: of each pack
    micro_batches: of this rank
    passes:        all forward and backward passes
    update:        the optimizer step
    reads:         how often the host reads numbers from the device, in both
    """

    kind: Kind
    images: int
    tiles: int
    micro_batches: int
    passes: Counts
    update: Counts
    reads: int


@dataclass(frozen=True)
class Rehearsal:
    """What one rank of a run needs and does.

    lines: which implementation serves each operator and the optimizer
    peaks: of the phases, in their order
    """

    rank: int
    topology: Topology
    gpu: Gpu
    lines: tuple[str, ...]
    peaks: tuple[Peak, ...]
    steps: tuple[Step, ...]


def execute(config: RunConfig, world: int, rank: int, gpu: Gpu) -> Rehearsal:
    """Build rank `rank` of `world` and run one step of each kind that the run has.

    The run starts from weights in a checkpoint, so none are drawn. Packs are one document each, with the images of
    `expected_steps`. Every expert gets equally many tokens.

    Args:
        config: has passed `megavl.config.rules.check` for `world`
        rank: 0 <= rank < world

    Raises:
        OpsError: `config.ops` names an implementation that this installation has not
    """
    ops = gpu_ops(gpu, triton=True, wanted=config.ops)
    with fake_process_group(Env(rank, 0, world)):
        mesh = mesh_of(config, world, _CPU)
        answers = Answers()
        mesh = replace(mesh, ep=replace(mesh.ep, read_sizes=answers.equal_sizes(mesh.ep)))
        steps = [made_up(config, mesh, kind) for kind in kinds_of(config)]
        meter = Meter(gpu, answers)
        replica = meter.build(config, mesh, ops)
        done = tuple(meter.step(replica, batch) for batch in steps)
    return Rehearsal(rank, mesh.topology, gpu, replica.lines, tuple(meter.memory.peaks()), done)


def kinds_of(config: RunConfig) -> list[Kind]:
    """The kinds of steps that a run has."""
    kinds: dict[Kind, Sequence] = {"text": config.data.text, "multimodal": config.data.multimodal}
    return [kind for kind, sources in kinds.items() if sources]


def made_up(config: RunConfig, mesh: Mesh, kind: Kind) -> StepBatch:
    """A step of a kind with the images that `megavl.plan` expects, for this rank."""
    images = {step.name: step.images for step in expected_steps(config)}
    return made_up_step(config, mesh, kind, images[kind], grid_of(config, None), documents=1)


class Meter:
    """Measures memory, kernels and messages of a replica on fake tensors.

    memory: of all that it has built and run
    """

    def __init__(self, gpu: Gpu, answers: Answers):
        self._gpu, self._fake = gpu, FakeTensorMode()
        self.memory = Memory()
        self._counting = Counting(partial(label_message, self.memory))
        self._answers = answers

    def build(self, config: RunConfig, mesh: Mesh, ops: Ops) -> Replica:
        """The replica of this rank."""
        with self._phase("build"), casting_in_place():
            stages = build_stages(config, mesh, ops, _CPU, zero_buffers)
            replica = Replica(config, mesh, ops, stages)
            label_state(self.memory, replica)
        keep_activations(self.memory, replica)
        return replica

    def step(self, replica: Replica, batch: StepBatch) -> Step:
        """Run one step of a replica. Tensors of `batch` are real ones in host memory."""
        inputs, copies = self._copied(batch)
        with self._phase(f"{batch.kind}: forward and backward"):
            self.memory.follow(copies)
            self.memory.label(copies, "inputs")
            passes = self._counting.counts = Counts()
            replica.accumulate(inputs)
            self.memory.label(gradients(replica.engine, replica.stages), "gradients")
        with self._phase(f"{batch.kind}: optimizer step"):
            update = self._counting.counts = Counts()
            replica.update(batch.step, replica.config.optim.lr)
        reads, self._answers.reads = self._answers.reads, 0
        packs = replica.config.train.global_batch
        micro_batches = len(batch.micro_batches)
        return Step(batch.kind, batch.images // packs, batch.tiles // packs, micro_batches, passes, update, reads)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        """What runs inside is recorded as a phase. Garbage of what ran before is collected first."""
        gc.collect()
        self.memory.begin(name)
        with ExitStack() as stack, warnings.catch_warnings():
            # DeepSpeed checks the alignment of its buffers; it is 0 where there is no memory.
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
            for mode in (self._fake, self.memory, self._counting, self._answers):
                stack.enter_context(mode)
            stack.enter_context(gpu_kernels(self._gpu, lambda tensors: self._counting.counts.launch(tensors)))
            yield

    def _copied(self, batch: StepBatch) -> tuple[StepBatch, list[Tensor]]:
        """`batch` as it is on the device, where a `Feed` keeps two micro-batches, and the tensors of these."""
        copies = []

        def copy(tensor: Tensor) -> Tensor:
            copies.append(self._fake.from_tensor(tensor.clone()))
            return copies[-1]

        held = [each.map_tensors(copy) for each in batch.micro_batches[:2]]
        micro_batches = tuple(itertools.islice(itertools.cycle(held), len(batch.micro_batches)))
        ahead = batch.ahead
        if ahead is not None:  # in host memory, from which chunks are copied
            ahead = replace(ahead, pixels=tuple(map(self._fake.from_tensor, ahead.pixels)))
        return replace(batch, micro_batches=micro_batches, ahead=ahead), copies


def label_state(memory: Memory, replica: Replica) -> None:
    """Give weights, masters, moments and flat gradients of a replica their kinds."""
    memory.label(gradients(replica.engine, replica.stages), "gradients")
    held = replica.fragments()
    # A weight that is its own master is a weight.
    for kind in ("exp_avg", "exp_avg_sq", "master", "param"):
        memory.label((each.values for each in held if each.kind == kind), _KINDS[kind])
    memory.label(replica.stages.parameters(), "weights")  # anchors and spacers
    if replica.pipeline.ahead is not None:
        memory.label(replica.pipeline.ahead.weights, "weights")
    memory.label_rest("workspace")


def keep_activations(memory: Memory, replica: Replica) -> None:
    """What a forward pass of a stage has allocated and left is activations."""
    for stage in replica.stages:
        stage.register_forward_pre_hook(lambda *_: memory.label_rest("workspace"))
        stage.register_forward_hook(lambda *_: memory.label_rest("activations"))


def label_message(memory: Memory, operation: str, tensors: Sequence[Tensor]) -> None:
    """What pipeline ranks send each other are buffers of the pipeline."""
    if operation in ("send", "receive"):
        memory.label(tensors, "pipeline")
