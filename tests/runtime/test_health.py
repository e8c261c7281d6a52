import torch.distributed as dist

from megavl.runtime.health import RunError, together, together_with_remarks


def fail_on(ranks: set[int]) -> str | int:
    """What `together` gives on this rank when some ranks fail."""

    def action() -> int:
        if dist.get_rank() in ranks:
            raise ValueError(f"rank {dist.get_rank()} has a bad file")
        return dist.get_rank()

    try:
        return together(action, dist.new_group())
    except RunError as error:
        return str(error)


def test_all_is_well(pool):
    assert pool.run(3, fail_on, set()) == [0, 1, 2]


def test_one_rank_fails_and_all_say_so(pool):
    assert pool.run(3, fail_on, {1}) == ["rank 1 has a bad file"] * 3


def test_every_problem_is_said_once(pool):
    assert pool.run(2, fail_on, {0, 1}) == ["rank 0 has a bad file\nrank 1 has a bad file"] * 2


def raise_a_defect() -> str:
    def action() -> None:
        raise KeyError("a defect of the program, not of its input")

    try:
        together(action, dist.new_group())
    except KeyError:
        return "KeyError"


def test_defects_keep_their_traceback(pool):
    assert pool.run(1, raise_a_defect) == ["KeyError"]


def remark_on(ranks: set[int], failing: set[int] = frozenset()) -> tuple | str:
    def action() -> int:
        if dist.get_rank() in failing:
            raise ValueError(f"rank {dist.get_rank()} has a bad file")
        return dist.get_rank()

    try:
        return together_with_remarks(
            action, lambda rank: f"seen by {rank}" if rank in ranks else None, dist.new_group()
        )
    except RunError as error:
        return str(error)


def test_remarks_of_some_reach_all(pool):
    assert pool.run(3, remark_on, {0, 2}) == [(rank, ["seen by 0", "seen by 2"]) for rank in range(3)]
    assert pool.run(2, remark_on, set()) == [(0, []), (1, [])]


def test_a_failure_counts_more_than_a_remark(pool):
    assert pool.run(2, remark_on, {0}, {1}) == ["rank 1 has a bad file"] * 2
