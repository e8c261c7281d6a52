"""Triton kernels on a CPU: a process whose kernels run in Triton's interpreter, and compilation without a GPU.

`TRITON_INTERPRET` is read where a kernel is defined, so the interpreter has a process of its own.
"""

import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

# Compute capability: shared memory that one program may have, in bytes (CUDA programming guide, technical
# specifications per compute capability).
SHARED_BYTES = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024}


@contextmanager
def interpreter() -> Iterator[Callable[..., Any]]:
    """A function that calls another one, of the top level of a module, where kernels are interpreted."""
    pytest.importorskip("triton")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=_interpret) as executor:
        yield lambda function, *args: executor.submit(function, *args).result()


def _interpret() -> None:
    """Have kernels interpreted in this process, with the bf16 arithmetic of a GPU in place of Triton 3.9's."""
    os.environ["TRITON_INTERPRET"] = "1"
    import numpy as np
    import torch
    import triton.language as tl
    from triton.runtime import interpreter as triton_interpreter

    convert, create_dot = triton_interpreter._convert_float, triton_interpreter.InterpreterBuilder.create_dot

    def rounded(data, from_type, to_type, rounding_mode):
        if (from_type, to_type) != (tl.float32, tl.bfloat16):
            return convert(data, from_type, to_type, rounding_mode)
        # A GPU rounds to the nearest; the interpreter cuts off.
        return torch.tensor(data).bfloat16().view(torch.int16).numpy().view(np.uint16)

    def dot(self, a, b, *rest):
        # The interpreter multiplies the bits of bf16 as integers.
        if a.dtype.scalar == tl.bfloat16:
            a, b = (self.cast_impl(each, tl.float32) for each in (a, b))
        return create_dot(self, a, b, *rest)

    triton_interpreter._convert_float = rounded
    triton_interpreter.InterpreterBuilder.create_dot = dot


@dataclass(frozen=True)
class Compiled:
    """Code and resources of a kernel: shared memory of a program in bytes, registers of a thread, and the stack of a
    thread in bytes, which is where registers are spilled."""

    ptx: str
    shared_bytes: int
    registers: int
    stack_bytes: int

    def __repr__(self) -> str:
        return f"{self.shared_bytes} bytes shared, {self.registers} registers, {self.stack_bytes} bytes of stack"


def compiled(
    kernel, capability: int, types: dict[str, str], constants: dict[str, Any], odd: tuple[str, ...] = (), **options
) -> Compiled:
    """Compile a kernel for a GPU that need not be there.

    Args:
        capability: 80 for Ampere, 90 for Hopper
        types: Triton's type of each argument that is no constant
        constants: the constants
        odd: arguments that are not divisible by 16; launches tell the compiler that others are
        options: num_warps, num_stages
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    assert {name for name, kind in signature.items() if kind == "constexpr"} == set(constants)
    divisible = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if name in types and name not in odd and (types[name][0] == "*" or types[name] == "i32")
    }
    source = ASTSource(kernel, signature, constexprs=constants, attrs=divisible)
    with tempfile.TemporaryDirectory() as cache, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", cache)
        result = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        assert result.asm["cubin"][:4] == b"\x7fELF"
        path = Path(cache, "kernel.cubin")
        path.write_bytes(result.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    registers, stack_bytes = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return Compiled(result.asm["ptx"], result.metadata.shared, int(registers), int(stack_bytes))
