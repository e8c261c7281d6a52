"""Triton's interpreter with a GPU's bf16 arithmetic."""

import numpy as np
import torch


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
