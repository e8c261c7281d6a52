"""The automatic split, against all splits that there are."""

import random
from itertools import combinations, pairwise
from pathlib import Path

import pytest

from megavl.config.error import ConfigError
from megavl.config.load import load_run
from megavl.config.stages import split_layers
from megavl.plan.cost import PassFlops, item_passes, step_flops
from megavl.plan.expected_work import ExpectedWork, expected_work, step_timeline
from megavl.plan.fit import check_memory
from megavl.plan.mix import expected_steps
from megavl.plan.peak import StepMemory
from megavl.plan.split import least_slowest, split_model
from tests.config.runs import make_run

RECIPES = Path(__file__).parents[2] / "launch/recipes"


def all_splits(layers: int, count: int):
    for borders in combinations(range(1, layers), count - 1):
        yield tuple(range(start, stop) for start, stop in pairwise((0, *borders, layers)))


def mean_slowest(work: tuple[ExpectedWork, ...], stages: tuple[range, ...]) -> float:
    return sum(
        step.share
        * max(sum(step.items[item].forward + step.items[item].backward for item in items) for items in stages)
        for step in work
    )


@pytest.mark.parametrize("shares", [(1.0,), (0.7, 0.3), (0.5, 0.5), (0.05, 0.95)])
def test_no_split_has_less_slow_stages(shares):
    draw = random.Random(0)
    for _ in range(40):
        layers, count = draw.randint(4, 9), draw.randint(1, 4)
        work = tuple(
            ExpectedWork(
                "text", share, tuple(PassFlops(draw.randint(0, 9), draw.randint(0, 19)) for _ in range(layers))
            )
            for share in shares
        )
        found = least_slowest(work, count)
        assert [item for items in found for item in items] == list(range(layers)) and all(found)
        assert mean_slowest(work, found) == min(mean_slowest(work, each) for each in all_splits(layers, count))


def test_of_equal_splits_the_most_even():
    """The last item is as long as all others together; these are not left on one stage."""
    work = ExpectedWork("text", 1.0, tuple(PassFlops(1, 2) for _ in range(6)) + (PassFlops(6, 12),))
    assert least_slowest([work], 4) == (range(2), range(2, 4), range(4, 6), range(6, 7))


@pytest.mark.parametrize("parallel", [{}, {"tensor": 2}, {"tensor": 2, "sequence": True, "vision": "sharded"}])
@pytest.mark.parametrize("recompute", ["off", "block"])
def test_passes_have_the_work_of_a_step(parallel, recompute):
    """Forward and backward passes of all micro-batches, over all ranks."""
    config = make_run(parallel=parallel, train={"recompute": recompute})
    counts = {"tokens": 4608, "supervised_tokens": 4000, "squared_tokens": 4608 * 100, "tiles": 30}
    both = sum(each.both for each in item_passes(config, **counts))
    assert both * config.parallel.tensor == pytest.approx(step_flops(config, **counts).hardware, rel=1e-12)
    forward = sum(each.forward for each in item_passes(config, **counts))
    assert forward < both / 2  # a backward pass costs more


def bubble(config, stages, name: str, world: int) -> float:
    (work,) = (each for each in expected_work(config) if each.name == name)
    return step_timeline(
        config.parallel, stages, work, config.train.micro_batches(world // config.parallel.model)
    ).bubble


@pytest.mark.parametrize(
    ("recipe", "world"),
    [("vl_7b_stage2", 512), ("vl2_tiny_stage2", 128), ("vl2_tiny_stage3", 128), ("vl2_base_stage3", 256)],
)
def test_no_recipe_is_slower_than_with_equal_numbers_of_items(recipe, world):
    config = load_run(RECIPES / f"{recipe}.yaml", ["parallel.stages=auto"])
    even = split_layers(config.model.layers, config.parallel.model_copy(update={"stages": None}))
    automatic, given = (
        sum(
            work.share
            * step_timeline(
                config.parallel, stages, work, config.train.micro_batches(world // config.parallel.model)
            ).seconds
            for work in expected_work(config)
        )
        for stages in (split_model(config, world), even)
    )
    assert automatic < given


def test_vl_7b_on_512_ranks():
    """The even split leaves the first and the last stage twice as long as the bubble of the schedule."""
    config = load_run(RECIPES / "vl_7b_stage2.yaml", ["parallel.stages=auto", "data.text_ratio=1"])
    stages, even = split_model(config, 512), split_layers(32, config.parallel.model_copy(update={"stages": None}))
    assert [len(items) for items in stages] == [5, 4, 4, 4, 4, 4, 4, 3]
    ideal = 7 / (72 + 7)
    assert bubble(config, stages, "text", 512) < ideal + 0.01  # 0.091 of 0.089
    assert bubble(config, even, "text", 512) > ideal + 0.15  # 0.246


@pytest.mark.parametrize(("virtual_stages", "most"), [(2, 0.05), (3, 0.15)])  # 0.045 of 0.046, and 0.145 of 0.031
def test_interleaved_stages_fill_their_ranks(virtual_stages, most):
    """The slowest stage alone says little: of 24 stages, the head is one, twice as long as a block."""
    overrides = [f"parallel.virtual_stages={virtual_stages}", "parallel.schedule=interleaved", "data.text_ratio=1"]
    config = load_run(RECIPES / "vl_7b_stage2.yaml", ["parallel.stages=auto", *overrides])
    (work, _) = expected_work(config)
    first = least_slowest([work], config.parallel.num_stages)
    assert bubble(config, split_model(config, 512), "text", 512) < most
    assert bubble(config, first, "text", 512) >= bubble(config, split_model(config, 512), "text", 512)


def test_a_kind_that_never_comes_has_no_say():
    text, mixed, images = (
        split_model(make_run(parallel={"pipeline": 4}, data={"text_ratio": ratio}), 4) for ratio in (1, 0.5, 0)
    )
    assert len(text[0]) > len(mixed[0]) >= len(images[0])


def limit_memory(monkeypatch: pytest.MonkeyPatch, size_bytes: int) -> None:
    for module in ("split", "fit"):
        monkeypatch.setattr(f"megavl.plan.{module}.usable_bytes", lambda _: size_bytes)


def test_stages_fit_the_memory(monkeypatch):
    """Less and less memory, down to what no split has: as fast as any split that fits, which the first ones do not."""
    parallel = {"pipeline": 3, "device": "h100"}
    config = make_run(model={"decoder": {"layers": 7}}, parallel=parallel, data={"text_ratio": 1}, optim={"rules": []})
    (work,) = (each for each in expected_work(config) if each.share)
    (step,) = (each for each in expected_steps(config) if each.share)
    memory = StepMemory(config, 3, step)
    most = {each: max(memory.peak(rank, each).total for rank in range(3)) for each in all_splits(9, 3)}
    seconds = {each: step_timeline(config.parallel, each, work, 24).seconds for each in most}
    found = set()
    for limit in sorted(set(most.values())):
        limit_memory(monkeypatch, limit)
        changed = make_run(
            model={"decoder": {"layers": 7}},
            parallel=parallel,
            data={"text_ratio": 1},
            optim={"rules": []},
            train={"seed": limit % 2**31},
        )
        stages = split_model(changed, 3)
        assert most[stages] <= limit
        assert seconds[stages] == min(seconds[each] for each in most if most[each] <= limit)
        check_memory(changed, 3)
        found.add(stages)
    assert len(found) > 1
    limit_memory(monkeypatch, min(most.values()) - 1)
    with pytest.raises(ConfigError, match="parallel.device = h100: pipeline rank . would need"):
        check_memory(config.model_copy(update={"output_dir": "other"}), 3)
