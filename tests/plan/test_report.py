import re
import subprocess
import sys
from pathlib import Path

import pytest

from megavl.config.load import load_run
from megavl.config.parameters import parameters
from megavl.config.presets import PRESETS
from megavl.plan.report import describe
from tests.config.runs import make_run

ROOT = Path(__file__).parents[2]


def rows(text: str, heading: str) -> list[list[str]]:
    """Cells of the table whose heading begins so."""
    lines = text.splitlines()
    start = next(index for index, line in enumerate(lines) if line.strip().startswith(heading)) + 2
    stop = lines.index("", start) if "" in lines[start:] else len(lines)
    return [re.split(r"  +", line.strip()) for line in lines[start:stop]]


def test_7b_on_512_ranks():
    config = load_run(ROOT / "launch/recipes/vl_7b_stage2.yaml", ["parallel.tensor=2", "parallel.pipeline=8"])
    text = describe(config, 512)
    assert "tensor 2 (sequence parallel) x pipeline 8 x data 32, ZeRO-1, bf16" in text
    assert "7,331,390,721 = 6,938,818,561 trainable + 392,572,160 frozen" in text
    assert "2304 packs of 4096 tokens = 9,437,184 tokens; each rank runs 72 micro-batches of 4,096 tokens" in text
    stages = rows(text, "stage")
    assert [stage[2] for stage in stages] == [
        "stem, blocks 0-3",
        *(f"blocks {first}-{first + 3}" for first in range(4, 28, 4)),
        "blocks 28-29, head",
    ]
    for column in (5, 6):  # shares of a step
        assert abs(sum(float(stage[column].rstrip("%")) for stage in stages) - 100) < 0.5
    # Each of the eight ranks of a pipeline holds one half of every cut matrix, and everything else whole.
    held = sum(parameter.local_size(config.parallel) for parameter in parameters(config.model)) / 1e6
    assert abs(sum(float(stage[3].split()[0]) + float(stage[4].split()[0]) for stage in stages) - held) < 0.1


def test_bubbles_beside_equal_numbers_of_items():
    """The head is as long as two blocks in a text step, and the towers are in a multimodal one."""
    text = describe(load_run(ROOT / "launch/recipes/vl_7b_stage2.yaml", ["parallel.vision=replicated"]), 512)
    assert "Bubble of 1f1b with 72 micro-batches; it is 8.9% if all stages take equally long." in text
    (chosen, equal, *_) = rows(text, "step  of the steps")
    assert chosen[:3] == ["text", "70%", "as above"] and equal[2] == "equal numbers of items"
    assert float(chosen[3].rstrip("%")) < 9.5 < 24 < float(equal[3].rstrip("%"))
    assert "In a multimodal step pp rank 7 has 50% of the work of pp rank 0 and waits for it: its stem encodes" in text
    given = load_run(ROOT / "launch/recipes/vl_7b_stage2.yaml", ["parallel.stages=null"])
    assert "In a text step pp rank 0 has 61% of the work of pp rank 7 and waits for it: parallel.stages=auto" in (
        describe(given, 512)
    )


def test_interleaved_ranks_hold_several_stages():
    text = describe(make_run(parallel={"pipeline": 3, "schedule": "interleaved", "virtual_stages": 2}), 6)
    assert [stage[1] for stage in rows(text, "stage")] == ["0", "1", "2", "0", "1", "2"]
    assert [rank[0] for rank in rows(text, "pp rank")] == ["0", "1", "2"]
    stages, ranks = rows(text, "stage"), rows(text, "pp rank")
    first = sum(float(stages[s][3].split()[0]) for s in (0, 3))
    # Gradients are fp32, and nothing is frozen.
    assert float(ranks[0][2]) == pytest.approx(4 * first * 1e6 / 2**30, abs=0.006)


def test_vl2_small_on_48_ranks():
    parallel = {"tensor": 2, "sequence": True, "pipeline": 3, "stages": [8, 10, 11], "expert": 4}
    config = make_run(
        model=PRESETS["vl2_small"],
        data={"seq_len": 4096},
        parallel=parallel,
        train={"global_batch": 64},
    )
    text = describe(config, 48)
    assert "tensor 2 (sequence parallel) x pipeline 3 x data 8 (experts over 4, whole), ZeRO-1" in text
    assert "parameters: 16,133,111,152 = 16,133,111,152 trainable + 0 frozen" in text
    assert "active: 2,878,061,936 of them" in text
    assert "4 images (8 tiles) each, and equally busy experts" in text
    assert "ZeRO-1 over 8 data-parallel ranks; 2 for routed experts" in text
    held = sum(parameter.local_size(config.parallel) for parameter in parameters(config.model)) / 1e6
    ranks = rows(text, "pp rank  weights")
    assert sum(float(rank[1]) for rank in ranks) == pytest.approx(2 * held * 1e6 / 2**30, abs=0.02)
    # Of the middle rank: weights of 2 bytes, and 12 more of what it trains, experts over 2 ranks and the rest over 8.
    experts = 10 * 64 // 4 * 3 * 2048 * 1408
    weights, optimizer = float(ranks[1][1]), float(ranks[1][3])
    assert optimizer == pytest.approx(12 * (experts / 2 + (weights * 2**29 - experts) / 8) / 2**30, abs=0.02)


def test_memory_of_a_device():
    sizes = ["parallel.pipeline=2", "parallel.tensor=1", "parallel.sequence=false", "parallel.vision=replicated"]
    overrides = ["parallel.device=a100-40g", *sizes]
    recipe = ROOT / "launch/recipes/vl_7b_stage2.yaml"
    text = describe(load_run(recipe, [*overrides, "train.recompute=block"]), 512)
    assert "Of a100-40g, 35.5 GiB are for the run." in text
    ranks = rows(text, "pp rank  weights")
    assert [rank[-1] for rank in ranks] == ["yes", "yes"]
    with_all, with_block = (
        load_run(recipe, [*overrides, f"train.recompute={mode}", "train.micro_batch=2", "parallel.stages=[16,16]"])
        for mode in ("off", "block")
    )
    text = describe(with_all, 512)
    first = rows(text, "pp rank  weights")[0]
    assert first[-1] == "NO" and float(first[7]) > 35.5
    assert "parallel.device = a100-40g: pipeline rank 0 would need" in text
    assert "are activations of the passes: recompute more (train.recompute)" in text
    assert "Seconds are those at the peak rate of a100-40g" in text
    # The columns of other kinds of recomputation are what a run with them needs.
    assert first[10] == rows(describe(with_block, 512), "pp rank  weights")[0][7]


def test_messages_of_a_step():
    text = describe(load_run(ROOT / "launch/recipes/vl_7b_stage2.yaml", ["parallel.vision=pipelined"]), 512)
    assert "pp rank  tensor  pipeline  data  images\n" in text
    ranks = rows(text, "pp rank  tensor")
    # Hidden states [4096 / 2, 4096] in bf16 of 72 micro-batches: rank 0 sends them forward, rank 1 both ways.
    assert [float(rank[2]) for rank in ranks[:2]] == pytest.approx([72 * 16 / 1024, 2 * 72 * 16 / 1024], abs=0.006)
    assert float(ranks[0][4]) > 0


def test_names_of_single_items():
    text = describe(make_run(parallel={"pipeline": 4, "stages": [1, 1, 21, 1]}), 4)
    assert [stage[2] for stage in rows(text, "stage")] == ["stem", "block 0", "blocks 1-21", "head"]


def test_plan_needs_no_torch():
    code = "import sys, megavl.plan.report; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
