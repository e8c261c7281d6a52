"""Alignment of an optimizer's flat buffers to 128 bytes, on every rank and under every ZeRO stage.

A misaligned weight slows a GPU's products down or makes them fail; a CPU shows no difference.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import Tensor, nn

from megavl.config.load import load_run
from megavl.config.run import RunConfig
from tests.runtime.cases import MODEL, RECIPES, VL2, build, run_config

UNIT_BYTES = 128


def of_recipe(path: Path, zero: int) -> RunConfig:
    """A tiny model of the recipe's family in the recipe's optimizer groups."""
    recipe = load_run(path)
    model = MODEL if recipe.model.tiling is None else VL2["base" if "base" in recipe.model.name else "small"]
    optim = recipe.optim.model_dump(include={"rules", "weight_decay"})
    return run_config(model=model, optim=optim, train={"precision": "bf16", "micro_batch": 12}, parallel={"zero": zero})


def of_mesh(world: int, model: str, **parallel) -> RunConfig:
    train = {"precision": "fp32" if parallel.get("zero") == 0 else "bf16", "micro_batch": 1}
    return run_config(world, model=({"vl": MODEL} | VL2)[model], train=train, parallel=parallel)


# Every parameter trains, those of one element too.
MESHES = {
    1: [of_mesh(1, model, zero=zero) for model in ("vl", "base") for zero in (1, 2, 3)],
    2: [
        *(of_mesh(2, model, zero=zero) for model in ("vl", "small") for zero in (1, 2, 3)),
        of_mesh(2, "vl", tensor=2),
        of_mesh(2, "vl", pipeline=2, schedule="interleaved", virtual_stages=2),
        *(of_mesh(2, "base", expert=2, zero=zero) for zero in (1, 2)),
    ],
    3: [of_mesh(3, model, zero=zero) for model in ("vl", "tiny") for zero in (1, 2, 3)],
    4: [of_mesh(4, "small", tensor=2, expert=2, expert_width="cut"), of_mesh(4, "base", expert=2, zero=2)],
}


def misaligned(configs: list[RunConfig]) -> list[list[str]]:
    """Of each run, the misaligned parameters, masters, moments and gradients of this rank."""
    return [list(_misaligned(config)) for config in configs]


def _misaligned(config: RunConfig) -> Iterator[str]:
    replica = build(config)
    stages, engine, held = replica.stages, replica.engine, replica.fragments()
    kinds = {fragment.kind for fragment in held}
    assert kinds == {"param", "master", "exp_avg", "exp_avg_sq"}
    for fragment in held:
        if begins(fragment.values) % UNIT_BYTES:
            yield f"{fragment.key} begins at byte {begins(fragment.values)}"
    spacers = set(stages[0].spacers)
    gradients = [gradient for parameter, gradient in gradients_of(engine.optimizer) if parameter not in spacers]
    assert gradients
    for gradient in gradients:
        if begins(gradient) % UNIT_BYTES:
            yield f"a gradient of shape {tuple(gradient.shape)} begins at byte {begins(gradient)}"


def begins(values: Tensor) -> int:
    """Bytes from the start of the allocation."""
    return values.storage_offset() * values.element_size()


def gradients_of(optimizer) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Parameters and this rank's part of their fp32 gradients, in each of DeepSpeed's three optimizers."""
    if hasattr(optimizer, "bf16_groups"):  # ZeRO-1 in bf16
        for group, gradients in zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients, strict=True):
            yield from zip(group, gradients, strict=True)
        for group, flat in zip(optimizer.bf16_groups, optimizer.fp32_groups_gradient_flat_partition, strict=True):
            yield group[0], flat  # this rank's partition
    elif hasattr(optimizer, "bit16_groups"):  # ZeRO-2
        for index, group in enumerate(optimizer.params_in_partition):
            yield from zip(group, optimizer._build_compact_grad_partition_buffer(index), strict=False)
    else:  # ZeRO-3
        partitions = optimizer._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
        yield from ((parameter, partitions[parameter.ds_id]) for group in optimizer.fp16_groups for parameter in group)


@pytest.mark.parametrize("world", MESHES)
def test_every_parameter_begins_at_a_whole_unit(pool, world):
    for config, *by_rank in zip(MESHES[world], *pool.run(world, misaligned, MESHES[world]), strict=True):
        assert not any(by_rank), (config.model.name, config.parallel, by_rank)


def test_the_groups_of_every_recipe_are_aligned(pool):
    """Recipes with the same groups, such as the second and the third stage of a model, are looked at once."""
    configs = {of_recipe(path, zero).model_dump_json(): of_recipe(path, zero) for path in RECIPES for zero in (1, 2, 3)}
    assert len(configs) > 12
    (by_run,) = pool.run(1, misaligned, list(configs.values()))
    assert not any(by_run), [found for found in zip(configs, by_run, strict=True) if found[1]]


def test_an_odd_parameter_without_a_spacer_would_be_noticed(pool):
    (by_run,) = pool.run(1, misaligned_without_spacers, MESHES[1][:1])
    assert len(by_run[0]) > 10


def misaligned_without_spacers(configs: list[RunConfig]) -> list[list[str]]:
    import megavl.runtime.deepspeed.engine as engine

    engine.spaced = lambda parameters, zero, ranks: parameters
    return misaligned(configs)
