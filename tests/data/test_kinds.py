import numpy as np
import pytest

from megavl.config.run import TextRatioConfig
from megavl.data.kinds import text_ratios, text_steps


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.7, 1.0])
def test_a_number_is_the_same_probability_throughout(ratio):
    schedule = TextRatioConfig.model_validate(ratio)
    assert (text_ratios(schedule, 5) == ratio).all()
    share = text_steps(schedule, 20000, (0, 2)).mean()
    assert abs(share - ratio) < 0.011 and (share == ratio or 0 < ratio < 1)  # three standard deviations


def test_a_linear_warm_up_reaches_its_final_ratio_exactly():
    ratios = text_ratios(TextRatioConfig(start=1.0, final=0.7, steps=10), 14)
    assert ratios[0] == 1.0 and ratios[5] == pytest.approx(0.85) and (ratios[10:] == 0.7).all()
    assert np.allclose(np.diff(ratios[:11]), -0.03)


def test_steps_fall_by_equal_parts_at_the_milestones():
    ratios = text_ratios(TextRatioConfig(start=1.0, final=0.6, steps=8, shape="step", milestones=(0.5, 1.0)), 10)
    assert ratios.tolist() == [1.0] * 4 + [0.8] * 4 + [0.6] * 2


def test_the_drawn_share_follows_the_schedule():
    schedule = TextRatioConfig(start=1.0, final=0.5, steps=20000)
    is_text = text_steps(schedule, 40000, (7, 2)).reshape(8, 5000)
    expected = text_ratios(schedule, 40000).reshape(8, 5000).mean(1)
    assert np.abs(is_text.mean(1) - expected).max() < 0.021  # three standard deviations
    assert is_text[0, :100].mean() > 0.97


def test_a_longer_run_starts_with_the_same_steps_and_another_seed_does_not():
    schedule = TextRatioConfig(start=1.0, final=0.5, steps=50)
    first = text_steps(schedule, 100, (3, 2))
    assert (text_steps(schedule, 1000, (3, 2))[:100] == first).all()
    assert (text_steps(schedule, 100, (4, 2)) != first).any()
