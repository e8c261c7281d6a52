"""One process on a CUDA device: bf16 through a fused AdamW, and its checkpoint read on a CPU."""

import json

import pytest
import torch

from tests.launch.test_pretrain import ENVIRONMENT, interpreter, recipe

__all__ = ["recipe"]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_twenty_steps_learn_and_their_checkpoint_goes_on_on_a_cpu(recipe, tmp_path, monkeypatch):
    run = (f"output_dir={tmp_path}", "train.precision=bf16", "optim.lr=3e-3")
    monkeypatch.setitem(ENVIRONMENT, "DS_ACCELERATOR", "cuda")
    done = interpreter(recipe, "train.steps=20", *run)
    assert done.returncode == 0, done.stdout + done.stderr
    monkeypatch.setitem(ENVIRONMENT, "DS_ACCELERATOR", "cpu")
    done = interpreter(recipe, "train.steps=21", *run)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 22))
    assert rows[19]["loss"] < rows[0]["loss"] - 0.3
    assert rows[20]["loss"] == pytest.approx(rows[19]["loss"], abs=0.5)
