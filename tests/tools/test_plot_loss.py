"""The loss curve across a kill and a resume."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]


def row(step, loss=5.0):
    return {"step": step, "kind": "text" if step % 2 else "multimodal", "loss": loss}


@pytest.fixture
def plot_loss(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    import plot_loss

    return plot_loss


@pytest.fixture
def metrics(tmp_path):
    """Steps 1 to 7, a kill, and steps 5 to 10 done from a checkpoint."""
    path = tmp_path / "metrics.jsonl"
    rows = [row(step, 8 - step / 4) for step in range(1, 8)] + [row(step, 8.01 - step / 4) for step in range(5, 11)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_attempts_and_lost_steps(plot_loss, metrics):
    attempts = plot_loss.read_attempts(metrics)
    assert [[r["step"] for r in attempt] for attempt in attempts] == [list(range(1, 8)), list(range(5, 11))]
    assert [r["step"] for r in plot_loss.lost_steps(attempts)] == [5, 6, 7]


def test_the_curve_takes_the_later_attempt(plot_loss, metrics):
    (axes,) = plot_loss.draw(plot_loss.read_attempts(metrics), "run").axes
    curves = {line.get_label(): line for line in axes.lines}
    assert list(curves["text"].get_xdata()) == [1, 3, 5, 7, 9]
    assert list(curves["text"].get_ydata()) == [7.75, 7.25, 6.76, 6.26, 5.76]
    assert list(curves["stopped after step 7"].get_xdata()) == [7, 7]
    assert list(curves["resumed at step 5"].get_xdata()) == [5, 5]
    circles = [line for line in axes.lines if line.get_marker() == "o" and len(line.get_xdata())]
    assert [list(line.get_xdata()) for line in circles] == [[5, 7], [6]]


def command(*options):
    return subprocess.run([sys.executable, "tools/plot_loss.py", *options], cwd=ROOT, capture_output=True, text=True)


def test_command_line(metrics, tmp_path):
    done = command("--metrics", metrics, "--output", tmp_path / "loss.png")
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "loss.png") as picture:
        assert picture.size == (1080, 600)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.png", "metrics.jsonl"]


def refused(*options) -> str:
    """The one line with which the command ended."""
    done = command(*options)
    assert done.returncode == 1 and done.stderr.startswith("plot_loss: ") and done.stderr.count("\n") == 1
    return done.stderr


@pytest.mark.parametrize(("text", "message"), [("", "holds no step"), ('{"step": 1}\n', "metrics.jsonl:1")])
def test_bad_metrics(text, message, tmp_path):
    (tmp_path / "metrics.jsonl").write_text(text)
    assert message in refused("--metrics", tmp_path / "metrics.jsonl", "--output", tmp_path / "loss.png")
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_missing_metrics(tmp_path):
    message = refused("--metrics", tmp_path / "metrics.jsonl", "--output", tmp_path / "loss.png")
    assert "metrics.jsonl cannot be read (No such file or directory)" in message and "--metrics" in message


def test_the_directory_of_the_picture_is_made(plot_loss, metrics, tmp_path):
    figure = plot_loss.draw(plot_loss.read_attempts(metrics), "run")
    plot_loss.save(figure, tmp_path / "made" / "here" / "loss.png")
    assert [path.name for path in (tmp_path / "made" / "here").iterdir()] == ["loss.png"]
    with pytest.raises(ValueError, match="loss.png cannot be written \\(.*; choose another --output"):
        plot_loss.save(figure, metrics / "loss.png")
    (tmp_path / "taken.png").mkdir()
    with pytest.raises(ValueError, match="taken.png cannot be written"):
        plot_loss.save(figure, tmp_path / "taken.png")
    assert not list(tmp_path.glob("partial.*"))
