"""Kinds: which steps of a run are text and which are multimodal.

A step is all of one kind (DeepSeek-VL section 4.4, modality grouping), drawn with the probability that the schedule
gives its step.
"""

import numpy as np

from megavl.config.run import TextRatioConfig


def text_ratios(schedule: TextRatioConfig, steps: int) -> np.ndarray:
    """Probability that each step is text: float64 [steps]."""
    if schedule.steps == 0:
        way = np.ones(steps)
    elif schedule.shape == "linear":
        way = np.minimum(np.arange(steps) / schedule.steps, 1)
    else:
        passed = np.searchsorted(schedule.milestones, np.arange(steps) / schedule.steps, side="right")
        way = passed / len(schedule.milestones)
    return (1 - way) * schedule.start + way * schedule.final


def text_steps(schedule: TextRatioConfig, steps: int, key: tuple[int, ...]) -> np.ndarray:
    """Whether each step is text: bool [steps]. A longer run with the same key starts with the same steps."""
    draws = np.random.Generator(np.random.Philox(np.random.SeedSequence(key))).random(steps)
    return draws < text_ratios(schedule, steps)
