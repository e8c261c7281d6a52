"""Shapes that the start-time trial takes from a run."""

import pytest
import torch

from megavl.config.load import load_run
from megavl.model.cases import cases_of
from megavl.ops.candidates import CANDIDATES, REFERENCE
from megavl.ops.dispatch import choose
from megavl.ops.trial import compare

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("recipe", "shapes"),
    [
        (
            "vl_7b_stage2",
            {
                "attention": "4096 x 16 x 128 bfloat16, 16 key heads, values of 128, documents of 2048, 1024, 1024",
                "rms_norm": "2048 x 4096 bfloat16",  # sequence parallel over 2
                "swiglu": "4096 x 5504 bfloat16",
                "rotary": "4096 x 16 x 128 bfloat16, 16 key heads",
                "cross_entropy": "4096 x 51200 bfloat16",
            },
        ),
        (
            "vl2_small_stage2",
            {
                "attention": "4096 x 16 x 192 bfloat16, 16 key heads, values of 128, documents of 2048, 1024, 1024",
                "rms_norm": "4096 x 2048 bfloat16",
                "swiglu": "24576 x 1408 bfloat16",
                "rotary": "4096 x 16 bfloat16, 128 + 64 channels, values of 128",
                "cross_entropy": "4096 x 102400 bfloat16",
                "router": "4096 x 64 x 2048 bfloat16",
                "permutation": "4096 x 2048 bfloat16, 6 of 64 experts",
                "grouped_linear": "24576 x 8 x 2048 x 1408 bfloat16",
                "expert_mlp": "24576 x 8 x 2048 x 1408 bfloat16",
            },
        ),
    ],
)
def test_the_cases_of_a_run(recipe, shapes):
    cases = cases_of(load_run(f"launch/recipes/{recipe}.yaml"))
    assert {op: case.shapes for op, case in cases.items()} == shapes


def test_the_cases_run_on_their_references():
    references = {op: candidates[-1].load(CPU) for op, candidates in CANDIDATES.items()}
    references["expert_mlp"] = choose(CPU).expert_mlp
    small = ["data.seq_len=16", "train.micro_batch=1", "parallel.tensor=2"]
    for recipe in ("vl_debug", "vl2_debug"):
        for op, case in cases_of(load_run(f"launch/recipes/{recipe}.yaml", small)).items():
            assert compare(case, {REFERENCE: references[op]}, CPU, clock=lambda call: call() and 1.0)[0].seconds == 1.0
