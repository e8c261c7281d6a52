"""What one micro-batch launches: kernels from torch's profiler, operations and their bytes from a dispatch mode."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megavl.rehearsal.launches import distinct_bytes, launches_kernel

# Matrix products by the name that the profiler has for them.
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_grouped_mm")
_DEAREST = 10

Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Launch:
    """An operation and the kernels that it launched."""

    operation: str
    shapes: Shapes
    kernels: tuple[str, ...]
    microseconds: float


@dataclass(frozen=True)
class Profile:
    """Of one micro-batch, forward and backward.

    kernels:  (name, microseconds) of each kernel and copy on the device; of each operation where it is a CPU
    products: the matrix products
    """

    kernels: tuple[tuple[str, float], ...]
    products: tuple[Launch, ...]

    @property
    def seconds(self) -> float:
        """Time that the device was busy, on one stream."""
        return sum(microseconds for _, microseconds in self.kernels) / 1e6

    def dearest(self) -> list[tuple[str, int, float, float]]:
        """(name, count, ms, share of the time) of the kernels that take longest together."""
        times, counts = Counter(), Counter()
        for name, microseconds in self.kernels:
            times[name] += microseconds
            counts[name] += 1
        whole = sum(times.values()) or 1.0
        return [(name, counts[name], time / 1e3, time / whole) for name, time in times.most_common(_DEAREST)]


def profile_of(work: Callable[[], None], on_cuda: bool) -> Profile:
    """Run `work`, which synchronizes at its end, under torch's profiler."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_cuda
    with profile(activities=activities, record_shapes=True) as recorded:
        work()
    return read_events(recorded.events(), on_cuda)


def read_events(events: Iterable, on_cuda: bool) -> Profile:
    """The profiler's FunctionEvents. On a CPU an operation is its own kernel."""
    kernels, products = [], []
    for event in events:
        if event.device_type != DeviceType.CPU:
            if not event.is_user_annotation:
                kernels.append((event.name, event.time_range.elapsed_us()))
            continue
        launched = [(each.name, each.duration) for each in event.kernels]
        if not on_cuda and event.name.startswith("aten::"):
            launched = [(event.name, event.self_cpu_time_total)]
            kernels += launched
        operation = event.name.removeprefix("aten::")
        if operation in PRODUCTS and launched:
            names = tuple(name for name, _ in launched)
            shapes = matrices(event.input_shapes)
            products.append(Launch(operation, shapes, names, sum(microseconds for _, microseconds in launched)))
    return Profile(tuple(kernels), tuple(products))


def matrices(shapes: Iterable) -> Shapes:
    """The shapes of the two factors: biases, offsets and scalars have fewer than two dims."""
    return tuple(tuple(shape) for shape in shapes if len(shape) >= 2)[-2:]


@dataclass(frozen=True)
class Operand:
    """A factor of a product: its memory layout decides which kernel can serve it."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


@dataclass(eq=False)
class Traffic(TorchDispatchMode):
    """Counts operations that launch something, the bytes of their inputs and outputs, and the products' operands.

    alignments: by product and shapes, the largest power of two that divides the address of every operand, at most 128
    """

    operations: int = 0
    bytes: int = 0
    operands: dict[tuple[str, Shapes], set[tuple[Operand, ...]]] = field(default_factory=lambda: defaultdict(set))
    alignments: dict[tuple[str, Shapes], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function._schema.name.partition("::")[2]
        if launches_kernel(function):
            tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
            self.operations += 1
            self.bytes += sum(map(distinct_bytes, tensors))
            if name in PRODUCTS:
                self._count_product(name, [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)])
        return out

    def _count_product(self, name: str, tensors: list[Tensor]) -> None:
        factors = [tensor for tensor in tensors if tensor.dim() >= 2][-2:]
        key = name, tuple(tuple(tensor.shape) for tensor in factors)
        self.operands[key].add(tuple(Operand(tuple(t.shape), t.stride(), t.dtype) for t in factors))
        for tensor in factors:
            address = tensor.data_ptr() | 128
            self.alignments[key] = min(self.alignments.get(key, 128), address & -address)
