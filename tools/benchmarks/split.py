"""Bubbles of the recipes on the papers' numbers of GPUs, with several ways to cut the model and to place the towers.

Simulated from the FLOPs of the passes, without time for messages.
"""

import argparse
from dataclasses import replace
from typing import Any

from benchmarks.record import write_json

from megavl.config.load import load_run
from megavl.config.rules import check
from megavl.config.run import ParallelConfig, RunConfig
from megavl.plan.cost import PassFlops
from megavl.plan.expected_work import ExpectedWork, expected_work, step_timeline
from megavl.plan.split import equal_numbers, least_slowest, split_model
from megavl.plan.timeline import equal_stages_bubble

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
    "balanced, the encoder divided": ("divided", "sharded"),
}
# Parts of equal work into which "divided" cuts the vision encoder; SigLIP-L and SAM-B have 24 and 12 blocks.
_PARTS = 36


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
        if stages == "auto" and vision == "sharded" and config.parallel.tensor == 1:
            continue
        check(config, world)
        parallel, micro_batches = config.parallel, config.train.micro_batches(world // config.parallel.model)
        steps = [work for work in expected_work(config) if work.share]
        match stages:
            case "equal":
                items = equal_numbers(config.model.layers, parallel.num_stages)
            case "auto":
                items = split_model(config, world)
            case "divided":
                steps = [with_divided_encoder(config, work) for work in steps]
                items = least_slowest(steps, parallel.num_stages)
        rows.append(
            {
                "recipe": recipe,
                "world": world,
                "way": name,
                "stages": list(map(len, items)),
                "micro_batches": micro_batches,
                "equal_stages_bubble": equal_stages_bubble(parallel, micro_batches),
                "steps": {work.name: step_row(parallel, items, work, micro_batches) for work in steps},
            }
        )
        rows[-1]["mean_flops"] = sum(work.share * rows[-1]["steps"][work.name]["flops"] for work in steps)
    for row in rows:
        row["mean_time"] = row["mean_flops"] / next(each["mean_flops"] for each in rows if "pipelined" in each["way"])
    return rows


def with_divided_encoder(config: RunConfig, work: ExpectedWork) -> ExpectedWork:
    """The work of a step whose vision encoder is many items at the beginning of the model list, in place of one."""
    stem = work.items[0]
    text = next(each.items[0] for each in expected_work(config) if each.name == "text")
    part = PassFlops((stem.forward - text.forward) / _PARTS, (stem.backward - text.backward) / _PARTS)
    return replace(work, items=(*[part] * _PARTS, text, *work.items[1:]))


def step_row(
    parallel: ParallelConfig, stages: tuple[range, ...], work: ExpectedWork, micro_batches: int
) -> dict[str, float]:
    """Share of the step in which ranks wait, and its FLOPs of one rank, waiting included."""
    timeline = step_timeline(parallel, stages, work, micro_batches)
    encoding = micro_batches * work.towers.both
    return {"bubble": timeline.bubble_beside(encoding), "flops": timeline.seconds + encoding}


def page(rows: list[dict[str, Any]]) -> list[str]:
    """The result in Markdown. The time of a mean step, text and multimodal by their shares, is that over the pipelined
    way's."""
    lines = [
        "| recipe, GPUs | stages, images | items on each stage | if equally long | bubble, text | bubble, multimodal "
        "| time of a mean step |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        bubbles = (
            f"{row['steps'][kind]['bubble']:.1%}" if kind in row["steps"] else "" for kind in ("text", "multimodal")
        )
        lines.append(
            f"| {row['recipe']}, {row['world']} | {row['way']} | {', '.join(map(str, row['stages']))} | "
            f"{row['equal_stages_bubble']:.1%} | {' | '.join(bubbles)} | {row['mean_time']:.2f} |"
        )
    return lines
