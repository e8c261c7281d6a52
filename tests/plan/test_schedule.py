"""Pipeline schedules: those of torch, each pass once, and no circle of ranks that wait for one another."""

import bisect
import functools
import itertools
import random
from collections import Counter
from collections.abc import Callable, Sequence
from unittest import mock

import pytest
from torch.distributed.pipelining.schedules import Schedule1F1B, ScheduleDualPipeV, ScheduleInterleaved1F1B

from megavl.config.run import ParallelConfig
from megavl.plan import schedule
from megavl.plan.schedule import Pass, Program, Transfer, place, programs, rank_of, stages_of
from megavl.runtime.exchange import BATCHES_PENDING

PIPELINES = (2, 3, 4, 8)
SIZES = [(pipeline, virtual) for pipeline in (1, *PIPELINES) for virtual in (1, 2, 3)]
MICRO_BATCHES = (1, 2, 3, 4, 5, 7, 8, 11, 12, 16, 29)


def parallel_of(pipeline: int, virtual: int) -> ParallelConfig:
    return ParallelConfig(pipeline=pipeline, virtual_stages=virtual, schedule="1f1b" if virtual == 1 else "interleaved")


def dualpipev(pipeline: int) -> ParallelConfig:
    return ParallelConfig(pipeline=pipeline, virtual_stages=2, schedule="dualpipev")


ALL = [parallel_of(*size) for size in SIZES] + [dualpipev(pipeline) for pipeline in PIPELINES]


def name_of(parallel: ParallelConfig) -> str:
    return f"{parallel.schedule}-{parallel.pipeline}-{parallel.virtual_stages}"


def passes_of(program: Program) -> list[Pass]:
    return [action for action in program if isinstance(action, Pass)]


def torch_1f1b(pipeline: int, micro_batches: int, rank: int) -> list[tuple[str, int, int]]:
    """(kind, stage, micro-batch) of the passes that torch's schedule asks of a stage, which records them."""
    found: list[tuple[str, int, int]] = []
    stage = mock.MagicMock(stage_index=rank)
    for name in ("get_fwd_recv_ops", "get_fwd_send_ops", "get_bwd_recv_ops", "get_bwd_send_ops"):
        getattr(stage, name).return_value = []
    stage.forward_one_chunk.side_effect = lambda index, *_, **__: found.append(("forward", rank, index))
    stage.backward_one_chunk.side_effect = lambda index, **_: found.append(("backward", rank, index))
    torchs = mock.MagicMock(_stage=stage, _num_stages=pipeline, _n_microbatches=micro_batches)
    torchs._check_inputs.return_value = ([()] * micro_batches, [{}] * micro_batches)
    Schedule1F1B._step_microbatches(torchs)
    return found


def torch_interleaved(pipeline: int, virtual: int, micro_batches: int, rank: int) -> list[tuple[str, int, int]]:
    """(kind, stage, micro-batch) of a rank's passes as torch orders them."""
    torchs = mock.MagicMock(
        n_local_stages=virtual,
        microbatches_per_round=micro_batches // max(1, micro_batches // pipeline),
        pp_group_size=pipeline,
        _n_microbatches=micro_batches,
    )
    order = ScheduleInterleaved1F1B._calculate_single_rank_operations(torchs, rank)
    kinds = {"F": "forward", "B": "backward"}
    return [(kinds[each.computation_type.value], each.stage_index, each.microbatch_index) for each in order if each]


def torch_dualpipev(pipeline: int, micro_batches: int, rank: int) -> list[tuple[str, int, int]]:
    """(kind, stage, micro-batch) of a rank's passes as torch orders them. Where torch splits a backward pass, it begins
    with the gradients of the inputs."""
    torchs = mock.MagicMock(pp_group_size=pipeline, _n_microbatches=micro_batches)
    order = ScheduleDualPipeV._calculate_single_rank_operations(torchs, rank)
    kinds = {"F": "forward", "B": "backward", "I": "backward"}
    found = itertools.chain.from_iterable(each.sub_actions or (each,) for each in order)
    return [
        (kinds[each.computation_type.value], each.stage_index, each.microbatch_index)
        for each in found
        if each.computation_type.value != "W"
    ]


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_the_order_of_dualpipev_is_that_of_torch(pipeline):
    for micro_batches in range(2 * pipeline, 2 * pipeline + 9):
        for rank, program in enumerate(programs(dualpipev(pipeline), micro_batches)):
            ours = [(each.kind, each.stage, each.micro_batch) for each in passes_of(program)]
            assert ours == torch_dualpipev(pipeline, micro_batches, rank)


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_dualpipev_holds_as_much_on_every_rank(pipeline):
    """Two passes over half the rank's layers for each rank, and one more; rank 0 of interleaved 1F1B holds 3 p - 1."""
    for of_schedule, most in ((dualpipev(pipeline), 2 * pipeline + 1), (parallel_of(pipeline, 2), 3 * pipeline - 1)):
        held = [most_in_flight(program) for program in programs(of_schedule, 4 * pipeline)]
        assert max(held) == most
        assert of_schedule.schedule == "interleaved" or set(held) == {most}


@pytest.mark.parametrize(("pipeline", "virtual"), [size for size in SIZES if size[0] > 1])
def test_the_order_is_that_of_torch(pipeline, virtual):
    compared = 0
    for micro_batches in MICRO_BATCHES:
        # What torch serves: 1F1B needs a micro-batch for each stage, interleaved 1F1B rounds of equal size.
        if virtual == 1 and micro_batches < pipeline or micro_batches % max(1, micro_batches // pipeline):
            continue
        for rank, program in enumerate(programs(parallel_of(pipeline, virtual), micro_batches)):
            ours = [(each.kind, each.stage, each.micro_batch) for each in passes_of(program)]
            if virtual == 1:
                assert ours == torch_1f1b(pipeline, micro_batches, rank)
            else:
                assert ours == torch_interleaved(pipeline, virtual, micro_batches, rank)
            compared += 1
    assert compared >= 3 * pipeline


@pytest.mark.parametrize("parallel", ALL, ids=name_of)
def test_every_pass_runs_once_and_on_its_rank(parallel):
    for micro_batches in MICRO_BATCHES:
        wanted = {
            (kind, stage, index)
            for kind in ("forward", "backward")
            for stage in range(parallel.num_stages)
            for index in range(micro_batches)
        }
        found = []
        for rank, program in enumerate(programs(parallel, micro_batches)):
            found += [(each.kind, each.stage, each.micro_batch) for each in passes_of(program)]
            assert {each.stage for each in passes_of(program)} == set(stages_of(rank, parallel))
        assert len(found) == len(wanted) and set(found) == wanted


def perform(rank_programs: Sequence[Program], num_stages: int) -> None:
    """Perform the programs on the poorest network: no message is buffered, and a rank goes on only when each transfer
    of its batch has met its other end. Raises RuntimeError when all ranks wait."""
    positions, met = [0] * len(rank_programs), Counter[Transfer]()
    inputs: list[set[Pass]] = [set() for _ in rank_programs]  # what each rank has for its passes
    posted: set[tuple[int, int]] = set()
    while any(position < len(program) for position, program in zip(positions, rank_programs, strict=True)):
        before = (list(positions), len(posted))
        for rank, program in enumerate(rank_programs):
            if positions[rank] == len(program):
                continue
            action = program[positions[rank]]
            if isinstance(action, Pass):
                assert action in inputs[rank] or (action.kind, action.stage) == ("forward", 0), f"{action} has no input"
                inputs[rank].add(schedule.consumer_of(action, num_stages))
            elif (rank, positions[rank]) not in posted:
                posted.add((rank, positions[rank]))
                met.update(action)
                assert all(each.consumer in inputs[rank] for each in action if each.source == rank)
                continue
            elif any(met[each] < 2 for each in action):
                continue
            else:
                inputs[rank] |= {each.consumer for each in action if each.target == rank}
            positions[rank] += 1
        if before == (positions, len(posted)):
            raise RuntimeError(f"all ranks wait, at {positions}")
    assert all(count == 2 for count in met.values())


@pytest.mark.parametrize("backward", [True, False])
@pytest.mark.parametrize("parallel", ALL, ids=name_of)
def test_no_rank_waits_for_ever(parallel, backward):
    for micro_batches in MICRO_BATCHES:
        perform(programs(parallel, micro_batches, backward=backward), parallel.num_stages)


def test_ranks_that_wait_for_one_another_are_noticed():
    """The receiver wants the second message first."""
    first, second = (Pass("forward", 0, index) for index in range(2))
    sent = [Transfer(schedule.consumer_of(each, 2), 0, 1) for each in (first, second)]
    perform([(first, sent[:1], second, sent[1:]), (sent[:1], sent[1:])], 2)
    with pytest.raises(RuntimeError, match="all ranks wait"):
        perform([(first, sent[:1], second, sent[1:]), (sent[1:], sent[:1])], 2)


def twice_as_long_backward(forward: float) -> Callable[[Pass], float]:
    return lambda each: forward if each.kind == "forward" else 2 * forward


def makespan(
    rank_programs: Sequence[Program], seconds: Callable[[Pass], float], message: float = 0, pending: int | None = None
) -> float:
    """Time of a step on NCCL: the batches of a rank run one after another, each as a whole once both sides of all its
    messages have begun, and a pass waits for the whole batch that has its input. With `pending`, it also waits until no
    more batches than that are incomplete."""
    batches = {  # rank and position of the batch with each transfer, at both ends
        (rank, each): position
        for rank, program in enumerate(rank_programs)
        for position, action in enumerate(program)
        if not isinstance(action, Pass)
        for each in action
    }
    arrives = {(each.target, each.consumer): each for rank, each in batches}
    positions = [
        [position for position, action in enumerate(program) if not isinstance(action, Pass)]
        for program in rank_programs
    ]

    def before(rank: int, position: int) -> list[int]:
        """Batches before a position."""
        return positions[rank][: bisect.bisect_left(positions[rank], position)]

    @functools.cache
    def begins(rank: int, position: int) -> float:
        """Of a batch: after the pass before it, and after the batch before it."""
        return max([computed(rank, position), *(ends(rank, each) for each in before(rank, position)[-1:])])

    @functools.cache
    def ends(rank: int, position: int) -> float:
        """Of a batch."""
        ends_of = [
            (end, batches[end, each]) for each in rank_programs[rank][position] for end in (each.source, each.target)
        ]
        return max(begins(*end) for end in ends_of) + message

    @functools.cache
    def computed(rank: int, position: int) -> float:
        """End of the last pass before a position."""
        index = next((i for i in reversed(range(position)) if isinstance(rank_programs[rank][i], Pass)), None)
        if index is None:
            return 0
        action = rank_programs[rank][index]
        transfer = arrives.get((rank, action))
        waits = [computed(rank, index), ends(rank, batches[rank, transfer]) if transfer else 0]
        if pending is not None:
            posted = before(rank, index)
            waits += [ends(rank, each) for each in posted[: max(0, len(posted) - pending)][-1:]]
        return max(waits) + seconds(action)

    return max(computed(rank, len(program)) for rank, program in enumerate(rank_programs))


@pytest.mark.parametrize(
    ("pipeline", "virtual", "micro_batches"), [(2, 1, 4), (4, 1, 16), (8, 1, 32), (2, 2, 8), (4, 2, 16), (8, 2, 32)]
)
def test_no_rank_waits_for_a_message_that_it_does_not_need_yet(pipeline, virtual, micro_batches):
    """The step takes m + (p - 1) / v times a micro-batch, the least that the schedule allows."""
    parallel = parallel_of(pipeline, virtual)
    seconds = twice_as_long_backward(1 / virtual)
    found = makespan(programs(parallel, micro_batches), seconds)
    assert found == pytest.approx(3 * micro_batches + 3 * (pipeline - 1) / virtual)
    evaluated = makespan(programs(parallel, micro_batches, backward=False), seconds)
    assert evaluated == pytest.approx(micro_batches + (pipeline - 1) / virtual)


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_the_time_of_dualpipev_grows_by_a_micro_batch_with_each(pipeline):
    """Two passes forward and two backward over half the rank's layers. It idles longer than interleaved 1F1B, which
    idles 1.5 (p - 1), and less than 1F1B with 3 (p - 1)."""
    for micro_batches in (2 * pipeline, 4 * pipeline, 8 * pipeline):
        found = makespan(programs(dualpipev(pipeline), micro_batches), twice_as_long_backward(1 / 2))
        assert found == pytest.approx(3 * micro_batches + 2.5 * (pipeline - 1) - 0.5)


def test_dualpipev_would_stall_if_it_sent_within_its_pairs(monkeypatch):
    """A rank's batches run one after another: sent within a pair, they wait for ranks in the middle of a pass."""
    paired = makespan(programs(dualpipev(4), 32), twice_as_long_backward(1 / 2))
    order = schedule._SCHEDULES["dualpipev"].order

    def without_pairs(*args):
        return [(each,) for block in order(*args) for each in block]

    monkeypatch.setitem(schedule._SCHEDULES, "dualpipev", schedule.Schedule("v", without_pairs))
    programs.cache_clear()
    found = makespan(programs(dualpipev(4), 32), twice_as_long_backward(1 / 2))
    programs.cache_clear()
    assert found > 1.2 * paired


@pytest.mark.parametrize("backward", [True, False])
@pytest.mark.parametrize(
    "parallel", [parallel_of(4, 1), parallel_of(4, 2), parallel_of(8, 2), dualpipev(4)], ids=name_of
)
def test_pending_sends_are_few_enough_and_cost_no_time(parallel, backward):
    """With stages of any duration. To wait for each batch at once would cost time."""
    found = programs(parallel, 3 * parallel.pipeline, backward=backward)
    draw = random.Random(0)
    seconds = {each: draw.uniform(0.5, 2) for program in found for each in passes_of(program)}.__getitem__
    expected = makespan(found, seconds)
    assert makespan(found, seconds, pending=BATCHES_PENDING) == expected
    assert makespan(found, seconds, pending=0) > expected


def test_a_batch_with_a_later_message_costs_time():
    """Rank 1 receives both micro-batches at once."""
    parallel = parallel_of(2, 1)
    first, second = programs(parallel, 2)
    received = [each for action in second if not isinstance(action, Pass) for each in action if each.target == 1]
    others = [
        action if isinstance(action, Pass) else tuple(each for each in action if each.target != 1) for action in second
    ]
    late = (tuple(received), *(action for action in others if action))
    seconds = twice_as_long_backward(1)
    assert makespan((first, late), seconds) > makespan((first, second), seconds) == 9


def most_in_flight(program: Program) -> int:
    """Forward passes whose backward passes are to come, at most."""
    steps = (1 if each.kind == "forward" else -1 for each in passes_of(program))
    return max(itertools.accumulate(steps))


@pytest.mark.parametrize("pipeline", [2, 4, 8])
def test_1f1b_holds_no_more_micro_batches_than_stages_follow(pipeline):
    for rank, program in enumerate(programs(parallel_of(pipeline, 1), 32)):
        assert most_in_flight(program) == pipeline - rank


def test_an_impossible_order_is_refused(monkeypatch):
    backwards_first = schedule.Schedule("loop", lambda stages, *_: [(Pass("backward", stages[0], 0),)])
    monkeypatch.setitem(schedule._SCHEDULES, "1f1b", backwards_first)
    with pytest.raises(ValueError, match="cannot be performed"):
        programs(ParallelConfig(pipeline=2, schedule="1f1b", stages=(1, 1)), 3)


def test_placement():
    assert [place(stage, 3, "loop") for stage in range(6)] == [0, 1, 2, 0, 1, 2]
    assert [place(stage, 3, "v") for stage in range(9)] == [0, 1, 2, 2, 1, 0, 0, 1, 2]
    parallel = parallel_of(2, 3)
    assert stages_of(1, parallel) == (1, 3, 5) and rank_of(4, parallel) == 0


def test_a_v_shape_hands_over_on_its_rank():
    """Between the two stages of the last rank nothing is sent."""
    parallel = dualpipev(2)
    assert [stages_of(rank, parallel) for rank in (0, 1)] == [(0, 3), (1, 2)]
    found = programs(parallel, 1)
    sent = {each.consumer for program in found for batch in program if not isinstance(batch, Pass) for each in batch}
    ends = [("forward", 1), ("forward", 3), ("backward", 2), ("backward", 0)]
    assert sent == {Pass(kind, stage, 0) for kind, stage in ends}
