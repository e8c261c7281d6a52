"""What a text step computes in the vision encoder."""

from collections import Counter
from collections.abc import Callable

from torch import nn

# Parts of the stem that only images need.
_PARTS = ("siglip", "sam", "adaptor")


def tower_work(stage: nn.Module, work: Callable[[], object]) -> Counter[str]:
    """Forward calls of each tower and the adaptor, and gradients of their parameters, while `work` runs. Zeros are left
    out."""
    found: Counter[str] = Counter()
    hooks = []

    def count(what: str) -> Callable[..., None]:
        def hook(*_args) -> None:
            found[what] += 1

        return hook

    stem = stage.vlm.stem
    for name, part in stem.named_children():
        if name in _PARTS:
            hooks.append(part.register_forward_hook(count(f"{name} forward")))
            hooks += [
                parameter.register_hook(count(f"gradients in {name}"))
                for parameter in part.parameters()
                if parameter.requires_grad
            ]
    if not hooks:
        raise ValueError(f"the stem has none of {', '.join(_PARTS)}: what its towers compute cannot be seen")
    try:
        work()
    finally:
        for hook in hooks:
            hook.remove()
    return found
