import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]


def measure(*arguments: str) -> list[list[str]]:
    """The cells of the printed table's rows."""
    done = subprocess.run(
        [sys.executable, "tools/measure_packing.py", *arguments],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    heading, _, *rows = done.stdout.splitlines()
    assert all(row.count("|") == heading.count("|") for row in rows)
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_made_up_sources():
    text = measure("--made-up", "c4", "--seq-len", "1024", "2048", "--packs", "1500")
    assert [row[:2] for row in text] == [["c4", "1024"], ["c4", "2048"]]
    assert all(float(row[2].rstrip("%")) > 99.8 for row in text)  # measured 99.93 and 99.94
    ((name, _, filled, of_image, of_pack, most, _, cut, cut_naively, cut_images),) = measure(
        "--made-up", "obelics", "captions", "--max-tiles", "5", "--packs", "300"
    )
    assert name == "obelics + captions" and (of_image, most) == ("1.0", "5") and 4 < float(of_pack) <= 5
    assert 60 < float(filled.rstrip("%")) < 90 and float(cut.rstrip("%")) < float(cut_naively.rstrip("%")) / 2
    assert 10 < float(cut_images.rstrip("%")) < 20  # 576 of 4096 tokens, near enough


def test_the_sources_of_a_recipe(corpus, tmp_path):
    recipe = yaml.safe_load((ROOT / "launch/recipes/vl_debug.yaml").read_text())
    recipe["data"] |= {
        "text": [{"prefix": corpus.prefix("text")}, {"prefix": corpus.prefix("more")}],
        "multimodal": [{"prefix": corpus.prefix("multimodal")}],
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    rows = measure("--config", str(path), "data.max_tiles=2", "--packs", "200")
    assert [row[:2] for row in rows] == [["text", "192"], ["multimodal", "192"]]
    assert (rows[0][5], rows[0][9]) == ("0", "0.0%") and rows[1][5] == "2"
    assert rows[0][7] == "0.0%" != rows[0][8]


def test_made_up_sources_in_tiles():
    ((_, seq_len, filled, of_image, of_pack, most, *_),) = measure(
        "--made-up", "obelics", "captions", "--model", "vl2_tiny", "--packs", "300"
    )
    assert seq_len == "4096" and float(filled.rstrip("%")) > 90
    assert 2 < float(of_image) < 10 and 10 < float(of_pack) < int(most) <= 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "launch/recipes/absent.yaml"], "error: no recipe launch/recipes/absent.yaml"),
        (["--config", "launch/recipes/vl_7b_stage2.yaml"], "error: dataset data/pretrain/text: "),
        (
            ["--made-up", "c4", "obelics", "--seq-len", "4096", "576", "--packs", "1"],
            "error: an image takes up to 576 tokens and is never split, so data.seq_len = 576 leaves no room",
        ),
        (
            ["--made-up", "obelics", "--model", "vl2_tiny", "--max-tiles", "9", "--packs", "1"],
            "error: an image takes up to 10 tiles, its overview included, and is never split, so no pack of "
            "data.max_tiles = 9 could hold it",
        ),
    ],
)
def test_what_cannot_be_measured_is_one_message(arguments, message):
    done = subprocess.run(
        [sys.executable, "tools/measure_packing.py", *arguments],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and done.stderr.startswith(message) and not done.stdout
