"""The recipes of the paper hold the paper's numbers."""

from pathlib import Path

import pytest

from megavl.config.load import load_run
from megavl.config.presets import PRESETS
from megavl.config.rules import check
from megavl.config.run import TextRatioConfig

RECIPES = Path(__file__).parents[2] / "launch" / "recipes"


# DeepSeek-VL, Table 4, stage 2; the GPUs are those of section 3.3.
@pytest.mark.parametrize(
    ("name", "lr", "steps", "batch", "pipelined", "gpus"),
    [("vl_1b", 3e-5, 96_000, 1024, False, 128), ("vl_7b", 4.2e-5, 42_000, 2304, True, 512)],
)
def test_stage_2(name, lr, steps, batch, pipelined, gpus):
    config = load_run(RECIPES / f"{name}_stage2.yaml")
    assert config.model == PRESETS[name]
    optim, schedule = config.optim, config.optim.schedule
    assert (optim.lr, optim.betas, optim.weight_decay, optim.grad_clip) == (lr, (0.9, 0.95), 0.0, 1.0)
    assert (schedule.shape, schedule.warmup_steps) == ("step", 2000)
    assert (schedule.milestones, schedule.ratios) == ((0.8, 0.9), (0.316, 0.1))
    assert (config.train.steps, config.train.global_batch, config.data.seq_len) == (steps, batch, 4096)
    assert config.data.text_ratio == TextRatioConfig(start=1.0, final=0.7, steps=2000)
    assert config.train.precision == "bf16" and config.parallel.zero == 1
    assert (config.parallel.pipeline > 1) == pipelined
    check(config, gpus)


@pytest.mark.parametrize(
    ("parameter", "trains"),
    [
        ("stem.embedding.weight", True),
        ("stem.adaptor.proj.weight", True),
        ("blocks.0.attn.q_proj.weight", True),
        ("head.proj.weight", True),
        ("stem.siglip.norm.weight", False),
        ("stem.siglip.blocks.3.attn.qkv.weight", False),
        ("stem.sam.patch_embed.weight", False),
        ("stem.sam.blocks.3.attn.qkv.weight", False),
        ("stem.sam.neck.0.weight", True),
        ("stem.sam.neck_hd.3.bias", True),
        ("stem.sam.downsamples.1.weight", True),
        ("stem.sam.hd_alpha_downsamples", True),
    ],
)
def test_what_stage_2_of_the_7b_trains(parameter, trains):
    assert (load_run(RECIPES / "vl_7b_stage2.yaml").optim.lr_multiplier(parameter) > 0) == trains


def test_stage_2_of_the_1b_freezes_siglip():
    optim = load_run(RECIPES / "vl_1b_stage2.yaml").optim
    assert optim.lr_multiplier("stem.siglip.norm.weight") == 0 and optim.lr_multiplier("stem.adaptor.fc1.weight") == 1


def test_debug_fits_every_small_topology():
    for world in (1, 2, 3, 4, 6, 8):
        for tensor in range(1, world + 1):
            for pipeline in range(1, world + 1):
                if world % (tensor * pipeline):
                    continue
                for zero in (0, 1, 2, 3) if pipeline == 1 else (0, 1):
                    overrides = {
                        "parallel.tensor": tensor,
                        "parallel.pipeline": pipeline,
                        "parallel.zero": zero,
                        "parallel.sequence": "true",
                        "train.precision": "fp32",
                        "train.steps": 5,
                    }
                    lines = [f"{key}={value}" for key, value in overrides.items()]
                    check(load_run(RECIPES / "vl_debug.yaml", lines), world)
