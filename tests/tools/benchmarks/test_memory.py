"""Bytes that autograd keeps of a block."""

import json

import pytest

from megavl.config.presets import PRESETS
from tests.tools.test_benchmark import benchmark

pytest.importorskip("triton")


def test_kept_bytes_are_those_of_a_block(tmp_path):
    """Under "block" its output alone, which is the next one's input; under "off" a sum that is written down here."""
    file, tokens, width = tmp_path / "memory.json", 512, 2048
    page = benchmark(
        *("memory", "--presets", "vl_1b", "--tokens=512", "--tensor", "1", "2", "--timed-tokens=32", "--rounds=1"),
        *("--json", str(file)),
    ).stdout
    found = json.loads(file.read_text())
    whole, on_two = (row["bytes"] for row in found["kept"])
    unit, hidden = 2 * tokens * width, 2 * tokens * PRESETS["vl_1b"].decoder.mlp_width
    assert whole["block"] == unit and on_two["block"] == unit / 2
    # Two normalised inputs, rotated q and k, the joint product of q, k, v, the attended values, both sums of the
    # residual stream; gate, up, SwiGLU. The rest are statistics of norms and attention.
    assert 10 * unit + 3 * hidden < whole["off"] < 1.01 * (10 * unit + 3 * hidden)
    # Of the joint product a copy of v is left. Gathered inputs are whole on each rank.
    assert whole["off"] - whole["selective"] == 2 * unit + 2 * unit + hidden
    assert on_two["off"] - on_two["selective"] == 2 * unit + (2 * unit + hidden) / 2
    assert f"| vl_1b, dense | 1 | {whole['off'] / 1e6:,.0f} |" in page
    assert [row["block"] for row in found["towers"]] == ["SigLIP"]
    assert all(row["bytes"]["block"] < 0.1 * row["bytes"]["off"] for row in found["towers"])
    (cost,) = found["cost"]
    assert cost["relative"]["off"] == [1.0, 1.0, 1.0]
