"""Bubbles of the recipes on the papers' numbers of GPUs, with several ways to cut the model and to place the towers.

Simulated from the FLOPs of the passes, without time for messages.
"""

import argparse
from typing import Any

from benchmarks.record import write_json

from megavl.config.load import load_run
from megavl.config.rules import check
from megavl.config.run import RunConfig
from megavl.plan.split import ExpectedWork, expected_work, split, step_timeline

# Recipes with a pipeline and the GPUs that they are for.
RECIPES = {
    "vl_7b_stage2": 512,
    "vl2_tiny_stage2": 128,
    "vl2_tiny_stage3": 128,
    "vl2_small_stage1": 256,
    "vl2_small_stage2": 264,
    "vl2_small_stage3": 256,
    "vl2_base_stage1": 320,
    "vl2_base_stage2": 336,
    "vl2_base_stage3": 256,
}
# `parallel.stages` and `parallel.vision`; "equal" stands for numbers of items that differ by at most one.
WAYS = {
    "equal numbers, replicated": ("equal", "replicated"),
    "balanced, replicated": ("auto", "replicated"),
    "balanced, sharded": ("auto", "sharded"),
    "balanced, pipelined": ("auto", "pipelined"),
}


def run(args: argparse.Namespace) -> None:
    """Print the table."""
    rows = [row for recipe, world in RECIPES.items() for row in rows_of(recipe, world)]
    print("\n".join(page(rows)))
    if args.json:
        write_json(args.json, {"rows": rows})


def rows_of(recipe: str, world: int) -> list[dict[str, Any]]:
    """One for each way, in JSON types."""
    rows = []
    for name, (stages, vision) in WAYS.items():
        config = load_run(f"launch/recipes/{recipe}.yaml", [f"parallel.vision={vision}", "parallel.stages=auto"])
        if vision == "sharded" and config.parallel.tensor == 1:
            continue
        check(config, world)
        items = split(config, world) if stages == "auto" else equal_numbers(config)
        steps = [work for work in expected_work(config) if work.share]
        rows.append(
            {
                "recipe": recipe,
                "world": world,
                "way": name,
                "stages": list(map(len, items)),
                "micro_batches": config.train.micro_batches(world // config.parallel.model),
                "pipeline": config.parallel.pipeline,
                "steps": {work.name: step_row(config, world, items, work) for work in steps},
            }
        )
    return rows


def equal_numbers(config: RunConfig) -> tuple[range, ...]:
    """Stages whose numbers of items differ by at most one, the larger ones at the end."""
    count, layers = config.parallel.num_stages, config.model.layers
    borders = [layers * stage // count for stage in range(count + 1)]
    return tuple(map(range, borders, borders[1:]))


def step_row(config: RunConfig, world: int, stages: tuple[range, ...], work: ExpectedWork) -> dict[str, float]:
    """Share of the step in which ranks wait, and its FLOPs of one rank, waiting included."""
    micro_batches = config.train.micro_batches(world // config.parallel.model)
    timeline = step_timeline(config.parallel, stages, work, micro_batches)
    apart = micro_batches * work.towers.both
    whole = timeline.seconds + apart
    return {"bubble": 1 - (sum(timeline.busy) / len(timeline.busy) + apart) / whole, "flops": whole}


def page(rows: list[dict[str, Any]]) -> list[str]:
    """The result in Markdown."""
    lines = [
        "| recipe, GPUs | stages, images | items on each stage | if equally long | bubble, text | bubble, multimodal |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        ideal = 1 - 1 / (1 + (row["pipeline"] - 1) / row["micro_batches"])
        bubbles = (
            f"{row['steps'][kind]['bubble']:.1%}" if kind in row["steps"] else "" for kind in ("text", "multimodal")
        )
        lines.append(
            f"| {row['recipe']}, {row['world']} | {row['way']} | {', '.join(map(str, row['stages']))} | {ideal:.1%} | "
            f"{' | '.join(bubbles)} |"
        )
    return lines
