"""Draw when each pipeline rank of a run works and when it waits, without a GPU.

    python tools/plot_timeline.py --config launch/recipes/vl_7b_stage2.yaml --world 512 --output timeline.png \\
        [--vs "parallel.stages=null parallel.vision=replicated"] [--micro-batches 16] [section.field=value ...]

For a text step and a multimodal step: a row for each rank, forward passes light and backward passes dark. The stage
with the stem, and the encoding of images before and after the passes, have colours of their own. Simulated from the
FLOPs of the passes, without time for messages. Each --vs adds the same run with other settings, on the same scale.
"""

import argparse
import shlex
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # before pyplot: no window, also where there is a display

import matplotlib.pyplot as plt
from matplotlib.patches import Patch
from plot_loss import save

from megavl.config.error import ConfigError
from megavl.config.load import load_run
from megavl.config.rules import check
from megavl.config.run import RunConfig
from megavl.plan.expected_work import ExpectedWork, expected_work, step_timeline
from megavl.plan.split import split_model

_IMAGES = "images, before and after the passes"
COLOURS = {
    "forward": "#9ecae1",
    "backward": "#3182bd",
    "forward, stage with the stem": "#fdae6b",
    "backward, stage with the stem": "#e6550d",
    _IMAGES: "#74c476",
}


def draw(axes: plt.Axes, config: RunConfig, world: int, work: ExpectedWork, micro_batches: int) -> float:
    """One step, and its bubble; time in FLOPs of one rank."""
    timeline = step_timeline(config.parallel, split_model(config, world), work, micro_batches)
    before, after = (micro_batches * part for part in (work.towers.forward, work.towers.backward))
    end = before + timeline.seconds
    for rank, spans in enumerate(timeline.spans):
        for kind in ("forward", "backward"):
            for stem in (False, True):
                bars = [
                    (before + span.start, span.end - span.start)
                    for span in spans
                    if span.action.kind == kind and (span.action.stage == 0) == stem
                ]
                colour = COLOURS[kind + ", stage with the stem" * stem]
                axes.broken_barh(bars, (rank - 0.4, 0.8), facecolor=colour, edgecolor="white", linewidth=0.2)
        images = [(0, before), (end, after)]
        axes.broken_barh([bar for bar in images if bar[1]], (rank - 0.4, 0.8), facecolor=COLOURS[_IMAGES])
    axes.invert_yaxis()
    axes.set_yticks(range(len(timeline.spans)))
    return timeline.bubble_beside(before + after)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="RECIPE.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    parser.add_argument("--world", type=int, required=True, help="ranks")
    parser.add_argument("--vs", action="append", default=[], metavar="'OVERRIDE ...'", help="another setting")
    parser.add_argument("--micro-batches", type=int, help="that are drawn (default: those of a step)")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_intermixed_args()
    settings = []
    try:
        for beyond in ["", *args.vs]:
            config = load_run(args.config, [*args.overrides, *shlex.split(beyond)])
            check(config, args.world)
            settings.append((beyond or " ".join(args.overrides) or "as the recipe says", config))
    except ConfigError as error:
        sys.exit(f"error: {error}")
    ranks = settings[0][1].parallel.pipeline
    figure, rows = plt.subplots(
        len(settings), 2, figsize=(15, (0.7 + 0.22 * ranks) * len(settings) + 1), sharex=True, squeeze=False
    )
    for row, (name, config) in zip(rows, settings, strict=True):
        micro_batches = args.micro_batches or config.train.micro_batches(args.world // config.parallel.model)
        for axes, work in zip(row, expected_work(config), strict=True):
            bubble = draw(axes, config, args.world, work, micro_batches)
            axes.set_title(f"{work.name} step, bubble {bubble:.1%}\n{name}", fontsize=8)
        row[0].set_ylabel("pipeline rank", fontsize=8)
    for axes in rows[-1]:
        axes.set_xlim(left=0)
        axes.set_xticks([])
        axes.set_xlabel("time", fontsize=8)
    figure.legend(
        handles=[Patch(color=colour, label=label) for label, colour in COLOURS.items()],
        loc="lower center",
        ncols=len(COLOURS),
        fontsize=8,
        frameon=False,
    )
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    try:
        save(figure, args.output)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
