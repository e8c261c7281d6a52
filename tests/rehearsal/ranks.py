"""One rank of a tiny run, in a real process over gloo and on fake tensors, observed in the same way."""

import gc
import threading
from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from megavl.batch import Kind
from megavl.config.run import RunConfig
from megavl.model.init import zero_buffers
from megavl.ops.dispatch import choose
from megavl.rehearsal.counts import Counting, Counts
from megavl.rehearsal.execute import Meter, Step, keep_activations, label_message, label_state, made_up
from megavl.rehearsal.gpus import GPUS
from megavl.rehearsal.memory import Memory, Peak
from megavl.rehearsal.reads import Answers
from megavl.runtime.deepspeed.start import start_deepspeed
from megavl.runtime.deepspeed.state import gradients
from megavl.runtime.env import Env, fake_process_group
from megavl.runtime.mesh import mesh_of
from megavl.runtime.replica import Replica
from megavl.runtime.stage import build_stages

CPU = torch.device("cpu")


@dataclass
class Observed:
    """What a rank did.

    steps:     counts of the passes and of the update of each step
    copies:    how many of the kernels of each of these are copies
    peaks:     of all phases
    reads:     every number that was read on the host, in order
    allocated: of a real process, the most bytes in each phase by torch's own record of its CPU allocator
    """

    steps: list[tuple[Counts, Counts]] = field(default_factory=list)
    copies: list[int] = field(default_factory=list)
    peaks: list[Peak] = field(default_factory=list)
    reads: list[float | int | bool] = field(default_factory=list)
    allocated: list[int] = field(default_factory=list)


class Reads(TorchDispatchMode):
    """While entered, appends every number that the host reads."""

    def __init__(self, values: list):
        super().__init__()
        self._values = values

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        if operation is torch.ops.aten._local_scalar_dense.default:
            self._values.append(out)
        return out


class _OfThisThread:
    """gloo's threads inherit the modes of the caller; their copies of messages are not what the rank does."""

    def __init__(self, *args):
        super().__init__(*args)
        self._thread = threading.get_ident()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if threading.get_ident() != self._thread:
            return operation(*args, **(kwargs or {}))
        return super().__torch_dispatch__(operation, types, args, kwargs)


class _Memory(_OfThisThread, Memory):
    pass


class _Counting(_OfThisThread, Counting):
    pass


@contextmanager
def _copies_counted():
    """Yields the number of copies by the identity of the `Counts` that they are in."""
    found, dispatch = Counter(), Counting.__torch_dispatch__

    def counting(mode, operation, types, args=(), kwargs=None):
        found[id(mode.counts)] += operation is torch.ops.aten.copy_.default
        return dispatch(mode, operation, types, args, kwargs)

    with mock.patch.object(Counting, "__torch_dispatch__", counting):
        yield found


def _tolist(tensor: Tensor) -> list:
    """One read for each number, as of a fake tensor; torch reads real ones all at once."""
    return [each.item() if each.dim() == 0 else _tolist(each) for each in tensor]


@contextmanager
def _allocations(before: int, found: list[int]):
    """Appends the most bytes that are in use while entered; `before` are in use at the beginning."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        yield
    used = highest = before
    for event in sorted(recorded.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            used += event.nbytes()
            highest = max(highest, used)
    found.append(highest)


def real(config: RunConfig, kinds: list[Kind]) -> Observed:
    """This rank, in a process of a gloo group."""
    start_deepspeed("gloo")
    mesh = mesh_of(config, dist.get_world_size(), CPU)
    memory, done = _Memory(), Observed()
    counting = _Counting(lambda operation, tensors: label_message(memory, operation, tensors))

    @contextmanager
    def phase(name: str):
        gc.collect()
        memory.begin(name)
        with ExitStack() as stack:
            stack.enter_context(_allocations(memory.bytes, done.allocated))
            for mode in (memory, counting, Reads(done.reads)):
                stack.enter_context(mode)
            stack.enter_context(mock.patch.object(Tensor, "tolist", _tolist))
            found = stack.enter_context(_copies_counted())
            yield
        if name != "build":
            done.copies.append(found[id(counting.counts)])

    with phase("build"):
        replica = Replica(config, mesh, choose(CPU), build_stages(config, mesh, choose(CPU), CPU, zero_buffers))
        label_state(memory, replica)
    done.reads.clear()
    keep_activations(memory, replica)
    torch.manual_seed(0)
    for held in replica.fragments():
        if held.kind in ("param", "master"):
            held.values.normal_(std=0.05)
    for kind in kinds:
        batch = made_up(config, mesh, kind)
        with phase(f"{kind}: forward and backward"):
            passes = counting.counts = Counts()
            replica.accumulate(batch)
            memory.label(gradients(replica.engine, replica.stages), "gradients")
        with phase(f"{kind}: optimizer step"):
            update = counting.counts = Counts()
            replica.update(0, config.optim.lr)
        done.steps.append((passes, update))
    done.peaks = memory.peaks()
    return done


def fake(config: RunConfig, kinds: list[Kind], world: int, rank: int, reads: list) -> Observed:
    """`rank` of `world` on fake tensors, which reads the numbers `reads`."""
    dist.destroy_process_group()  # that of the pool
    remaining = iter(reads)
    with fake_process_group(Env(rank, 0, world)), _copies_counted() as found:
        mesh = mesh_of(config, world, CPU)
        meter = Meter(GPUS["hopper"], Answers(lambda tensor: next(remaining)))
        replica = meter.build(config, mesh, choose(CPU))
        steps: list[Step] = [meter.step(replica, made_up(config, mesh, kind)) for kind in kinds]
    counted = [(step.passes, step.update) for step in steps]
    copies = [found[id(counts)] for counts in sum(counted, ())]
    return Observed(counted, copies, meter.memory.peaks(), list(remaining))
