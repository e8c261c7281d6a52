"""The picture of the experts, of runs side by side."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]


def write(path: Path, shares: list[list[int]], biases: bool) -> Path:
    """A run of four steps on two blocks, where the experts of each get so many tokens."""
    path.mkdir()
    rows = []
    for step in range(1, 5):
        layers = {}
        for block, tokens in enumerate(shares, start=1):
            layers[block] = {
                "max_over_mean": max(tokens) * len(tokens) / sum(tokens),
                "entropy": 0.9,
                "auxiliary": 1 + 1 / step,
                "tokens": tokens,
            }
            if biases:
                layers[block] |= {"bias_min": -step / 1000, "bias_max": step / 1000}
        rows.append({"step": step, "kind": "text", "loss": 5.0, "experts": layers})
    metrics = path / "metrics.jsonl"
    # Step 2 was done twice.
    metrics.write_text("".join(json.dumps(row) + "\n" for row in [*rows[:2], *rows[1:]]))
    return metrics


@pytest.fixture
def balanced(tmp_path) -> Path:
    return write(tmp_path / "balanced", [[10] * 8, [11, 9] * 4], biases=True)


@pytest.fixture
def unbalanced(tmp_path) -> Path:
    return write(tmp_path / "unbalanced", [[80] + [0] * 7, [40, 40] + [0] * 6], biases=False)


@pytest.fixture
def plot_experts(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    import plot_experts

    return plot_experts


def test_panels(plot_experts, balanced, unbalanced):
    runs = [plot_experts.Run(metrics) for metrics in (unbalanced, balanced)]
    figure = plot_experts.draw(runs)
    panels = figure.axes[:8]  # row by row, then the colour bars
    loads, balanced_loads = panels[:2]
    assert (loads.get_title(), balanced_loads.get_title()) == (str(unbalanced.parent), str(balanced.parent))
    first, second, mean = loads.lines
    assert list(first.get_xdata()) == [1, 2, 3, 4]
    assert [list(line.get_ydata()) for line in (first, second, mean)] == [[8] * 4, [4] * 4, [6] * 4]
    assert tuple(first.get_color()) != tuple(second.get_color())
    assert loads.get_ylim() == balanced_loads.get_ylim()
    no_biases, biases = panels[4:6]
    assert not no_biases.lines and [text.get_text() for text in no_biases.texts] == ["these routers have no biases"]
    assert sorted(line.get_ydata()[-1] for line in biases.lines) == [-0.004, -0.004, 0.004, 0.004]
    left, right = (axes.images[0] for axes in panels[6:8])
    assert left.get_array().tolist() == [[8] + [0] * 7, [4, 4] + [0] * 6]
    assert left.norm.vmax == right.norm.vmax == 8


def test_runs_without_biases_have_no_panel_for_them(plot_experts, unbalanced):
    figure = plot_experts.draw([plot_experts.Run(unbalanced)])
    labels = ["busiest expert / mean expert", "auxiliary loss", "block"]
    assert [axes.get_ylabel() for axes in figure.axes[:3]] == labels


def command(*options):
    return subprocess.run([sys.executable, "tools/plot_experts.py", *options], cwd=ROOT, capture_output=True, text=True)


def test_command_line(balanced, unbalanced, tmp_path):
    done = command("--metrics", unbalanced, balanced, "--output", tmp_path / "experts.png")
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "experts.png") as picture:
        assert picture.size == (1560, 1344)


def test_a_run_without_experts(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 1, "kind": "text", "loss": 5.0}\n')
    done = command("--metrics", metrics, "--output", tmp_path / "experts.png")
    assert done.returncode == 1 and done.stderr.startswith("plot_experts: ") and done.stderr.count("\n") == 1
    assert f"{metrics} has steps without experts" in done.stderr and "plot_loss.py" in done.stderr
    assert not (tmp_path / "experts.png").exists()
