"""Kernels compiled for GPUs that need not be there."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

# Compute capability: shared memory that one program may have, in bytes (CUDA programming guide, technical
# specifications per compute capability).
SHARED_BYTES = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024}


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
