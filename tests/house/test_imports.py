"""The tools for data work without torch, whose import takes longer than most of their runs."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Runs a tool in a process in which torch cannot be imported.
WITHOUT_TORCH = """
import runpy, sys
sys.modules["torch"] = None
sys.argv = sys.argv[1:]
sys.path.insert(0, "tools")
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(command: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *command.split()], cwd=ROOT, capture_output=True, text=True
    )


def test_data_is_made_without_torch(tmp_path):
    for command in (
        f"tools/make_corpus.py --output {tmp_path} --size tiny",
        f"tools/train_tokenizer.py --input {tmp_path}/text.jsonl --output {tmp_path}/tokenizer.model --vocab-size 400",
        f"tools/preprocess_data.py --input {tmp_path}/text.jsonl --output-prefix {tmp_path}/text "
        f"--tokenizer {tmp_path}/tokenizer.model",
        f"tools/verify_data.py {tmp_path}/text --tokenizer {tmp_path}/tokenizer.model",
        f"tools/merge_data.py --input {tmp_path}/text {tmp_path}/text --output-prefix {tmp_path}/twice",
        f"tools/inspect_data.py {tmp_path}/text --tokenizer {tmp_path}/tokenizer.model",
    ):
        done = run(command)
        assert done.returncode == 0, f"{command}\n{done.stderr}"


def test_a_run_is_planned_without_torch():
    done = run("launch/pretrain.py --config launch/recipes/vl_7b_stage2.yaml --dry-run")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("tool", ["measure_packing", "construct_data", "plot_loss", "plot_experts", "benchmark"])
def test_help_needs_no_torch(tool):
    assert run(f"tools/{tool}.py --help").returncode == 0


def test_torch_cannot_be_imported_there():
    assert "torch" in run("launch/pretrain.py --config launch/recipes/vl_debug.yaml").stderr
