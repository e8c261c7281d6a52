"""Rules within one section: each defect is refused with its field, value and reason."""

import pytest
from pydantic import ValidationError

from megavl.config.model import DecoderConfig, ModelConfig, SamConfig, SiglipConfig
from megavl.config.presets import PRESETS
from megavl.config.run import (
    DataConfig,
    OptimConfig,
    ParameterRule,
    ScheduleConfig,
    SourceConfig,
    TextRatioConfig,
    TrainConfig,
)

DECODER = {"layers": 2, "width": 96, "heads": 8, "kv_heads": 8, "mlp_width": 64, "vocab_size": 100}


@pytest.mark.parametrize(
    ("section", "fields", "problem"),
    [
        (SiglipConfig, {"patch_size": 385}, "patch_size = 385 is above image_size = 384"),
        (SiglipConfig, {"heads": 7}, "width = 1024 is not divisible by heads = 7"),
        (SiglipConfig, {"pixel_std": (0.5, 0.0, 0.5)}, "greater than 0"),
        (SamConfig, {"patch_size": 15}, "image_size = 1024 is not divisible by patch_size = 15"),
        (SamConfig, {"heads": 7}, "width = 768 is not divisible by heads = 7"),
        (SamConfig, {"global_layers": (2, 12)}, "global_layers = [2, 12] must rise within 0 ... 11"),
        (SamConfig, {"global_layers": (5, 2)}, "global_layers = [5, 2] must rise"),
        (SamConfig, {"global_layers": (-1, 2)}, "global_layers = [-1, 2] must rise"),
        (SamConfig, {"global_layers": ()}, "name at least one, whose output feeds neck_hd"),
        (DecoderConfig, DECODER | {"heads": 7, "kv_heads": 7}, "width = 96 is not divisible by heads = 7"),
        (DecoderConfig, DECODER | {"kv_heads": 3}, "heads = 8 is not divisible by kv_heads = 3"),
        (DecoderConfig, DECODER | {"heads": 32, "kv_heads": 32}, "width / heads = 3 is odd"),
        (
            ModelConfig,
            PRESETS["vl_debug"].model_dump() | {"image_token_id": 2400},
            "image_token_id = 2400 is outside decoder.vocab_size = 2400",
        ),
        (ScheduleConfig, {"milestones": (0.9, 0.8)}, "milestones = [0.9, 0.8] must rise between 0 and 1"),
        (ScheduleConfig, {"milestones": (0.8, 1.0)}, "milestones = [0.8, 1.0] must rise between 0 and 1"),
        (ScheduleConfig, {"ratios": (0.1,)}, "ratios = [0.1] needs one entry per milestone, of which there are 2"),
        (TextRatioConfig, {"final": 0.7, "milestones": (0.5, 0.5)}, "milestones = [0.5, 0.5] must rise above 0"),
        (TextRatioConfig, {"final": 0.7, "milestones": (0.5, 1.1)}, "milestones = [0.5, 1.1] must rise above 0"),
        (TextRatioConfig, {"final": 0.7, "milestones": ()}, "milestones = [] must rise above 0 and up to 1"),
        (TextRatioConfig, {"final": 1.1}, "less than or equal to 1"),
        (TextRatioConfig, {"start": 1.0, "steps": 5}, "final"),
        (SourceConfig, {"prefix": "a", "max_epochs": 0}, "greater than 0"),
        (SourceConfig, {"prefix": "a", "weight": 0}, "greater than 0"),
        (ParameterRule, {"match": "("}, "match = '(' is not a regular expression: missing )"),
        (OptimConfig, {"lr": 1.0, "betas": (0.9, 1.0)}, "less than 1"),
        (OptimConfig, {"lr": float("nan")}, "finite number"),
        (TrainConfig, {"steps": 1, "global_batch": 1, "timeout_s": 0}, "greater than 0"),
        # torch counts nanoseconds in 64 bits
        (TrainConfig, {"steps": 1, "global_batch": 1, "timeout_s": 1e10}, "less than or equal to 2592000"),
        (DataConfig, {"tokenizer": "t", "text_ratio": 1, "seq_len": 8, "timeout_s": -1}, "greater than 0"),
    ],
)
def test_refused(section, fields, problem):
    with pytest.raises(ValidationError) as raised:
        section(**fields)
    assert problem in str(raised.value)


def test_all_problems_of_a_section_at_once():
    with pytest.raises(ValidationError) as raised:
        SiglipConfig(patch_size=400, heads=7)
    assert "patch_size = 400" in str(raised.value) and "heads = 7" in str(raised.value)


@pytest.mark.parametrize("number", [0, 0.3, 1])
def test_a_number_is_a_text_ratio(number):
    data = DataConfig(tokenizer="t", text_ratio=number, seq_len=8)
    assert data.text_ratio == TextRatioConfig(final=number) and data.text_ratio.extremes == (number, number)
    assert DataConfig.model_validate(data.model_dump(mode="json")) == data


def test_extremes_of_a_text_ratio():
    assert TextRatioConfig(start=0.2, final=0.7, steps=10).extremes == (0.2, 0.7)
    assert TextRatioConfig(start=1.0, final=0.7, steps=10).extremes == (0.7, 1.0)
    assert TextRatioConfig(start=1.0, final=0.7).extremes == (0.7, 0.7)


def test_last_matching_rule_holds():
    rules = [{"match": "stem", "lr_multiplier": 0}, {"match": "stem.sam.neck", "lr_multiplier": 0.5}]
    optim = OptimConfig(lr=1.0, rules=rules)
    assert optim.lr_multiplier("stem.sam.pos_embed") == 0
    assert optim.lr_multiplier("stem.sam.neck.0.weight") == 0.5
    assert optim.lr_multiplier("head.proj.weight") == 1
