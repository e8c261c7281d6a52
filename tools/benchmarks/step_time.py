"""Time of one training step, by its parts, and its merge over the ranks."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from functools import reduce
from operator import add

from benchmarks.clock import Read, Spent, timed_method

from megavl.batch import StepBatch
from megavl.runtime.exchange import Exchange
from megavl.runtime.replica import Replica


@dataclass(frozen=True)
class StepTime:
    """Time of one step.

    whole:            from one barrier to the next
    forward_backward: in `pipeline.train`
    messages:         of that, for other pipeline ranks; on a GPU 0, where only its streams wait
    engine_step:      in `engine.step`
    waiting:          in the closing barrier, for the slowest rank
    """

    whole: Spent
    forward_backward: Spent
    messages: Spent
    engine_step: Spent
    waiting: Spent


def timed_step(replica: Replica, batch: StepBatch, read: Read, barrier: Callable[[], object]) -> StepTime:
    """Run one step of `replica` and time it on this rank. Collective."""
    with ExitStack() as methods:
        forward_backward = methods.enter_context(timed_method(replica.pipeline, "train", read))
        engine_step = methods.enter_context(timed_method(replica.engine, "step", read))
        messages = []
        if replica.engine.device.type == "cpu":
            messages = [methods.enter_context(timed_method(Exchange, name, read)) for name in ("take", "finish")]
        barrier()
        started = read()
        replica.step(batch, replica.config.optim.lr)
        done = read()
        barrier()
        ended = read()
    waited = sum((each.spent for each in messages), start=Spent())
    return StepTime(ended - started, forward_backward.spent, waited, engine_step.spent, ended - done)


def over_ranks(times: Sequence[StepTime]) -> StepTime:
    """One step of all ranks: the longest wall clock of the whole, the mean wall clock of each part, and the sum of the
    processor times."""
    merged = {}
    for field in fields(StepTime):
        each = [getattr(time, field.name) for time in times]
        total = reduce(add, each)
        wall_s = max(spent.wall_s for spent in each) if field.name == "whole" else total.wall_s / len(times)
        merged[field.name] = Spent(wall_s, total.cpu_s)
    return StepTime(**merged)


def busy_share(times: Sequence[StepTime]) -> float:
    """Of the time from the first pass of a step to the last, the share that its pipeline ranks do not wait for each
    other, from the times of all ranks."""
    longest = max(time.forward_backward.wall_s for time in times)
    waited = sum(time.messages.wall_s + longest - time.forward_backward.wall_s for time in times)
    return 1 - waited / (len(times) * longest)
