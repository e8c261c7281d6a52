"""Every kernel compiles for the GPUs that users have: it spills no registers and reads 16 bytes at a time."""

import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from megavl.ops.kernels import activation, cross_entropy, latent, norm, rope  # noqa: E402
from megavl.ops.kernels.tiles import heads_per_tile, warps  # noqa: E402

AMPERE, HOPPER = 80, 90
# What every GPU gives a program without being asked for more.
SHARED_BYTES = 48 * 1024


@dataclass(frozen=True)
class Launch:
    """A kernel as a run launches it. pointers: types of its first arguments; the others are integers, or as named."""

    kernel: Any
    pointers: str
    constants: Mapping[str, Any]
    warps: int = 4

    def compile(self, capability: int) -> Any:
        names = self.kernel.arg_names
        pointers = self.pointers.split()
        types = dict(zip(names, (f"*{pointer}" for pointer in pointers), strict=False))
        types |= {name: "fp32" if name == "eps" else "i32" for name in names[len(pointers) :]}
        types |= dict.fromkeys(self.constants, "constexpr")
        # Allocations are aligned, and so are the strides and widths of the models; of counts nothing is assumed.
        aligned = {
            (i,): [["tt.divisibility", 16]]
            for i, parameter in enumerate(self.kernel.params)
            if types[parameter.name][0] in "*i" and not parameter.do_not_specialize
        }
        source = ASTSource(self.kernel, types, constexprs=dict(self.constants), attrs=aligned)
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": self.warps})


def _norm(kernel: Any, pointers: str, block: int, **constants: int) -> Launch:
    return Launch(kernel, pointers, {**constants, "BLOCK": block}, norm.warps(block))


def _rotation(heads: int, k_heads: int, half: int, back: bool) -> Launch:
    constants = {"HEADS": heads_per_tile(heads, half), "K_HEADS": heads_per_tile(k_heads, half)}
    constants |= {"BACK": back, "HALF": half}
    # Triton makes a constant of an argument that is 1.
    constants |= {name: 1 for name, count in (("heads", heads), ("k_heads", k_heads)) if count == 1}
    return Launch(rope.rotate_kernel, "bf16 bf16 bf16 bf16 fp32 fp32", constants, warps(constants["HEADS"], half))


def _latent(heads: int, back: bool) -> Launch:
    kernel, pointers = (latent.backward_kernel, 6) if back else (latent.forward_kernel, 5)
    constants = {"HEADS": heads_per_tile(heads, 128), "NOPE": 128, "HALF": 32} | ({"VALUE": 128} if back else {})
    constants |= {"heads": 1} if heads == 1 else {}
    return Launch(kernel, "bf16 " * pointers + "fp32 fp32", constants, warps(constants["HEADS"], 128))


_FORWARD, _BACKWARD = "{0} {0} {0} {0} {0} fp32", "{0} {0} fp32 {0} {0} {0} fp32"
LAUNCHES = {
    # Widths of the presets and the widest one that the kernels serve.
    "norm, 4096": _norm(norm.forward_kernel, _FORWARD.format("bf16"), 4096, ADD=False),
    "norm, 8192, add": _norm(norm.forward_kernel, _FORWARD.format("fp32"), 8192, ADD=True),
    "norm backward, 512": _norm(norm.backward_kernel, _BACKWARD.format("bf16"), 512, ADD=False, WEIGHT=True),
    "norm backward, 4096, add": _norm(norm.backward_kernel, _BACKWARD.format("bf16"), 4096, ADD=True, WEIGHT=True),
    "norm backward, 8192, add": _norm(norm.backward_kernel, _BACKWARD.format("fp32"), 8192, ADD=True, WEIGHT=True),
    "norm backward, frozen": _norm(norm.backward_kernel, _BACKWARD.format("bf16"), 4096, ADD=True, WEIGHT=False),
    "sum": Launch(norm.sum_kernel, "fp32 bf16", {"ROWS": norm.SUM_ROWS, "COLUMNS": norm.SUM_COLUMNS}),
    "halves of VL-7B": _rotation(32, 32, 64, back=False),
    "halves, one head": _rotation(1, 1, 64, back=True),
    "latent of VL2-Small": _latent(16, back=False),
    "latent of VL2-Small, backward": _latent(16, back=True),
    "latent, one head": _latent(1, back=False),
    "latent backward, one head": _latent(1, back=True),
    "swiglu": Launch(activation.forward_kernel, "bf16 bf16 bf16", {"BLOCK": activation.BLOCK}),
    "swiglu backward": Launch(activation.backward_kernel, "bf16 bf16 bf16 bf16 bf16", {"BLOCK": activation.BLOCK}),
    "statistics": Launch(
        cross_entropy.statistics_kernel,
        "bf16 i64 fp32 fp32 fp32",
        {"BLOCK": cross_entropy.STATISTICS_BLOCK},
        cross_entropy.STATISTICS_WARPS,
    ),
    "gradient": Launch(
        cross_entropy.gradient_kernel,
        "bf16 i64 fp32",
        {"BLOCK": cross_entropy.GRADIENT_BLOCK},
        cross_entropy.GRADIENT_WARPS,
    ),
}
SPILLING = Launch(norm.forward_kernel, _FORWARD.format("fp32"), {"ADD": True, "BLOCK": 16384}, warps=1)


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    """Compile a launch for a compute capability, with an empty cache: resources per thread and program."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))

    def resources(launch: Launch, capability: int) -> dict[str, int]:
        binary = launch.compile(capability)
        cubin = tmp_path / "kernel.cubin"
        cubin.write_bytes(binary.asm["cubin"])
        dump = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin]
        said = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
        found = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
        return found | {
            "SHARED": binary.metadata.shared,
            "WIDE": len(re.findall(r"ld\.global\S*\.v4", binary.asm["ptx"])),
        }

    return resources


@pytest.mark.parametrize("capability", [AMPERE, HOPPER])
@pytest.mark.parametrize("name", LAUNCHES)
def test_it_compiles_and_spills_nothing(compiled, name, capability):
    found = compiled(LAUNCHES[name], capability)
    assert found["LOCAL"] == found["STACK"] == 0, found
    # The channels of one head are fewer than the bytes that a warp loads at a time.
    assert found["WIDE"] > 0 or name.endswith("one head"), found
    assert found["SHARED"] <= SHARED_BYTES, found
    assert found["REG"] * 32 * LAUNCHES[name].warps <= 64 * 1024, found


def test_a_spill_is_noticed(compiled):
    found = compiled(SPILLING, HOPPER)
    assert found["LOCAL"] + found["STACK"] > 0, found
