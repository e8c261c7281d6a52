"""Draw the loss of a run, one curve per modality, with a mark wherever it was interrupted and resumed.

    python tools/plot_loss.py --metrics runs/NAME/metrics.jsonl --output loss.png

A resumed run appends to the file and repeats the steps after its checkpoint: those are drawn twice, the first time as
open circles, the second time as the curve, which must go through them.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # before pyplot: no window, also where there is a display

import matplotlib.pyplot as plt

_COLOURS = {"text": "#1f6fb4", "multimodal": "#d9622b"}


def read_attempts(path: Path) -> list[list[dict]]:
    """The steps of each attempt at the run, in order: an attempt ends where the step number does not rise.

    Raises ValueError for a file that cannot be read or holds no step, naming the line that is not a step.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}): there is nothing to draw; give the metrics.jsonl in a run's "
            "directory with --metrics"
        ) from error
    attempts, last = [], None
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            step, _, _ = row["step"], row["kind"], row["loss"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}:{number}: not a step of metrics.jsonl ({error})") from error
        if last is None or step <= last:
            attempts.append([])
        attempts[-1].append(row)
        last = step
    if not attempts:
        raise ValueError(f"{path} holds no step: there is nothing to draw; wait for the run's first step")
    return attempts


def counted_steps(attempts: list[list[dict]]) -> list[dict]:
    """The steps in order, each as the last attempt at it did it."""
    final = {row["step"]: row for attempt in attempts for row in attempt}
    return [final[step] for step in sorted(final)]


def lost_steps(attempts: list[list[dict]]) -> list[dict]:
    """The steps of every attempt that a later attempt did again."""
    return [
        row
        for attempt, following in zip(attempts, attempts[1:], strict=False)
        for row in attempt
        if row["step"] >= following[0]["step"]
    ]


def draw(attempts: list[list[dict]], title: str) -> plt.Figure:
    """The figure: curves of the steps that count, circles for those that were lost, marks between attempts."""
    rows, lost = counted_steps(attempts), lost_steps(attempts)
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    for kind, colour in _COLOURS.items():
        mine = [row for row in rows if row["kind"] == kind]
        axes.plot([r["step"] for r in mine], [r["loss"] for r in mine], ".-", color=colour, label=kind, lw=1.2, ms=4)
        again = [row for row in lost if row["kind"] == kind]
        axes.plot([r["step"] for r in again], [r["loss"] for r in again], "o", color=colour, mfc="none", ms=9)
    if lost:
        axes.plot([], [], "o", color="grey", mfc="none", ms=9, label="before the kill, done again after it")
    for attempt, following in zip(attempts, attempts[1:], strict=False):
        for step, style, word in (
            (attempt[-1]["step"], "-", f"stopped after step {attempt[-1]['step']}"),
            (following[0]["step"], "--", f"resumed at step {following[0]['step']}"),
        ):
            axes.axvline(step, color="black", ls=style, lw=1, label=word)
    axes.set(xlabel="step", ylabel="loss, nats per supervised token", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def save(figure: plt.Figure, output: Path) -> None:
    """Write the picture, and the directory it is to be in.

    Raises ValueError where that cannot be written or is no kind of picture; nothing is left then.
    """
    partial = output.with_name(f"partial.{output.name}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(partial, dpi=120)
        os.replace(partial, output)
    except OSError as error:
        if partial.is_file():
            partial.unlink()
        raise ValueError(f"{output} cannot be written ({error.strerror}); choose another --output") from error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--metrics", type=Path, required=True, help="metrics.jsonl of a run")
    parser.add_argument("--output", type=Path, required=True, help="picture to write (.png, .svg, .pdf)")
    arguments = parser.parse_args()
    try:
        save(draw(read_attempts(arguments.metrics), str(arguments.metrics.parent)), arguments.output)
    except ValueError as error:
        sys.exit(f"plot_loss: {error}")
    print(f"  {arguments.output}")


if __name__ == "__main__":
    main()
