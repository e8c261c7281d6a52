"""The picture of a step's timeline."""

import subprocess
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[2]
STEM, IMAGES = (0xFD, 0xAE, 0x6B), (0x74, 0xC4, 0x76)


def plot(output: Path, *words: str) -> subprocess.CompletedProcess:
    command = [
        "tools/plot_timeline.py",
        "--config",
        "launch/recipes/vl_7b_stage2.yaml",
        "--output",
        str(output),
        *words,
    ]
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)


def colours(path: Path) -> set[tuple[int, int, int]]:
    with Image.open(path) as picture:
        return {colour for _, colour in picture.convert("RGB").getcolors(1 << 24)}


def test_images_have_bars_of_their_own_where_they_are_encoded_ahead(tmp_path):
    words = "--world", "512", "--micro-batches", "8", "parallel.vision=replicated"
    replicated, pipelined = tmp_path / "replicated.png", tmp_path / "pipelined.png"
    for path, more in ((replicated, ()), (pipelined, ("--vs", "parallel.vision=pipelined"))):
        done = plot(path, *words, *more)
        assert done.returncode == 0, done.stderr
    assert STEM in colours(replicated) and IMAGES not in _beside_the_legend(replicated)
    assert IMAGES in _beside_the_legend(pipelined)
    with Image.open(replicated) as one, Image.open(pipelined) as two:
        assert two.height > 1.5 * one.height  # a row of pictures for each setting


def _beside_the_legend(path: Path) -> set[tuple[int, int, int]]:
    with Image.open(path) as picture:
        upper = picture.convert("RGB").crop((0, 0, picture.width, int(picture.height * 0.8)))
        return {colour for _, colour in upper.getcolors(1 << 24)}


def test_a_run_that_cannot_start_has_no_timeline(tmp_path):
    done = plot(tmp_path / "timeline.png", "--world", "500")
    assert done.returncode == 1 and "500 ranks are not divisible" in done.stderr
    assert not (tmp_path / "timeline.png").exists()
