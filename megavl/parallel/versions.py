"""Collectives whose names differ between the supported versions of torch (2.11 to 2.13).

| name here               | torch 2.13              | torch 2.11 and 2.12           |
|-------------------------|-------------------------|-------------------------------|
| `all_gather_single`     | `all_gather_single`     | `all_gather_into_tensor`      |
| `reduce_scatter_single` | `reduce_scatter_single` | `reduce_scatter_tensor`       |

torch 2.13 keeps the old names, which emit a FutureWarning. Arguments and results are the same.
"""

from collections.abc import Callable

import torch.distributed as dist


def first_of(module: object, *names: str) -> Callable:
    """The first attribute of `module` in `names` that exists.

    Raises:
        ImportError: none of them does.
    """
    for name in names:
        if hasattr(module, name):
            return getattr(module, name)
    raise ImportError(f"{module} has none of {', '.join(names)}: install a version of torch that setup.py allows")


all_gather_single = first_of(dist, "all_gather_single", "all_gather_into_tensor")
reduce_scatter_single = first_of(dist, "reduce_scatter_single", "reduce_scatter_tensor")
