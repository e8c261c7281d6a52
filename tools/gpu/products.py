"""Matrix products of a run beside what their shapes reach alone.

A product fails if its kernel is one of Ampere's or has narrow loads, or if it runs below 85 % of its own ceiling: the
same operation on the same shapes and layouts, on fresh and aligned tensors, in the same process. Only products of
16-bit operands are judged, because fp32 products do not use Hopper's matrix units. Products below 10 GFLOP have no
ceiling: they take less than 13 us on a Hopper GPU, and a large part of that is the start and the end of the kernel.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from math import prod

import torch
from gpu.kernels import Launch, Operand, Shapes, Traffic
from gpu.timing import seconds_of
from torch import Tensor

# Kernels of Ampere, or with loads of 1, 2 or 4 elements, to which cuBLAS falls back for misaligned operands.
_FALLBACK = re.compile(r"align[124](?!\d)|cutlass_80")
# Kernels whose name says that they read 16-bit operands.
_HALF_KERNEL = re.compile(r"bf16|fp16|f16|hgemm|nvjet\w*_(hsh|tst)_")
LEAST_SHARE = 0.85
LEAST_FLOPS = 10e9
_HOPPER = 9
_HALF = frozenset((torch.bfloat16, torch.float16))
# Sets of operands used in turn, so that no call finds its operands in the cache.
_SETS = 3
# Experts of a layer, for grouped products whose shapes do not give their number.
_GROUPS = 64


@dataclass(frozen=True)
class Product:
    """Calls of one operation on one set of shapes by the same kernels.

    flops:   of one call
    seconds: of one call, the mean
    ceiling: FLOP/s of these shapes alone, None where it was not measured
    dtypes:  of the operands, empty where they are not known
    """

    operation: str
    shapes: Shapes
    kernels: tuple[str, ...]
    calls: int
    flops: float
    seconds: float
    ceiling: float | None
    alignment_bytes: int | None = None
    dtypes: frozenset[torch.dtype] = frozenset()

    @property
    def judged(self) -> bool:
        """Whether the rules apply: to 16-bit operands. Where no dtype is known, the names of the kernels tell."""
        if self.dtypes:
            return self.dtypes <= _HALF
        return any(_HALF_KERNEL.search(name) for name in self.kernels)

    @property
    def rate(self) -> float:
        """FLOP/s."""
        return self.flops / self.seconds if self.seconds else 0.0

    @property
    def share(self) -> float | None:
        """Of the ceiling."""
        return self.rate / self.ceiling if self.ceiling else None

    def __str__(self) -> str:
        return f"{self.operation} {' x '.join('[' + ', '.join(map(str, shape)) + ']' for shape in self.shapes)}"


def gather(launches: Sequence[Launch], traffic: Traffic, ceilings: Mapping[tuple[str, Shapes], float]) -> list[Product]:
    """Launches by operation, shapes and kernels, the longest together first; products of empty factors are left out."""
    groups: dict[tuple, list[Launch]] = defaultdict(list)
    for launch in launches:
        groups[launch.operation, launch.shapes, launch.kernels].append(launch)
    found = [
        Product(
            operation,
            shapes,
            kernels,
            len(calls),
            flops(shapes),
            sum(call.microseconds for call in calls) / len(calls) / 1e6,
            ceilings.get((operation, shapes)),
            traffic.alignments.get((operation, shapes)),
            frozenset(operand.dtype for layout in traffic.operands.get((operation, shapes), ()) for operand in layout),
        )
        for (operation, shapes, kernels), calls in groups.items()
        if len(shapes) == 2 and flops(shapes)
    ]
    return sorted(found, key=lambda product: -product.calls * product.seconds)


def flops(shapes: Shapes) -> float:
    """Of a product of two matrices, of two stacks of them, or of rows with the matrix of their group each."""
    first, second = shapes
    return 2.0 * prod(first) * second[-1]


def failures(products: Sequence[Product], capability_major: int) -> list[str]:
    """What is wrong with each product, on Hopper; on other architectures these kernels are the right ones."""
    if capability_major != _HOPPER:
        return []
    found = []
    for product in filter(lambda product: product.judged, products):
        if fallback := next((name for name in product.kernels if _FALLBACK.search(name)), None):
            aligned = f", operands on {product.alignment_bytes} bytes" if product.alignment_bytes else ""
            found.append(f"{product} runs as {fallback}{aligned}, at {product.rate / 1e12:.0f} TFLOP/s")
        elif product.flops >= LEAST_FLOPS and product.share is not None and product.share < LEAST_SHARE:
            found.append(
                f"{product} reaches {product.rate / 1e12:.0f} TFLOP/s, {product.share:.0%} of its ceiling of "
                f"{product.ceiling / 1e12:.0f}, as {product.kernels[0]}"
            )
    return found


def ceilings(traffic: Traffic, least_flops: float, device: torch.device) -> dict[tuple[str, Shapes], float]:
    """FLOP/s of each product of 16-bit operands alone, on tensors of the same layout. The slowest of several layouts of
    one shape counts: the profiler does not tell them apart."""
    found = {}
    for key, layouts in traffic.operands.items():
        operation, shapes = key
        if len(shapes) != 2 or flops(shapes) < max(least_flops, 1):
            continue
        half = [layout for layout in layouts if all(operand.dtype in _HALF for operand in layout)]
        try:
            rates = [flops(shapes) / seconds_of(product_of(operation, layout, device), device) for layout in half]
        except RuntimeError as error:  # the other products keep theirs
            print(f"no ceiling of {operation} {shapes}: {error}", flush=True)
            continue
        if rates:
            found[key] = min(rates)
    return found


def product_of(operation: str, layout: tuple[Operand, ...], device: torch.device) -> Callable[[], Tensor]:
    """A call of the operation on operands of its own, another set each time."""
    first, second = layout
    match operation:
        case "_grouped_mm":
            multiply = partial(torch.nn.functional.grouped_mm, offs=_ends(first, second, device))
        case "bmm" | "baddbmm":
            multiply = torch.bmm
        case _:
            multiply = torch.mm
    sets = cycle([tuple(_like(operand, device) for operand in layout) for _ in range(_SETS)])
    return lambda: multiply(*next(sets))


def _like(operand: Operand, device: torch.device) -> Tensor:
    """Random values in dense memory with the dims in the operand's order."""
    order = sorted(range(len(operand.shape)), key=lambda dim: -operand.strides[dim])
    dense = torch.randn([operand.shape[dim] for dim in order], device=device, dtype=operand.dtype)
    return dense.permute([order.index(dim) for dim in range(len(order))])


def _ends(first: Operand, second: Operand, device: torch.device) -> Tensor:
    """End of the rows of each group, int32 [groups], for equally likely groups: as with an untrained router, their
    sizes are no multiples of a kernel's tile."""
    if len(second.shape) == 3:
        rows, groups = first.shape[0], second.shape[0]
    else:
        rows, groups = first.shape[1], _GROUPS
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(groups, (rows,), generator=generator).bincount(minlength=groups)
    return counts.cumsum(0, dtype=torch.int32).to(device)
