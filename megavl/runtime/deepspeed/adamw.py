"""AdamW: choice of the implementation for a device, and where each implementation keeps its number of updates.

Nothing is compiled at run time: apex's and DeepSpeed's are chosen only if their extension was built at install time.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from deepspeed import git_version_info
from deepspeed.ops.adam import FusedAdam
from deepspeed.ops.op_builder import FusedAdamBuilder
from torch import Tensor

# (groups, lr=, betas=, eps=) -> optimizer; each group has its own "lr" and "weight_decay".
Build = Callable[..., torch.optim.Optimizer]


@dataclass(frozen=True)
class AdamW:
    """One implementation.

    build: makes the optimizer
    line: its name and the reason for the choice, for the log
    """

    build: Build
    line: str


def choose_adamw(device: torch.device, zero: int) -> AdamW:
    """The fastest implementation that is built in this installation: apex's, DeepSpeed's, torch's.

    Args:
        device: where the parameters are.
        zero: ZeRO stage.
    """
    if device.type != "cuda":
        return _torch_adamw(f"apex's and DeepSpeed's need CUDA, the device is {device}")
    build, no_apex = _apex(zero)
    if build is not None:
        return AdamW(build, "optimizer: apex FusedAdam")
    build, no_deepspeed = _deepspeed()
    if build is not None:
        return AdamW(build, f"optimizer: DeepSpeed FusedAdam, built at install time ({no_apex})")
    return _torch_adamw(f"{no_apex}; {no_deepspeed}")


def _torch_adamw(why: str) -> AdamW:
    def build(groups: list[dict], **hyper) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, fused=True, **hyper)

    return AdamW(build, f"optimizer: torch AdamW, fused ({why})")


def _apex(zero: int) -> tuple[Build | None, str]:
    """The builder, or None and the reason."""
    if zero == 3:
        # ZeRO-3 calls step() once for each part of a group; apex counts updates per group, so it would count parts.
        return None, "apex counts updates per group, which is wrong under ZeRO-3"
    try:
        # apex imports without its compiled extension, and fails when called.
        import amp_C  # noqa: F401
        from apex.optimizers import FusedAdam as ApexFusedAdam
    except ImportError as error:
        return None, f"apex does not import: {_first_line(error)}"
    return _decoupled(ApexFusedAdam), ""


def _deepspeed() -> tuple[Build | None, str]:
    """The builder, or None and the reason."""
    # The condition under which DeepSpeed's loader imports the extension; otherwise the loader compiles one.
    built = git_version_info.installed_ops.get("fused_adam", False) and git_version_info.accelerator_name == "cuda"
    if not built:
        return None, "DeepSpeed was installed without its fused Adam"
    try:
        FusedAdamBuilder().load()
    except (ImportError, RuntimeError) as error:  # built for another torch or CUDA
        return None, f"DeepSpeed's fused Adam does not load: {_first_line(error)}"
    return _decoupled(FusedAdam), ""


def _first_line(error: Exception) -> str:
    """At most 120 characters of its first line."""
    return (str(error).splitlines() or [type(error).__name__])[0][:120]


def _decoupled(fused_adam: Callable[..., torch.optim.Optimizer]) -> Build:
    """A fused Adam of apex's signature as AdamW."""

    def build(groups: list[dict], **hyper) -> torch.optim.Optimizer:
        return fused_adam(groups, adam_w_mode=True, **hyper)

    return build


def first_step(adam: torch.optim.Optimizer, master: Tensor) -> Tensor | int:
    """The number of updates in the state of a new parameter: torch's fused kernel reads it on the device."""
    if isinstance(adam, torch.optim.AdamW):
        return torch.zeros((), dtype=torch.float32, device=master.device)
    return 0


def scale_gradients(adam: torch.optim.Optimizer, scale: Tensor) -> None:
    """Make the next update use the gradients of `adam` times `scale`, float32 []. Does not wait for the device.

    torch's fused kernel scales while it updates; for the others it is a pass of its own.
    """
    if isinstance(adam, torch.optim.AdamW):
        adam.grad_scale, adam.found_inf = scale.reciprocal(), None  # as torch.amp.GradScaler sets them
    else:
        for group in adam.param_groups:
            torch._foreach_mul_([parameter.grad for parameter in group["params"]], scale)


def set_step(adam: torch.optim.Optimizer, step: int) -> None:
    """Set the number of updates of every parameter of `adam`, from which bias correction is computed."""
    for state in adam.state.values():
        if torch.is_tensor(state["step"]):
            state["step"].fill_(step)
        else:
            state["step"] = step
    if not isinstance(adam, torch.optim.AdamW):
        for group in adam.param_groups:
            group["step"] = step  # apex counts here; DeepSpeed's FusedAdam starts new states from here
