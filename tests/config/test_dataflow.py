import pytest

from megavl.config.dataflow import Attention, Branches, Parameter, parameters_of
from megavl.config.parameters import dataflow, parameters
from megavl.config.presets import PRESETS

A, B, C = (Parameter(name, (1,), 0) for name in "abc")


def test_parameters_are_listed_in_order():
    flow = (A, Branches((B, (C, A))), Attention(1, 1, positions=(B,)))
    assert "".join(parameter.name for parameter in parameters_of(flow)) == "abcab"


@pytest.mark.parametrize("name", PRESETS)
def test_items_hold_their_own_parameters(name):
    """Each parameter once, in the item of the model list that its flow belongs to."""
    model = PRESETS[name]
    flows, listed = dataflow(model), parameters(model)
    assert len(flows) == model.layers
    assert len({parameter.name for parameter in listed}) == len(listed)
    for item, flow in enumerate(flows):
        assert set(parameters_of(flow)) == {parameter for parameter in listed if parameter.item == item}


@pytest.mark.parametrize("name", PRESETS)
def test_a_product_has_the_size_of_its_matrix(name):
    """Every matrix is multiplied; only of relative positions a product reads a part, the distances that occur."""
    for parameter in parameters(PRESETS[name]):
        product = parameter.product
        if product is None:
            assert "proj" not in parameter.name or parameter.name.endswith("bias")
        elif "rel_pos" not in parameter.name:
            matrices = 1 if parameter.expert_dim is None else parameter.shape[0]
            assert product.d_in * product.d_out * matrices == parameter.size
