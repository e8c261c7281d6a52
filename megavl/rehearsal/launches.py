"""Operations that launch work, and the bytes of memory that they touch, as a dispatch mode sees them."""

from functools import cache

from torch import Tensor
from torch._ops import OpOverload

# These allocate, return another view, compute a dtype, or copy a number to the host, and launch nothing.
_WITHOUT_KERNEL = (
    *("empty", "new_empty", "_unsafe_view", "detach", "alias", "lift_fresh"),
    *("promote_types", "_local_scalar_dense"),
)


@cache
def launches_kernel(operation: OpOverload) -> bool:
    """Whether an operation launches a kernel."""
    if operation.namespace == "prim":  # such as the device of a fake tensor
        return False
    returned = [each.alias_info for each in operation._schema.returns]
    is_view = any(alias is not None and not alias.is_write for alias in returned)
    return not is_view and not operation._schema.name.partition("::")[2].startswith(_WITHOUT_KERNEL)


def distinct_bytes(tensor: Tensor) -> int:
    """Bytes of memory that a tensor spans; a dim that it is expanded over counts once."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride or size == 0 else 1
    return elements * tensor.element_size()
