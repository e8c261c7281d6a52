"""The recipes of the paper hold the paper's numbers."""

from pathlib import Path

import pytest

from megavl.config.load import load_run
from megavl.config.presets import PRESETS
from megavl.config.rules import check
from megavl.config.run import BalanceConfig, TextRatioConfig

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


# DeepSeek-VL2, Table 2. The GPUs are those of section 4.2 (128, 264 and 336) where a batch divides over them.
@pytest.mark.parametrize(
    ("name", "stage", "lr", "batch", "tokens", "auxiliary_weight", "bias_step", "pipelined", "gpus"),
    [
        ("tiny", 1, 5.4e-4, 256, 2.0e9, 1e-3, 0, False, 128),
        ("tiny", 2, 5.4e-4, 2304, 798.5e9, 1e-3, 0, True, 128),
        ("tiny", 3, 3.0e-5, 64, 19.5e9, 1e-3, 0, True, 128),
        ("small", 1, 4.2e-4, 256, 2.0e9, 1e-3, 0, True, 256),
        ("small", 2, 4.2e-4, 2304, 808.9e9, 1e-3, 0, True, 264),
        ("small", 3, 1.4e-5, 64, 20.0e9, 1e-3, 0, True, 256),
        ("base", 1, 4.5e-4, 256, 2.0e9, 1e-4, 0, True, 320),
        ("base", 2, 4.5e-4, 3360, 796.5e9, 1e-4, 1e-3, True, 336),
        ("base", 3, 2.0e-5, 64, 19.5e9, 1e-4, 0, True, 256),
    ],
)
def test_stages_of_vl2(name, stage, lr, batch, tokens, auxiliary_weight, bias_step, pipelined, gpus):
    config = load_run(RECIPES / f"vl2_{name}_stage{stage}.yaml")
    check(config, gpus)
    assert config.model == PRESETS[f"vl2_{name}"]
    optim, schedule, train = config.optim, config.optim.schedule, config.train
    assert (optim.lr, optim.betas, optim.weight_decay, optim.grad_clip) == (lr, (0.9, 0.95), 0.1, 1.0)
    assert schedule.shape == ("cosine", "step", "constant")[stage - 1]
    if stage == 2:
        assert (schedule.milestones, schedule.ratios) == ((0.5, 0.75), pytest.approx((10**-0.5, 0.1), rel=1e-4))
    assert config.balance == BalanceConfig(auxiliary_weight=auxiliary_weight, bias_step=bias_step)
    assert (train.global_batch, config.data.seq_len, train.steps) == (batch, 4096, round(tokens / (batch * 4096)))
    assert config.data.text_ratio == TextRatioConfig(final=0.0 if stage == 1 else 0.3)
    assert (config.parallel.pipeline > 1, train.precision, config.parallel.zero) == (pipelined, "bf16", 1)
    if stage > 1:
        before = load_run(RECIPES / f"vl2_{name}_stage{stage - 1}.yaml")
        assert config.checkpoint.init_from == f"{before.output_dir}/checkpoints/step_{before.train.steps:08d}"


@pytest.mark.parametrize(
    ("parameter", "multipliers"),
    [
        ("stem.embedding.weight", (0, 1, 1)),
        ("stem.siglip.norm.weight", (0.1, 0.1, 0.1)),
        ("stem.adaptor.fc1.weight", (1, 1, 1)),
        ("stem.newline", (1, 1, 1)),
        ("stem.separator", (1, 1, 1)),
        ("blocks.0.attn.o_proj.weight", (0, 1, 1)),
        ("blocks.1.mlp.router.weight", (0, 1, 1)),
        ("blocks.1.mlp.experts.up_proj", (0, 1, 1)),
        ("head.proj.weight", (0, 1, 1)),
    ],
)
@pytest.mark.parametrize("name", ["tiny", "small", "base"])
def test_what_the_stages_of_vl2_train(name, parameter, multipliers):
    recipes = [load_run(RECIPES / f"vl2_{name}_stage{stage}.yaml") for stage in (1, 2, 3)]
    assert tuple(recipe.optim.lr_multiplier(parameter) for recipe in recipes) == multipliers


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
