"""Pipeline schedules: those of torch, each pass once, and no circle of ranks that wait for one another."""

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from unittest import mock

import pytest
from torch.distributed.pipelining.schedules import Schedule1F1B, ScheduleInterleaved1F1B

from megavl.config.run import ParallelConfig
from megavl.plan import schedule
from megavl.plan.schedule import Pass, Program, Transfer, place, programs, rank_of, stages_of

SIZES = [(pipeline, virtual) for pipeline in (1, 2, 3, 4, 8) for virtual in (1, 2, 3)]
MICRO_BATCHES = (1, 2, 3, 4, 5, 7, 8, 11, 12, 16, 29)


def parallel_of(pipeline: int, virtual: int) -> ParallelConfig:
    return ParallelConfig(pipeline=pipeline, virtual_stages=virtual, schedule="1f1b" if virtual == 1 else "interleaved")


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


@pytest.mark.parametrize(("pipeline", "virtual"), SIZES)
def test_every_pass_runs_once_and_on_its_rank(pipeline, virtual):
    parallel = parallel_of(pipeline, virtual)
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
@pytest.mark.parametrize(("pipeline", "virtual"), SIZES)
def test_no_rank_waits_for_ever(pipeline, virtual, backward):
    parallel = parallel_of(pipeline, virtual)
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


def makespan(rank_programs: Sequence[Program], seconds: Callable[[Pass], float], message: float = 0) -> float:
    """Time of a step on NCCL: the batches of a rank run one after another, each as a whole once both sides of all its
    messages have begun, and a pass waits for the whole batch that has its input."""
    batches = {  # rank and position of the batch with each transfer, at both ends
        (rank, each): position
        for rank, program in enumerate(rank_programs)
        for position, action in enumerate(program)
        if not isinstance(action, Pass)
        for each in action
    }
    arrives = {(each.target, each.consumer): each for rank, each in batches}

    @functools.cache
    def begins(rank: int, position: int) -> float:
        """Of a batch: after the pass before it, and after the batch before it."""
        before = [index for index in range(position) if not isinstance(rank_programs[rank][index], Pass)]
        return max(computed(rank, position), ends(rank, before[-1]) if before else 0)

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
        input_there = ends(rank, batches[rank, transfer]) if transfer else 0
        return max(computed(rank, index), input_there) + seconds(action)

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


@pytest.mark.parametrize("pipeline", [2, 4, 8])
def test_1f1b_holds_no_more_micro_batches_than_stages_follow(pipeline):
    for rank, program in enumerate(programs(parallel_of(pipeline, 1), 32)):
        held, most = 0, 0
        for each in passes_of(program):
            held += 1 if each.kind == "forward" else -1
            most = max(most, held)
        assert most == pipeline - rank


def test_an_impossible_order_is_refused(monkeypatch):
    backwards_first = schedule.Schedule("loop", lambda stages, *_: [Pass("backward", stages[0], 0)])
    monkeypatch.setitem(schedule._SCHEDULES, "1f1b", backwards_first)
    with pytest.raises(ValueError, match="cannot be performed"):
        programs(ParallelConfig(pipeline=2, schedule="1f1b", stages=(1, 1)), 3)


def test_placement():
    assert [place(stage, 3, "loop") for stage in range(6)] == [0, 1, 2, 0, 1, 2]
    assert [place(stage, 3, "v") for stage in range(9)] == [0, 1, 2, 2, 1, 0, 0, 1, 2]
    parallel = parallel_of(2, 3)
    assert stages_of(1, parallel) == (1, 3, 5) and rank_of(4, parallel) == 0


def test_a_v_shape_hands_over_on_its_rank(monkeypatch):
    """Between the two stages of the last rank nothing is sent."""
    monkeypatch.setitem(schedule._SCHEDULES, "interleaved", schedule.Schedule("v", one_micro_batch))
    parallel = ParallelConfig(pipeline=2, virtual_stages=2, schedule="interleaved")
    assert [stages_of(rank, parallel) for rank in (0, 1)] == [(0, 3), (1, 2)]
    programs.cache_clear()
    found = programs(parallel, 1)
    programs.cache_clear()
    perform(found, 4)
    sent = {each.consumer for program in found for batch in program if not isinstance(batch, Pass) for each in batch}
    ends = [("forward", 1), ("forward", 3), ("backward", 2), ("backward", 0)]
    assert sent == {Pass(kind, stage, 0) for kind, stage in ends}


def one_micro_batch(stages: Sequence[int], rank: int, ranks: int, micro_batches: int) -> list[Pass]:
    forwards = [Pass("forward", stage, 0) for stage in stages]
    return forwards + [Pass("backward", stage, 0) for stage in reversed(stages)]
