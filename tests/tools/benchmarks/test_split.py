"""Bubbles of a recipe by its split and the place of the vision encoder."""

import pytest

pytestmark = pytest.mark.usefixtures("tools")


def test_each_way_to_cut_a_recipe_has_a_row():
    from benchmarks.split import WAYS, page, rows_of

    rows = {row["way"]: row for row in rows_of("vl2_tiny_stage3", 128)}
    assert list(rows) == list(WAYS)
    # The model list has 14 items, and more where the blocks of the encoder are items too.
    divided = rows["balanced, the encoder divided"]["stages"]
    assert all(len(row["stages"]) == 2 and sum(row["stages"]) in (14, sum(divided)) for row in rows.values())
    assert sum(divided) > 14
    equal, ahead = (rows[way]["steps"]["multimodal"] for way in ("equal numbers, replicated", "balanced, pipelined"))
    assert ahead["bubble"] < equal["bubble"] and ahead["flops"] < equal["flops"]
    # Two micro-batches on two stages: (p - 1) / (m + p - 1).
    assert {line.split(" | ")[3] for line in page(list(rows.values()))[2:]} == {"33.3%"}


def test_a_recipe_without_a_tensor_axis_has_no_sharded_tiles():
    from benchmarks.split import rows_of

    assert "balanced, sharded" not in {row["way"] for row in rows_of("vl2_tiny_stage2", 128)}
