import pytest
import torch

from megavl.config.parameters import Parameter, parameters
from megavl.config.presets import PRESETS
from megavl.config.run import ParallelConfig
from megavl.model.vlm import VLM
from megavl.ops.dispatch import choose
from megavl.parallel.groups import ExpertAxis, TensorAxis
from megavl.parallel.shard import shard_of

AXES = [
    (TensorAxis(), ExpertAxis(), ParallelConfig()),
    (TensorAxis(size=2), ExpertAxis(), ParallelConfig(tensor=2)),
    (TensorAxis(size=2), ExpertAxis(size=4, cut_width=True), ParallelConfig(tensor=2, expert=4, expert_width="cut")),
]


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize(("tp", "ep", "parallel"), AXES, ids=["one", "tp2", "tp2 ep4 cut"])
def test_they_are_the_models_own(name, tp, ep, parallel):
    """Names, shapes and cuts of every parameter, full-size models included, item by item of the model list."""
    config = PRESETS[name]
    ops = choose(torch.device("cpu"))
    listed = parameters(config)
    for item in range(config.layers):
        with torch.device("meta"):
            part = VLM(config, tp, ops, item, item + 1, ep)
        expected = {p.name: (p.shape, p.local_size(parallel), cuts(p, parallel)) for p in listed if p.item == item}
        actual = {
            parameter_name: (
                shard_of(parameter).full_shape(parameter.shape),
                parameter.numel(),
                {cut.axis: cut.dim for cut in shard_of(parameter).cuts if cut.count > 1},
            )
            for parameter_name, parameter in part.named_parameters()
        }
        biases = {index: router.bias for index, router in part.routers.items() if router.bias is not None}
        assert all(bias.dtype == torch.float32 for bias in biases.values())
        actual |= {f"blocks.{index}.mlp.router.bias": (bias.shape, len(bias), {}) for index, bias in biases.items()}
        assert actual == expected
        assert {p.name for p in listed if p.item == item and not p.trained} == set(actual) - {
            parameter_name for parameter_name, _ in part.named_parameters()
        }


def cuts(parameter: Parameter, parallel: ParallelConfig) -> dict[str, int]:
    """The dim that is cut over each axis."""
    found = {}
    if parameter.expert_dim is not None and parallel.expert > 1:
        found["ep"] = parameter.expert_dim
    whole = parameter.expert_dim is not None and parallel.expert_width == "whole"
    if parameter.tensor_dim is not None and parallel.tensor > 1 and not whole:
        found["tp"] = parameter.tensor_dim
    return found


def total(name: str, *prefixes: str) -> int:
    return sum(p.size for p in parameters(PRESETS[name]) if p.name.startswith(prefixes) and p.trained)


LLM = ("stem.embedding", "blocks", "head")


# Counts of the released weights: language models, and towers without SigLIP's unused pooling head (in VL2 15.2 million:
# with it Tiny has the 3.37 billion of the released README, Small its 16.1, Base its 27.5).
@pytest.mark.parametrize(
    ("name", "prefixes", "count"),
    [
        ("vl_1b", LLM, 1_652_656_128),
        ("vl_1b", ("stem.siglip",), 303_688_704),
        ("vl_1b", ("stem.sam",), 0),
        ("vl_1b", ("stem.adaptor",), 6_295_552),
        ("vl_7b", LLM, 6_910_365_696),
        ("vl_7b", ("stem.siglip",), 303_688_704),
        ("vl_7b", ("stem.sam",), 96_356_609),
        ("vl_7b", ("stem.sam.downsamples",), 5_898_240),
        ("vl_7b", ("stem.sam.neck",), 1_574_912),
        ("vl_7b", ("stem.adaptor",), 20_979_712),
        ("vl_7b", ("",), 7_331_390_721),
        ("vl2_tiny", LLM, 2_934_734_080),
        ("vl2_small", LLM, 15_706_484_224),
        ("vl2_base", LLM, 27_033_546_240),
        ("vl2_base", ("stem.siglip",), 412_987_248),
        ("vl2_tiny", ("",), 3_355_263_088),
        ("vl2_small", ("",), 16_133_111_152),
        ("vl2_base", ("",), 27_464_893_808),
    ],
)
def test_published_counts(name, prefixes, count):
    assert total(name, *prefixes) == count


@pytest.mark.parametrize(
    ("name", "billions", "count"),
    [("vl2_tiny", 0.57, 574_127_360), ("vl2_small", 2.4, 2_451_435_008), ("vl2_base", 4.1, 4_124_126_720)],
)
def test_active_parameters_are_those_of_the_paper(name, billions, count):
    """Those of the language model that multiply a token: DeepSeek-VL2 Table 2 gives them in billions."""
    moe = PRESETS[name].decoder.moe
    active = sum(
        p.size if p.expert_dim is None else p.size * moe.per_token // moe.experts
        for p in parameters(PRESETS[name])
        if p.name.startswith(("blocks", "head")) and p.trained
    )
    assert active == count
    assert active / 1e9 == pytest.approx(billions, rel=0.025)
