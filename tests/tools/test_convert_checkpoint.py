"""The command lines of the converter."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from megavl.checkpoint.reader import Checkpoint
from tests.checkpoint.models import SIGLIP_ONLY, train_tokenizer, weights, write_checkpoint

ROOT = Path(__file__).parents[2]


def _convert(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "tools/convert_checkpoint.py", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def _refused(*arguments: object) -> str:
    """The one line with which the command ended."""
    done = _convert(*arguments)
    assert done.returncode == 1 and done.stderr.startswith("convert_checkpoint: ") and done.stderr.count("\n") == 1
    return done.stderr


def test_missing_input_and_output_below_a_file(tmp_path):
    said = _refused("from-hf", "--input", tmp_path / "gone", "--output", tmp_path / "back")
    assert "gone is no directory with a config.json" in said and "model.safetensors" in said
    assert not list(tmp_path.iterdir())
    checkpoint = write_checkpoint(tmp_path / "checkpoints", SIGLIP_ONLY, torch.bfloat16)
    (tmp_path / "file").touch()
    said = _refused(
        "to-hf", "--checkpoint", checkpoint, "--output", tmp_path / "file" / "hf", "--layout", "transformers"
    )
    assert "file/hf cannot be made (" in said and "choose another --output" in said
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoints", "file"}


def test_there_and_back(tmp_path):
    tokenizer = train_tokenizer(tmp_path / "tokenizer.model")
    write_checkpoint(tmp_path / "run" / "checkpoints", SIGLIP_ONLY, torch.bfloat16, tmp_path / "moved.model")
    there = ("to-hf", "--checkpoint", tmp_path / "run", "--output", tmp_path / "hf", "--layout", "deepseek")
    refused = _convert(*there)
    assert refused.returncode == 1
    assert refused.stderr.startswith("convert_checkpoint: the run's tokenizer")
    assert not (tmp_path / "hf").exists()
    out = _convert(*there, "--tokenizer", tokenizer, "--max-shard-size", "0.0003")
    assert out.returncode == 0, out.stderr
    assert "model-00001-of-0000" in out.stdout
    back = _convert("from-hf", "--input", tmp_path / "hf", "--output", tmp_path / "back")
    assert back.returncode == 0, back.stderr
    checkpoint = Checkpoint(tmp_path / "back" / "step_00000000")
    for name, tensor in weights(SIGLIP_ONLY, torch.bfloat16).items():
        assert torch.equal(checkpoint.read_tensor(f"param.{name}", torch.bfloat16), tensor)
