"""The FLOP count against torch's, operation by operation as the real model runs, and against published numbers."""

from contextlib import nullcontext

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megavl.batch import Batch
from megavl.config.model import ModelConfig
from megavl.config.parameters import parameters
from megavl.config.presets import PRESETS
from megavl.config.tiles import Tiling
from megavl.config.tokens import IGNORE_INDEX
from megavl.model.init import initialise
from megavl.model.run_block import call_block
from megavl.model.vlm import VLM
from megavl.ops.dispatch import choose
from megavl.parallel.groups import TensorAxis
from megavl.plan.cost import active_parameters, item_parameters, item_work, step_flops
from megavl.runtime.recompute import recomputing
from megavl.runtime.selective import Selective
from tests.config.runs import make_run
from tests.models import HYBRID, MHA_SOFTMAX, MLA_SIGMOID, SIGLIP_ONLY, changed

# Three blocks: the rules below name one with experts before another and one behind.
MODELS = {
    "hybrid": changed(HYBRID, decoder={"layers": 3, "kv_heads": 2}),
    "siglip": changed(SIGLIP_ONLY, decoder={"layers": 3}),
    "tiles_softmax": MHA_SOFTMAX,
    "tiles_latent_sigmoid": MLA_SIGMOID,
}
# Wide enough that products dwarf the channels of SAM's relative positions.
WIDE = changed(
    HYBRID,
    siglip={"width": 256, "heads": 4, "mlp_width": 1024},
    sam={"width": 192, "mlp_width": 768, "neck_width": 64},
    decoder={"width": 512, "heads": 8, "kv_heads": 2, "mlp_width": 1376, "vocab_size": 4096},
)

RECOMPUTE = {
    "off": {},
    "selective": {"recompute": "selective"},
    "block and towers": {"recompute": "block", "recompute_towers": True},
}

STEP = {"tokens": 100, "supervised_tokens": 90, "squared_tokens": 10_000, "tiles": 2}


def rule(match: str, lr_multiplier: float) -> dict:
    return {"match": match, "lr_multiplier": lr_multiplier}


FREEZE_ALL = rule("", 0)
TRAINABLE = {
    "all": [],
    "nothing": [FREEZE_ALL],
    "towers_frozen": [rule(r"^stem\.(siglip|sam)", 0), rule(r"^stem\.sam.*(neck|downsamples)", 1)],
    "llm_frozen": [rule(r"^(stem\.embedding|blocks|head)", 0)],
    "adaptor": [FREEZE_ALL, rule("adaptor", 1)],
    "head": [FREEZE_ALL, rule("^head", 1)],
    "experts": [FREEZE_ALL, rule(r"^blocks\.2\.mlp\.(experts\.down_proj|down_proj)", 1)],
    "router": [FREEZE_ALL, rule(r"^blocks\.1\.mlp\.(router|up_proj)", 1)],
    "newline": [FREEZE_ALL, rule(r"^stem\.(newline|siglip\.norm\.bias)", 1)],
    "two_places": [FREEZE_ALL, rule(r"^stem\.siglip\.blocks\.1\.mlp", 1), rule(r"^blocks\.1\.mlp\.up", 1)],
}


def make_batch(model: ModelConfig, documents: list[tuple[int, int]]) -> Batch:
    """Documents of (images, text tokens), with random pixels; the images have as many tiles as they may."""
    tiling = Tiling(model)
    placeholders, total = int(tiling.tokens[-1]), sum(images for images, _ in documents)
    lengths = [images * placeholders + text for images, text in documents]
    tokens = torch.cat(
        [torch.tensor([model.image_token_id] * (images * placeholders) + [1] * text) for images, text in documents]
    )
    tiles, size = total * tiling.grids[-1].tiles, model.pixel_tower.image_size
    return Batch.of(
        tiling,
        tokens=tokens,
        labels=tokens.where(tokens != model.image_token_id, IGNORE_INDEX),
        lengths=lengths,
        packs=1,
        grids=(tiling.grids[-1],) * total,
        pixels=torch.randint(256, (tiles, 3, size, size), dtype=torch.uint8),
    )


def counted(model: ModelConfig, batch: Batch, rules: list[dict], recompute: str) -> int:
    """FLOPs that torch counts in the forward and, where anything is trainable, the backward pass.

    The MATH backend, because the CPU's flash kernel is unknown to the counter.
    """
    optim, ops, selective = make_run(optim={"rules": rules}).optim, choose(torch.device("cpu")), Selective()
    run_block, run_tower_block = call_block, call_block
    if recompute == "selective":
        ops, run_block = selective.ops(ops), selective.run_block
    elif recompute == "block and towers":
        run_block = run_tower_block = recomputing(nullcontext())
    vlm = VLM(model, TensorAxis(), ops, 0, model.layers, run_block=run_block, run_tower_block=run_tower_block)
    initialise(vlm, model, seed=0)
    for name, parameter in vlm.named_parameters():
        parameter.requires_grad_(optim.lr_multiplier(name) > 0)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss = vlm(None, batch)
        if loss.requires_grad:
            loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("trainable", TRAINABLE)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_hardware_flops_are_those_that_torch_counts(model, trainable, recompute):
    documents, model = [(2, 37), (0, 50), (1, 11)], MODELS[model]
    batch = make_batch(model, documents)
    tokens = len(batch.tokens)
    squared = sum(length**2 for length in batch.cu_seqlens.diff().tolist())
    config = make_run(model=model, optim={"rules": TRAINABLE[trainable]}, train=RECOMPUTE[recompute])
    # torch counts causal attention over all s^2 pairs, we over s (s + 1) / 2: asked for twice the squares less the
    # tokens, ours covers all of them too.
    flops = step_flops(
        config,
        tokens=tokens,
        supervised_tokens=len(batch.supervised),
        squared_tokens=2 * squared - tokens,
        tiles=batch.tiles,
    )
    # Measured: equal to the last FLOP in all cases.
    assert flops.hardware == counted(model, batch, TRAINABLE[trainable], recompute)


def test_model_flops_are_near_what_torch_counts():
    """What MFU is made of, without the channels that carry SAM's relative positions as overhead (measured: 1.0 %)."""
    batch = make_batch(WIDE, [(2, 37), (1, 11)])
    tokens, squared = len(batch.tokens), sum(length**2 for length in batch.cu_seqlens.diff().tolist())
    config = make_run(model=WIDE)
    flops = step_flops(
        config,
        tokens=tokens,
        supervised_tokens=len(batch.supervised),
        squared_tokens=2 * squared - tokens,
        tiles=batch.tiles,
    )
    assert flops.model == pytest.approx(counted(WIDE, batch, [], "off"), rel=0.02)


@pytest.mark.parametrize("name", ["vl_debug", "vl_debug_siglip", "vl2_debug_mha", "vl2_debug"])
def test_every_parameter_is_asked_for(name):
    """A parameter that the walk forgot could never start a gradient."""
    config = make_run(model=PRESETS[name])
    asked = set()

    class Recording(type(config.optim)):
        def lr_multiplier(self, name: str) -> float:
            asked.add(name)
            return 0.0

    optim = Recording.model_validate(config.optim.model_dump())
    item_work(config.model_copy(update={"optim": optim}), tokens=1, supervised_tokens=1, squared_tokens=1, tiles=1)
    assert asked == {parameter.name for parameter in parameters(config.model) if parameter.trained}


ONE_PARAMETER = [p.name for p in parameters(MODELS["hybrid"]) if "1" in p.name or "embed" in p.name]


@pytest.mark.parametrize("parameter", ONE_PARAMETER)
def test_one_trainable_parameter_is_enough_for_gradients_behind_it(parameter):
    frozen = step_flops(make_run(model=MODELS["hybrid"], optim={"rules": [FREEZE_ALL]}), **STEP)
    alone = step_flops(
        make_run(model=MODELS["hybrid"], optim={"rules": [FREEZE_ALL, rule(f"^{parameter}$", 1)]}), **STEP
    )
    assert alone.model > frozen.model


def test_frozen_tower_costs_its_forward_only():
    rules = TRAINABLE["towers_frozen"]
    stem, *blocks = item_work(make_run(optim={"rules": rules}), **STEP)
    tower = item_work(make_run(optim={"rules": [FREEZE_ALL]}), **STEP)[0]
    assert stem.forward == tower.forward and stem.input_grad + stem.weight_grad < 0.5 * stem.forward
    assert all(block.input_grad > 0 and block.weight_grad > 0 for block in blocks)


def test_frozen_decoder_above_a_trainable_adaptor_costs_forward_and_input_gradients():
    work = item_work(make_run(optim={"rules": TRAINABLE["adaptor"]}), **STEP)
    for block in work[1:]:
        assert block.weight_grad == 0
        assert block.input_grad > block.forward * 0.99


def test_text_costs_no_vision():
    assert item_work(make_run(), tokens=100, supervised_tokens=100, squared_tokens=10_000, tiles=0)[0].model == 0


def test_vision_is_computed_on_every_tensor_rank():
    one, two = (step_flops(make_run(parallel={"tensor": tensor}), **STEP) for tensor in (1, 2))
    assert two.model == one.model
    assert two.hardware - one.hardware == item_work(make_run(), **STEP)[0].hardware


def test_latents_and_scores_are_computed_on_every_tensor_rank_without_sequence_parallelism():
    model = PRESETS["vl2_debug"]
    decoder, mla = model.decoder, model.decoder.mla
    text = STEP | {"tiles": 0}
    one, two, four = (step_flops(make_run(model=model, parallel={"tensor": tensor}), **text) for tensor in (1, 2, 4))
    latents = decoder.width * decoder.layers * (mla.kv_rank + mla.rope_width)
    # With each score goes its place in the sums over a pack.
    scores = (decoder.width + 1) * (decoder.layers - 1) * decoder.moe.experts
    assert two.hardware - one.hardware == 3 * 2 * STEP["tokens"] * (latents + scores)
    assert four.hardware - one.hardware == 3 * (two.hardware - one.hardware)
    assert one == step_flops(make_run(model=model, parallel={"tensor": 4, "sequence": True}), **text)


def test_shared_tiles_are_computed_once():
    one, two = (step_flops(make_run(parallel={"tensor": tensor, "vision": "sharded"}), **STEP) for tensor in (1, 2))
    assert one == two


def forward_gflops(name: str, tiles: int) -> float:
    """Forward GFLOP of the vision part of a preset."""
    stem, *_ = item_work(make_run(model=PRESETS[name]), tokens=0, supervised_tokens=0, squared_tokens=0, tiles=tiles)
    return stem.forward / 1e9


def test_published_vision_flops():
    """SAM-B 1000, SigLIP-L 381, adaptor 24 GFLOP an image (1.3B: 7); SigLIP-SO400M 666 GFLOP a tile beside VL2's
    adaptors. Measured: 1001, 381, 24 (7); 666, and 3 (Tiny), 5 (Small), 7 (Base)."""
    assert forward_gflops("vl_7b", tiles=1) == pytest.approx(1000 + 381 + 24, rel=0.02)
    assert forward_gflops("vl_1b", tiles=1) == pytest.approx(381 + 7, rel=0.02)
    assert forward_gflops("vl_7b", tiles=5) == pytest.approx(5 * forward_gflops("vl_7b", tiles=1))
    for name, width in (("vl2_tiny", 1280), ("vl2_small", 2048), ("vl2_base", 2560)):
        adaptor = 2 * 196 * (4 * 1152 * width + width**2) / 1e9
        assert forward_gflops(name, tiles=1) == pytest.approx(666 + adaptor, rel=1e-3)


@pytest.mark.parametrize("name", ["vl_1b", "vl_7b", "vl2_tiny"])
def test_full_size_vision_is_what_torch_counts(name):
    """On the meta device, where nothing is computed. Measured: equal to the last FLOP."""
    model = PRESETS[name]
    with torch.device("meta"):
        stem = VLM(model, TensorAxis(), choose(torch.device("cpu")), 0, 1).stem.requires_grad_(False)
        size = model.pixel_tower.image_size
        pixels = torch.empty(2, 3, size, size, dtype=torch.uint8)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            stem.encode(pixels, 2)
    work, *_ = item_work(
        make_run(model=model, optim={"rules": [FREEZE_ALL]}), tokens=0, supervised_tokens=0, squared_tokens=0, tiles=2
    )
    assert work.hardware == counter.get_total_flops()


@pytest.mark.parametrize(
    ("name", "flops"),
    [("vl_1b", 0.987e10), ("vl_7b", 4.196e10), ("vl2_tiny", 3.82e9), ("vl2_small", 1.641e10), ("vl2_base", 2.852e10)],
)
def test_published_flops_of_a_token(name, flops):
    """6 N + 6 L d s, N without the embedding and with the experts of one token, in documents of s = 4096 tokens (with
    latent attention 3 L h (192 + 128) s). Measured within 0.1 %."""
    config = make_run(model=PRESETS[name])
    step = step_flops(config, tokens=4096, supervised_tokens=4096, squared_tokens=4096**2, tiles=0)
    assert step.model / 4096 == pytest.approx(flops, rel=2e-3)


@pytest.mark.parametrize(("name", "billions"), [("vl2_tiny", 1.0), ("vl2_small", 2.8), ("vl2_base", 4.5)])
def test_published_active_parameters(name, billions):
    """As the release has them, with its tower. Measured: 0.995, 2.878, 4.555."""
    assert active_parameters(PRESETS[name]) / 1e9 == pytest.approx(billions, abs=0.08)


def test_without_experts_all_but_the_embedding_is_active():
    total = {p.name: p.size for p in parameters(PRESETS["vl_7b"])}
    assert active_parameters(PRESETS["vl_7b"]) == sum(total.values()) - total["stem.embedding.weight"]


def test_parameters_of_items():
    rules = TRAINABLE["towers_frozen"]
    config = make_run(optim={"rules": rules}, parallel={"tensor": 2})
    stem, *blocks, head = item_parameters(config)
    decoder = config.model.decoder
    assert head.total == decoder.width * (decoder.vocab_size // 2 + 1)
    block = decoder.width * (4 * decoder.width // 2 + 3 * decoder.mlp_width // 2 + 2)
    assert all((item.trainable, item.frozen) == (block, 0) for item in blocks)
    frozen = [
        p.size
        for p in parameters(config.model)
        if p.name.startswith(("stem.siglip", "stem.sam")) and "neck" not in p.name and "downsamples" not in p.name
    ]
    assert stem.frozen == sum(frozen)


@pytest.mark.parametrize(("width", "cut"), [("whole", 1), ("cut", 2)])
def test_experts_of_items(width, cut):
    rules = [rule(r"^blocks\.2\.", 0)]
    parallel = {"tensor": 2, "expert": 4, "expert_width": width}
    items = item_parameters(make_run(model=PRESETS["vl2_debug"], optim={"rules": rules}, parallel=parallel))
    decoder = PRESETS["vl2_debug"].decoder
    experts = 8 // 4 * 3 * decoder.width * (decoder.moe.width // cut)
    # The stem, a dense block, blocks with experts of which the second is frozen, the head.
    assert [item.experts for item in items] == [0, 0, experts, 0, experts, experts, experts, 0]
    # The bias of a router is not for an optimizer.
    assert [item.frozen for item in items] == [0, 0, 8, items[2].total, 8, 8, 8, 0]
