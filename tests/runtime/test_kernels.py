"""Operands of a GPU's kernels in training steps: aligned, and never empty.

The steps run on a CPU in bf16 with the operators that a Hopper GPU gets; torch's variable-length attention and its
product of bf16 in fp32, which have no CPU kernel, have stand-ins. Shapes are small, but every width is a multiple of 8,
as those of all presets are.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megavl.config.load import load_run
from megavl.config.run import RunConfig
from megavl.ops.alignment import ALIGNMENT_BYTES, is_aligned
from megavl.ops.attention import reference_attention
from megavl.ops.dispatch import Ops, choose
from tests.models import changed
from tests.ops.hopper import hopper
from tests.runtime.cases import MODEL, RECIPES, VL2, build, run_config, step_batch

MULTIMODAL, TEXT = 0, 1
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "_scaled_dot_product_flash_attention_for_cpu"}
PRODUCTS |= {f"{name}_backward" for name in PRODUCTS}
CONVOLUTIONS = {"convolution", "convolution_backward"}
# These allocate or fill memory, or return another view; nothing is computed.
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "zeros", "zeros_like"}
ALLOCATIONS |= {"new_zeros", "fill_", "zero_"}
VIEWS = {"view", "_unsafe_view", "detach", "alias", "_reshape_alias", "lift_fresh"}


# Multiples of 8, also after a cut over two tensor ranks.
_TOWER = {"width": 32, "heads": 2}
_WIDTHS = {"width": 64, "mlp_width": 96}
_MLA = {"nope_width": 16, "rope_width": 8}
ALIGNED = {
    "vl": changed(
        MODEL,
        siglip=_TOWER,
        sam=_TOWER | {"neck_width": 8},
        # Few blocks: every operator of these steps is watched.
        decoder=_WIDTHS | {"layers": 4, "heads": 4, "kv_heads": 4},
    ),
    "tiny": changed(VL2["tiny"], siglip=_TOWER, decoder=_WIDTHS),
    "small": changed(VL2["small"], siglip=_TOWER, decoder=_WIDTHS | {"mla": _MLA}),
    "base": changed(VL2["base"], siglip=_TOWER, decoder=_WIDTHS | {"mla": _MLA}),
}


@dataclass(frozen=True)
class Found:
    """What a rank saw in its steps: faults in words, how often the towers' convolutions ran in a text step, and the
    names of parameters outside the towers that got no gradient, or in them that got one, in a text step."""

    faults: tuple[str, ...]
    products: int
    convolutions_of_text: int
    gradients_of_text: tuple[str, ...]


class Watch(TorchDispatchMode):
    """Checks the operands of every operator, forward and backward."""

    def __init__(self):
        super().__init__()
        self.faults: dict[str, None] = {}
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.overloadpacket.__name__
        self.counts[name] = self.counts.get(name, 0) + 1
        operands = list(_tensors((args, (kwargs or {}).values())))
        if name in PRODUCTS:
            self.operands(name, operands)
        elif name in CONVOLUTIONS:
            # cuDNN lays out its operands itself; only their addresses matter.
            self.operands(name, [operand.reshape(-1)[:1] for operand in operands if operand.is_contiguous()])
        if _computes(operator) and any(operand.numel() == 0 for operand in operands):
            self.faults[f"{name} of {[tuple(operand.shape) for operand in operands]}"] = None
        return operator(*args, **(kwargs or {}))

    def operands(self, name: str, operands: Iterable[Tensor]) -> None:
        for operand in operands:
            if operand.dtype == torch.bfloat16 and not is_aligned(operand):
                begin = operand.storage_offset() * operand.element_size() % ALIGNMENT_BYTES
                shape, strides = tuple(operand.shape), operand.stride()
                self.faults[f"{name}: {shape} with strides {strides}, {begin} bytes off"] = None


def _tensors(values) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple | type({}.values())):
            yield from _tensors(value)


def _computes(operator) -> bool:
    name = operator.overloadpacket.__name__
    results = [returned.alias_info for returned in operator._schema.returns]
    alias = any(each is not None and not each.is_write for each in results)
    return operator.namespace == "aten" and not (alias or name in ALLOCATIONS or name in VIEWS)


def cuda_ops(watch: Watch) -> Ops:
    """Those of a Hopper GPU, without any library beside torch."""

    def varlen(q, k, v, cu_q, cu_k, longest_q, longest_k, **_):
        watch.operands("varlen_attn", (q, k, v))
        out = reference_attention(q, k, v, cu_q, cu_q.diff().tolist())
        if out.requires_grad:
            out.register_hook(lambda grad: watch.operands("varlen_attn backward", [grad]))
        return out

    def wide_mm(left, right):
        watch.operands("mm", (left, right))
        return left.float() @ right.float()

    attention = mock.patch("torch.nn.attention.varlen.varlen_attn", varlen)
    with hopper(), attention, mock.patch("megavl.ops.candidates.wide_mm", wide_mm):
        return choose(torch.device("cuda"))


def watched(configs: list[RunConfig], all_to_the_first: bool) -> list[Found]:
    return [_watched(config, all_to_the_first) for config in configs]


def _watched(config: RunConfig, all_to_the_first: bool) -> Found:
    """A multimodal and a text step. `all_to_the_first`: the routers send every token to the first rank's experts."""
    watch = Watch()
    replica = build(config, cuda_ops(watch))
    mesh, stages, engine, pipeline = replica.mesh, replica.stages, replica.engine, replica.pipeline
    names = {parameter: name for stage in stages for name, parameter in stage.vlm.named_parameters()}
    if all_to_the_first:
        for stage in stages:
            for router in stage.vlm.routers.values():
                router.bias[: router.config.per_token] = 100.0
    with watch:
        pipeline.train(step_batch(MULTIMODAL, config, mesh))
        engine.step()
        convolutions = watch.counts.get("convolution", 0)
        with mock.patch.object(engine.optimizer, "_update_hp_grad", wraps=engine.optimizer._update_hp_grad) as added:
            pipeline.train(step_batch(TEXT, config, mesh))
    got, wrong = {call.args[0] for call in added.call_args_list}, []
    for parameter in itertools.chain.from_iterable(engine.optimizer.bf16_groups):
        name = names.get(parameter, "")
        in_towers = name.startswith("stem.") and not name.startswith("stem.embedding")
        if name and (parameter in got) == in_towers:
            wrong.append(name)
    with watch:
        engine.step()
    return Found(
        tuple(watch.faults),
        sum(watch.counts.get(name, 0) for name in PRODUCTS),
        watch.counts.get("convolution", 0) - convolutions,
        tuple(wrong),
    )


def of_recipe(path: Path) -> RunConfig:
    """A small model of the recipe's family, trained and recomputed as the recipe says."""
    recipe = load_run(path)
    name = "vl" if recipe.model.tiling is None else next((n for n in ALIGNED if n in recipe.model.name), "base")
    return run_config(
        model=ALIGNED[name],
        optim=recipe.optim.model_dump(include={"rules", "weight_decay"}),
        train={"precision": "bf16", "micro_batch": 3, "recompute": recipe.train.recompute},
    )


def of_mesh(world: int, model: str, micro_batch: int = 3, **parallel) -> RunConfig:
    train = {"precision": "bf16", "micro_batch": micro_batch}
    return run_config(world, model=ALIGNED[model], train=train, parallel=parallel)


MESHES = {
    2: [
        of_mesh(2, "vl", tensor=2, sequence=True, vision="sharded"),
        of_mesh(2, "vl", micro_batch=1),
        of_mesh(2, "small", tensor=2, vision="sharded"),
        of_mesh(2, "base", expert=2),
        of_mesh(2, "vl", pipeline=2),
    ],
    4: [of_mesh(4, "tiny", tensor=2, expert=2, expert_width="cut", micro_batch=6)],
}


def assert_clean(found: Found, label: str) -> None:
    assert found.products > 100, label  # the watch has seen the step
    assert not found.faults, (label, *found.faults)
    assert found.convolutions_of_text == 0, label
    assert not found.gradients_of_text, (label, found.gradients_of_text)


def test_recipes(pool):
    (found,) = pool.run(1, watched, [of_recipe(path) for path in RECIPES], False)
    for path, each in zip(RECIPES, found, strict=True):
        assert_clean(each, path.stem)


@pytest.mark.parametrize("world", MESHES)
def test_meshes(pool, world):
    for found in pool.run(world, watched, MESHES[world], False):
        for config, each in zip(MESHES[world], found, strict=True):
            assert_clean(each, f"{config.model.name} {config.parallel}")


def test_experts_without_rows(pool):
    """On the second rank none of the experts has a row."""
    for (found,) in pool.run(2, watched, [of_mesh(2, "base", expert=2)], True):
        assert_clean(found, "all tokens to the first rank")


def test_a_misaligned_operand_and_an_empty_one_would_be_noticed():
    watch, x = Watch(), torch.zeros(40, dtype=torch.bfloat16)
    with watch:
        x[1:33].view(4, 8) @ x[:32].view(8, 4)
        torch.zeros(0, 3) @ torch.zeros(3, 2)
        torch.zeros(0) + 1
    faults = list(watch.faults)
    assert len(faults) == 4, faults
    assert "2 bytes off" in faults[0] and "strides (4, 1)" in faults[1] and "mm of [(0, 3)" in faults[2], faults
