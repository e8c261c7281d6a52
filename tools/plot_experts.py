"""Draw how busy the routed experts of a run are, or of several runs side by side.

    python tools/plot_experts.py --metrics runs/NAME/metrics.jsonl [runs/OTHER/metrics.jsonl ...] --output experts.png

From top to bottom: load of the busiest expert over the mean of its layer, auxiliary loss, range of the biases where the
routers have some, each with a curve for each block; and how the tokens of the last steps were spread, expert by expert.
"""

import argparse
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # before pyplot: no window, also where there is a display

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap, TwoSlopeNorm
from plot_loss import counted_steps, read_attempts, save

LAST_STEPS = 10  # that the map of the experts shows together: one step alone is noisy


class Run:
    """The experts of a run over its steps: arrays [steps, blocks], tokens [steps, blocks, experts].

    Raises ValueError for metrics that cannot be read, or of a model without experts.
    """

    def __init__(self, metrics: Path):
        rows = counted_steps(read_attempts(metrics))
        if any("experts" not in row for row in rows):
            raise ValueError(
                f"{metrics} has steps without experts: the model has none, and there is nothing to draw but its loss "
                "(tools/plot_loss.py); give the metrics of a model with experts"
            )
        self.name = str(metrics.parent)
        self.steps = [row["step"] for row in rows]
        self.blocks = list(map(int, rows[0]["experts"]))
        self._loads = [list(row["experts"].values()) for row in rows]
        self.tokens = self["tokens"]

    def __getitem__(self, name: str) -> np.ndarray:
        return np.array([[block[name] for block in blocks] for blocks in self._loads])

    @property
    def has_biases(self) -> bool:
        return "bias_min" in self._loads[0][0]

    @property
    def relative_load(self) -> np.ndarray:
        """Tokens of each expert in the last steps over the mean of its block: [blocks, experts]."""
        tokens = self.tokens[-LAST_STEPS:].sum(axis=0)
        return tokens / tokens.mean(axis=1, keepdims=True)


def curves(axes: plt.Axes, run: Run, name: str, colours: dict[int, tuple], mean: bool = True) -> None:
    """One line for each block, and their mean."""
    for block, series in zip(run.blocks, run[name].T, strict=True):
        axes.plot(run.steps, series, color=colours[block], lw=1)
    if mean:
        axes.plot(run.steps, run[name].mean(axis=1), color="black", lw=2, label="mean of the blocks")


def biases(axes: plt.Axes, run: Run, colours: dict[int, tuple]) -> None:
    """The lowest and the highest bias of each block."""
    if not run.has_biases:
        axes.text(0.5, 0.5, "these routers have no biases", transform=axes.transAxes, ha="center", va="center")
        return
    for name in ("bias_min", "bias_max"):
        curves(axes, run, name, colours, mean=False)


def load_map(axes: plt.Axes, run: Run, most: float):
    """Expert by expert, a row for each block; returns what the colour bar needs."""
    shades = TwoSlopeNorm(vmin=0, vcenter=1, vmax=most)
    picture = axes.imshow(run.relative_load, cmap="PuOr_r", norm=shades, aspect="auto", interpolation="nearest")
    axes.set_yticks(range(len(run.blocks)), run.blocks)
    axes.yaxis.set_major_locator(plt.FixedLocator(range(0, len(run.blocks), -(-len(run.blocks) // 10))))
    shown = min(LAST_STEPS, len(run.steps))
    axes.set(xlabel="expert", title=f"tokens of each expert, last {shown} steps" if shown > 1 else "the only step")
    return picture


def draw(runs: list[Run]) -> plt.Figure:
    """The figure: a column for each run, with the same scales."""
    labels = ["busiest expert / mean expert", "auxiliary loss", "block"]
    if any(run.has_biases for run in runs):
        labels.insert(2, "lowest and highest bias")
    figure, grid = plt.subplots(
        len(labels),
        len(runs),
        figsize=(2 + 5.5 * len(runs), 2.8 * len(labels)),
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    for axes, label in zip(grid[:, 0], labels, strict=True):
        axes.set_ylabel(label)
    blocks = sorted({block for run in runs for block in run.blocks})
    levels = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(blocks)))
    colours = dict(zip(blocks, levels, strict=True))
    most = max(2.0, *(run.relative_load.max() for run in runs))
    for (loads, auxiliary, *rest, last), run in zip(grid.T, runs, strict=True):
        loads.set_title(run.name, fontweight="bold")
        curves(loads, run, "max_over_mean", colours)
        curves(auxiliary, run, "auxiliary", colours)
        for axes in rest:
            biases(axes, run, colours)
        for axes in (loads, auxiliary, *rest):
            axes.set_xlabel("step")
            axes.grid(alpha=0.3)
        picture = load_map(last, run, most)
    grid[0, 0].legend()
    places = range(0, len(blocks), -(-len(blocks) // 10))
    lines = ScalarMappable(BoundaryNorm(np.arange(len(blocks) + 1) - 0.5, len(blocks)), ListedColormap(levels))
    bar = figure.colorbar(lines, ax=grid[:-1], label="block", ticks=places)
    bar.set_ticklabels([blocks[place] for place in places])
    figure.colorbar(picture, ax=grid[-1:], label="tokens / mean of the block")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--metrics", type=Path, required=True, nargs="+", help="metrics.jsonl of a run, or of several")
    parser.add_argument("--output", type=Path, required=True, help="picture to write (.png, .svg, .pdf)")
    arguments = parser.parse_args()
    try:
        save(draw([Run(metrics) for metrics in arguments.metrics]), arguments.output)
    except ValueError as error:
        sys.exit(f"plot_experts: {error}")
    print(f"  {arguments.output}")


if __name__ == "__main__":
    main()
