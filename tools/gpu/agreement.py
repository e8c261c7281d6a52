"""CUDA against CPU: loss and every gradient of tiny models of both families.

The CPU computes in fp32 on weights that bf16 holds exactly, so that in bf16 only the arithmetic differs. The error of a
gradient is |CUDA - CPU| / |CPU| in the Euclidean norm. |CPU| counts as at least 0.1 % of the largest norm, because the
relative error of a gradient that is mathematically zero has no meaning.
"""

from collections.abc import Mapping

import torch
from gpu.results import Finding, Results, Setting, Table
from gpu.run import mesh_of_one, packs, quick_stages, start, summed_loss, tiny
from torch import Tensor, nn

from megavl.batch import Kind, StepBatch
from megavl.config.run import RunConfig
from megavl.ops.dispatch import choose
from megavl.runtime.env import Env
from megavl.runtime.operators import choose_ops

_SIGMOID = ("model=vl2_debug", "model.decoder.layers=3", "balance.auxiliary_weight=0", "balance.bias_step=0.001")
# Heads of 16 channels, which the fused kernels of bf16 serve; the presets' own have 4.
_CASES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "VL hybrid": ("vl_7b", ("model.decoder.heads=6", "model.decoder.kv_heads=6")),
    "VL grouped queries": ("vl_1b", ("model.decoder.heads=6", "model.decoder.kv_heads=2")),
    "VL2 softmax router": ("vl2_tiny", ()),
    "VL2 latent attention": ("vl2_small", ()),
    "VL2 sigmoid router": ("vl2_small", _SIGMOID),
}
# Largest error of the loss, of a gradient, and of a gradient of a model with routed experts: in bf16 a token whose best
# experts are nearly tied goes to others. bf16 on a CPU: measured 1.0e-3, 0.032, 0.27.
_BOUNDS = {torch.float32: (1e-4, 1e-3, 1e-3), torch.bfloat16: (1e-2, 0.15, 0.5)}
_SMALL = 1e-3
_WORST = 3


def run(setting: Setting, results: Results, subject: str) -> None:
    """Measure every case in fp32 and bf16, with and without images."""
    torch.backends.cudnn.allow_tf32 = False  # convolutions would round to 10 bits
    env = start()
    for dtype in _BOUNDS:
        for case, (model, overrides) in _CASES.items():
            for kind in ("text", "multimodal"):
                name = f"{case}, {kind}, {str(dtype).removeprefix('torch.')}"
                results.measure(
                    name,
                    lambda m=model, o=overrides, k=kind, d=dtype: compare(tiny(m, "optim.rules=[]", *o), env, k, d),
                )


def compare(config: RunConfig, env: Env, kind: Kind, dtype: torch.dtype) -> Finding:
    """One case: the device in `dtype` against the CPU in fp32."""
    mesh = mesh_of_one(config, env)
    exact = quick_stages(config, mesh, choose(torch.device("cpu")), torch.device("cpu"))
    _fill_parameters(exact)
    ops = choose_ops(config, mesh, env)
    ours = quick_stages(config, mesh, ops, env.device)
    ours.load_state_dict(exact.state_dict())
    ours.to(dtype)
    batch = packs(config, env, mesh, kind)
    expected, loss = gradients(exact, batch, choose(torch.device("cpu")))
    found, found_loss = gradients(ours, batch, ops)
    loss_bound, bound, experts_bound = _BOUNDS[dtype]
    bound = bound if config.model.decoder.moe is None else experts_bound
    return judge(found, expected, abs(found_loss - loss) / abs(loss), loss_bound, bound)


def gradients(stages: nn.ModuleList, batch: StepBatch, ops) -> tuple[dict[str, Tensor | None], float]:
    """Gradient of each trainable parameter, on the CPU in fp64 (None where there is none), and the loss."""
    with ops.products:
        loss = summed_loss(stages, batch)
        loss.backward()
    return {
        name.removeprefix("0.vlm."): None if parameter.grad is None else parameter.grad.double().cpu()
        for name, parameter in stages.named_parameters()
        if parameter.requires_grad
    }, loss.item()


def judge(
    found: Mapping[str, Tensor | None],
    expected: Mapping[str, Tensor | None],
    loss_error: float,
    loss_bound: float,
    bound: float,
) -> Finding:
    """The worst errors, and whether they are within the bounds. A parameter without a gradient has one of zeros."""
    norms = {name: 0.0 if grad is None else grad.norm().item() for name, grad in expected.items()}
    least = _SMALL * max(norms.values())
    errors = {}
    for name, grad in expected.items():
        theirs = found[name]
        difference = [each for each in (grad, theirs) if each is not None]
        size = (difference[0] - difference[1]) if len(difference) == 2 else difference[0] if difference else None
        errors[name] = 0.0 if size is None else size.norm().item() / max(norms[name], least)
    worst = sorted(errors, key=lambda name: (errors[name] == errors[name], -errors[name]))[:_WORST]  # nan first
    failures = []
    if not loss_error <= loss_bound:
        failures.append(f"loss off by {loss_error:.1e}, bound {loss_bound:g}")
    off = [name for name in errors if not errors[name] <= bound]
    if off:
        failures.append(
            f"{len(off)} of {len(errors)} gradients are off by more than {bound:g}: {', '.join(off[:_WORST])}"
        )
    return Finding(
        f"error of the loss {loss_error:.1e} (bound {loss_bound:g}), of the worst of {len(errors)} gradients "
        f"{errors[worst[0]]:.1e} (bound {bound:g}; {worst[0]})",
        {"loss_error": loss_error, "gradient_error": errors[worst[0]], "worst": worst[0]},
        [Table("worst gradients", ("parameter", "error"), [(name, f"{errors[name]:.1e}") for name in worst])]
        if off
        else (),
        failures,
    )


@torch.no_grad()
def _fill_parameters(stages: nn.Module) -> None:
    """Draw values that bf16 holds exactly and under which every part affects the loss: initial zeros, and norms of one,
    would hide errors."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in stages.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "anchors" in name:
            values = torch.zeros_like(noise)
        elif "alpha" in name:
            values = torch.full_like(noise, 0.7)
        elif "norm" in name and name.endswith("weight"):
            values = 1 + 0.2 * noise
        elif parameter.dim() == 1 or "rel_pos" in name or "pos_embed" in name:
            values = 0.3 * noise
        elif "experts" in name:
            values = noise / parameter.shape[-1] ** 0.5
        else:
            values = noise / parameter[0].numel() ** 0.5
        parameter.copy_(values.bfloat16())
