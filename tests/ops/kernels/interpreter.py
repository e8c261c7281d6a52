"""Triton's interpreter with a GPU's rounding, and kernels with a deliberate mistake."""

import importlib
import importlib.util
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from unittest import mock

import numpy as np
import torch
from torch import Tensor

# Text of a kernel's source, and the mistake in its place.
Mistake = tuple[str, str]


def repair_interpreter() -> None:
    """Make the interpreter round to bf16 and multiply bf16 matrices as a GPU does, and accept computed bounds of loops.

    Triton 3.6 to 3.9 cut the lower bits off and multiply the bits of bf16 as integers; 3.6 takes a bound from an array
    in a way that numpy 2.4 refuses.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    convert, patch = interpreter._convert_float, interpreter._patch_lang_tensor
    multiply = interpreter.InterpreterBuilder.create_dot

    def rounding(values: np.ndarray, source: tl.dtype, target: tl.dtype, mode: object) -> np.ndarray:
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(values, source, target, mode)
        wide = torch.from_numpy(np.array(values, dtype=np.float32))
        return wide.bfloat16().view(torch.uint16).numpy()

    def indexing(tensor: type, *scope: object) -> None:
        patch(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    def widening(builder, a, b, *rest: object) -> object:
        if a.dtype.scalar == tl.bfloat16:
            a, b = (builder.cast_impl(each, tl.float32) for each in (a, b))
        return multiply(builder, a, b, *rest)

    interpreter._convert_float, interpreter._patch_lang_tensor = rounding, indexing
    interpreter.InterpreterBuilder.create_dot = widening


def kernels(name: str, mistake: Mistake | None = None) -> ModuleType:
    """`megavl.ops.kernels.NAME`, or a copy of it with a mistake."""
    module = importlib.import_module(f"megavl.ops.kernels.{name}")
    if mistake is None:
        return module
    right, wrong = mistake
    source = Path(module.__file__).read_text()
    assert source.count(right) >= 1, f"{name} has no {right!r}"
    # Triton reads the source of a kernel from its file.
    path = Path(tempfile.mkdtemp()) / f"wrong_{name}.py"
    path.write_text(source.replace(right, wrong))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    copy = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = copy
    spec.loader.exec_module(copy)
    return copy


def passes(function: Callable, operands: list[Tensor], upstream: list[Tensor | None]) -> list[Tensor]:
    """Outputs of a function, and the gradients of its operands. An output whose upstream gradient is None is unused."""
    leaves = [x.detach().requires_grad_() for x in operands]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    used = [(output, grad) for output, grad in zip(outputs, upstream, strict=True) if grad is not None]
    gradients = torch.autograd.grad([output for output, _ in used], leaves, [grad for _, grad in used])
    return [*(x.detach() for x in outputs), *gradients]


@contextmanager
def no_launch(module: ModuleType, *names: str) -> Iterator[None]:
    """While entered, a launch of one of these kernels of a module fails."""
    with mock.patch.multiple(module, **dict.fromkeys(names)):
        yield


def error(found: list[Tensor], exact: list[Tensor]) -> float:
    """Largest difference, relative to the largest value of the tensor that it occurs in."""
    worst = 0.0
    for ours, value in zip(found, exact, strict=True):
        assert ours.shape == value.shape
        if value.numel():
            difference = (ours.double() - value.double()).abs().max() / value.double().abs().max().clamp(min=1e-30)
            worst = max(worst, difference.nan_to_num(torch.inf).item())
    return worst


def normal(seed: int, dtype: torch.dtype, *shapes: tuple[int, ...], device: str = "cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def sliced(x: Tensor, before: int = 3, after: int = 5) -> Tensor:
    """The values of `x` as a slice of a wider tensor: rows further apart than they are wide, at an odd address."""
    wide = x.new_full((*x.shape[:-1], before + x.shape[-1] + after), torch.nan)
    wide[..., before : before + x.shape[-1]] = x
    return wide[..., before : before + x.shape[-1]]


def far_apart(x: Tensor) -> Tensor:
    """The values of `x` with rows 2^30 elements apart, so that the offset of the third exceeds int32. Memory that is
    not touched is not taken."""
    stride = 2**30
    wide = torch.empty((len(x) - 1) * stride + x[0].numel(), dtype=x.dtype, device=x.device)
    inner = x[0].contiguous().stride()
    view = wide.as_strided(x.shape, (stride, *inner))
    return view.copy_(x)
