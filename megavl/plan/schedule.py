"""Pipeline schedules: the rank of each stage, the order of a rank's passes, and the transfers between ranks.

Sources: 1F1B and interleaved 1F1B are those of Megatron-LM (arXiv 2104.04473, section 2.2). DualPipeV is that of
DeepSeek (github.com/deepseek-ai/DualPipe, dualpipev.py; DualPipe: arXiv 2412.19437, section 3.2.1), after the
"cut-in-half" schedule of Sea AI Lab.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, count, groupby, pairwise, starmap
from typing import Literal, NamedTuple

from megavl.config.run import ParallelConfig


class Pass(NamedTuple):
    """One stage over one micro-batch, forward or backward."""

    kind: Literal["forward", "backward"]
    stage: int
    micro_batch: int


class Transfer(NamedTuple):
    """A message between two pipeline ranks: the input of pass `consumer`, which is hidden states or their gradient."""

    consumer: Pass
    source: int
    target: int


# A backward pass takes twice as long as a forward pass, which decides the order of transfers.
_DURATION = {"forward": 1, "backward": 2}

# What a rank does in a step: passes, and transfers that are posted as one batch.
Program = tuple[Pass | tuple[Transfer, ...], ...]
# Passes of a rank between which it neither sends nor receives: the inputs of all are there before the first.
Block = tuple[Pass, ...]
# (stages of the rank, rank, ranks, micro-batches) -> passes of the rank.
Order = Callable[[Sequence[int], int, int, int], list[Block]]

# "loop": stage s is on rank s % ranks. "v": every second lap runs backwards, so that rank 0 has the first and the last
# of 2 * ranks stages.
Placement = Literal["loop", "v"]


@dataclass(frozen=True)
class Schedule:
    """Where the stages are and in which order a rank runs its passes."""

    placement: Placement
    order: Order


def place(stage: int, ranks: int, placement: Placement) -> int:
    """Pipeline rank of a stage among `ranks`."""
    lap, position = divmod(stage, ranks)
    return ranks - 1 - position if placement == "v" and lap % 2 else position


def rank_of(stage: int, parallel: ParallelConfig) -> int:
    """Pipeline rank of a stage of a run."""
    return place(stage, parallel.pipeline, _SCHEDULES[parallel.schedule].placement)


def stages_of(rank: int, parallel: ParallelConfig) -> tuple[int, ...]:
    """Stages of a pipeline rank, in pipeline order."""
    return tuple(stage for stage in range(parallel.num_stages) if rank_of(stage, parallel) == rank)


@lru_cache(maxsize=8)
def programs(parallel: ParallelConfig, micro_batches: int, *, backward: bool = True) -> tuple[Program, ...]:
    """What each pipeline rank does in a step of `micro_batches`; without `backward` the forward passes alone.

    All ranks follow one total order of transfers, and each is posted after the pass that produces it. So no deadlock is
    possible, even on in-order channels whose sends block until received.

    Args:
        parallel: a checked section of a run
        micro_batches: of a step on each data-parallel rank

    Raises:
        ValueError: the order of passes cannot be performed.
    """
    ranks = range(parallel.pipeline)
    order = _SCHEDULES[parallel.schedule].order
    blocks = [order(stages_of(rank, parallel), rank, len(ranks), micro_batches) for rank in ranks]
    if not backward:
        blocks = [_only(of_rank, lambda each: each.kind == "forward") for of_rank in blocks]
    return tuple(tuple(_batched(program)) for program in _with_transfers(blocks, parallel))


def _one_forward_one_backward(stages: Sequence[int], rank: int, ranks: int, micro_batches: int) -> list[Block]:
    (stage,) = stages
    forwards = [Pass("forward", stage, index) for index in range(micro_batches)]
    backwards = [Pass("backward", stage, index) for index in range(micro_batches)]
    return _phases(forwards, backwards, warm_up=ranks - 1 - rank)


def _interleaved(stages: Sequence[int], rank: int, ranks: int, micro_batches: int) -> list[Block]:
    """Rounds of about as many micro-batches as there are ranks; in a round a rank runs its stages one after another."""
    num_rounds = max(1, micro_batches // ranks)
    borders = [-(-micro_batches * number // num_rounds) for number in range(num_rounds + 1)]
    rounds = list(starmap(range, pairwise(borders)))
    forwards = [Pass("forward", stage, index) for each in rounds for stage in stages for index in each]
    backwards = [Pass("backward", stage, index) for each in rounds for stage in reversed(stages) for index in each]
    return _phases(forwards, backwards, warm_up=(len(stages) - 1) * len(rounds[0]) + 2 * (ranks - 1 - rank))


def _dualpipev(stages: Sequence[int], rank: int, ranks: int, micro_batches: int) -> list[Block]:
    """The steps of DeepSeek's code, with whole backward passes where it puts off gradients of weights.

    That code needs two micro-batches for each rank. With fewer, the passes of those that are missing are left out.
    """
    first, last = stages
    f0, f1, b0, b1 = (("forward", first), ("forward", last), ("backward", first), ("backward", last))
    following, present = ranks - 1 - rank, max(micro_batches, 2 * ranks)
    steps = [
        *[[f0]] * (2 * following),
        *[[f0], [f1]] * (rank + 1),
        *[[b1], [f1]] * following,
        *[[f0, b1], [f1, b0]] * (present - 2 * ranks + rank + 1),
        *[[b1], [f1, b0]] * following,
        *[[b1], [b0]] * (rank + 1),
        *[[b0]] * following,
    ]
    indices = defaultdict(count)
    blocks = [tuple(Pass(*each, next(indices[each])) for each in step) for step in steps]
    return _only(blocks, lambda each: each.micro_batch < micro_batches)


def _only(blocks: list[Block], kept: Callable[[Pass], bool]) -> list[Block]:
    """The blocks without the other passes. What remains can be performed: passes depend on their own micro-batch."""
    return [left for block in blocks if (left := tuple(filter(kept, block)))]


def _phases(forwards: list[Pass], backwards: list[Pass], warm_up: int) -> list[Block]:
    """Warm-up: forward passes. Steady state: one forward, one backward. Cool-down: the remaining backward passes."""
    warm_up = min(warm_up, len(forwards))
    steady = len(forwards) - warm_up
    pairs = zip(forwards[warm_up:], backwards[:steady], strict=True)
    return [(each,) for each in (*forwards[:warm_up], *chain.from_iterable(pairs), *backwards[steady:])]


_SCHEDULES = {
    "1f1b": Schedule("loop", _one_forward_one_backward),
    "interleaved": Schedule("loop", _interleaved),
    "dualpipev": Schedule("v", _dualpipev),
}


def _with_transfers(blocks: list[list[Block]], parallel: ParallelConfig) -> list[list[Pass | Transfer]]:
    """The passes of each rank with its transfers.

    All ranks are simulated side by side. When a block ends, the transfers of its outputs come next on the rank that
    sends them, and on the rank that receives them, which may be in the middle of a block: the transfer then comes after
    that one, so that no batch holds a message that its next block does not need.
    """
    programs: list[list[Pass | Transfer]] = [[] for _ in blocks]
    waiting = [deque(of_rank) for of_rank in blocks]
    everything = chain.from_iterable(chain.from_iterable(blocks))
    ready = {each for each in everything if each.kind == "forward" and each.stage == 0}
    running: dict[int, tuple[int, Block]] = {}  # rank -> end and block
    now = 0
    while True:
        for rank, queue in enumerate(waiting):
            if rank not in running and queue and ready.issuperset(queue[0]):
                block = queue.popleft()
                running[rank] = now + sum(_DURATION[each.kind] for each in block), block
                programs[rank].extend(block)
        if not running:
            break
        now = min(end for end, _ in running.values())
        for rank in [rank for rank, (end, _) in running.items() if end == now]:
            for consumer in (consumer_of(each, parallel.num_stages) for each in running.pop(rank)[1]):
                if consumer is None:
                    continue
                ready.add(consumer)
                target = rank_of(consumer.stage, parallel)
                if target != rank:
                    for program in (programs[rank], programs[target]):
                        program.append(Transfer(consumer, rank, target))
    if stuck := [queue[0] for queue in waiting if queue]:
        raise ValueError(f"the order of passes cannot be performed: none of {stuck} has input")
    return programs


def consumer_of(done: Pass, num_stages: int) -> Pass | None:
    """The pass whose input is the output of `done`. The backward pass of the last stage begins with the loss."""
    if done.kind == "backward":
        return Pass("backward", done.stage - 1, done.micro_batch) if done.stage > 0 else None
    if done.stage == num_stages - 1:
        return Pass("backward", done.stage, done.micro_batch)
    return Pass("forward", done.stage + 1, done.micro_batch)


def _batched(program: list[Pass | Transfer]) -> Iterator[Pass | tuple[Transfer, ...]]:
    """Transfers between two passes as one batch: a send and a receive then run at the same time."""
    for is_pass, group in groupby(program, lambda action: isinstance(action, Pass)):
        if is_pass:
            yield from group
        else:
            yield tuple(group)
