"""Launches and bytes of decoder blocks on GPUs: the bars that they keep, and the parts of what the table shows."""

import json
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megavl.config.presets import PRESETS
from megavl.model.block import Block
from megavl.model.layout import PackLayout
from megavl.ops.dispatch import Ops
from megavl.parallel.groups import ExpertAxis, TensorAxis
from tests.tools.test_benchmark import benchmark, cells

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("tools")

TOKENS, DOCUMENTS = 4096, 4
# Launches of a block, forward and backward, and its bytes over the least of its operators.
BARS = {("vl_7b", 0): (90, 1.3), ("vl2_small", 0): (90, 1.3), ("vl2_small", 1): (180, 1.3)}
# Of each operator on Hopper, forward and backward together: launches, least MB, bytes over least. On Ampere the norms
# move less: every multiprocessor writes parts of their gradients, and there are fewer.
LATENT = {
    "rms_norm": (6, 105, 1.10),
    "attn.kv_down_proj": (3, 67, 1.07),
    "attn.kv_up_proj": (3, 92, 1.36),
    "attn.q_proj": (3, 138, 1.18),
    "rotate_latent": (2, 221, 1.00),
    "attention": (5, 252, 1.37),
    "attn.o_proj": (3, 109, 1.15),
    "add_rms_norm": (3, 134, 1.06),
}
TABLE = {
    ("vl_7b", 0): {
        "rms_norm": (3, 168, 1.10),
        "attn.q_proj + k_proj + v_proj": (3, 604, 1.17),
        "rotate_halves": (2, 273, 1.00),
        "attention": (4, 403, 1.00),
        "attn.o_proj": (3, 268, 1.12),
        "add_rms_norm": (3, 268, 1.06),
        "mlp.gate_proj + up_proj": (3, 1002, 1.18),
        "swiglu": (2, 721, 1.00),
        "mlp.down_proj": (3, 608, 1.06),
        "rest": (3, 403, 1.00),
    },
    ("vl2_small", 0): {
        **LATENT,
        "mlp.gate_proj + up_proj": (3, 678, 1.26),
        "swiglu": (2, 717, 1.00),
        "mlp.down_proj": (3, 437, 1.04),
        "rest": (5, 201, 0.96),
    },
    ("vl2_small", 1): {
        **LATENT,
        "router": (42, 52, 1.73),
        "permutation.sort_by_expert": (2, 1, 1.42),
        "permutation.spread": (2, 236, 1.00),
        "mlp.shared.gate_proj + up_proj": (3, 212, 1.22),
        "swiglu": (2, 185, 1.00),
        "mlp.shared.down_proj": (3, 137, 1.12),
        "expert_mlp": (7, 3825, 1.28),
        "permutation.combine": (2, 336, 1.00),
        "rest": (9, 302, 1.14),
    },
}
# With the layer of experts as grouped products and the activation: one more sum of gradients, in `rest`.
COMPOSED = {
    "expert_mlp.grouped_linear": (10, 4612, 1.05),
    "expert_mlp.swiglu": (2, 554, 1.00),
    "rest": (10, 302, 2.14),
}
# What a trial may choose: GPU and the candidate for the layer of experts.
CHOICES = [("hopper", "triton"), ("hopper", "torch"), ("ampere", "triton")]


def table(block: tuple[str, int], experts: str) -> dict[str, tuple[int, int, float]]:
    if experts == "triton" or "expert_mlp" not in TABLE[block]:
        return TABLE[block]
    return {name: row for name, row in TABLE[block].items() if name != "expert_mlp"} | COMPOSED


@cache
def counted(gpu: str, triton: bool, preset: str, layer: int, experts: str = "auto") -> dict:
    from benchmarks.kernels import block_row

    from megavl.rehearsal.gpus import GPUS, gpu_ops

    ops = gpu_ops(GPUS[gpu], triton, [("expert_mlp", experts)])
    return block_row(PRESETS[preset], layer, TOKENS, DOCUMENTS, GPUS[gpu], ops)


def both_passes(row: dict, kind: str, what: str) -> int:
    return row["forward"][kind][what] + row["backward"][kind][what]


@pytest.mark.parametrize(("gpu", "experts"), CHOICES)
@pytest.mark.parametrize("block", BARS, ids=str)
def test_a_block_keeps_its_bars(block, gpu, experts):
    found, (most_launches, most_bytes) = counted(gpu, True, *block, experts), BARS[block]
    measured, least = found["total"]["measured"], found["total"]["least"]
    assert measured["launches"] <= most_launches  # measured 29, 41 and at most 106
    assert measured["bytes"] <= most_bytes * least["bytes"]  # measured 1.08, 1.12 and at most 1.22
    expected = table(block, experts)
    assert {row["operator"] for row in found["operators"]} == set(expected)
    for row in found["operators"]:
        launches, least_mb, over = expected[row["operator"]]
        bound = both_passes(row, "least", "bytes")
        assert both_passes(row, "measured", "launches") <= launches, row
        assert round(bound / 1e6) == least_mb, row
        assert both_passes(row, "measured", "bytes") <= (over + 0.005) * bound, row


@pytest.mark.parametrize("block", BARS, ids=str)
def test_torch_alone_keeps_no_bar(block):
    found, (most_launches, most_bytes) = counted("hopper", False, *block), BARS[block]
    measured, least = found["total"]["measured"], found["total"]["least"]
    assert measured["launches"] > most_launches  # measured 99, 136 and 276
    assert measured["bytes"] > most_bytes * least["bytes"]  # measured 2.5, 2.2 and 2.2


def test_a_launch_of_a_kernel_has_the_bytes_of_its_tensors():
    """RMSNorm of [T, D] in bf16 reads x and the weight, and writes the normalised values and 4 bytes for each row. In
    its backward pass every program writes a part of the weight's gradient in fp32, and a second kernel adds them up."""
    from megavl.rehearsal.gpus import GPUS

    rows, width, parts = TOKENS, 4096, 4 * GPUS["hopper"].multiprocessors
    (norm,) = (row for row in counted("hopper", True, "vl_7b", 0)["operators"] if row["operator"] == "rms_norm")
    matrix, weight, statistics, part = 2 * rows * width, 2 * width, 4 * rows, 4 * parts * width
    assert norm["forward"]["measured"] == {"launches": 1, "bytes": 2 * matrix + weight + statistics}
    backward = (3 * matrix + weight + statistics + part) + (part + weight)
    assert norm["backward"]["measured"] == {"launches": 2, "bytes": backward}


def test_kernels_run_again_afterwards():
    """Outside of a count, a launch is Triton's own."""
    from triton.runtime.jit import JITFunction

    from megavl.rehearsal.triton_launches import noted_launches

    run, noted = JITFunction.run, []
    with noted_launches(noted.append):
        assert JITFunction.run is not run
        x, y = torch.empty(2), torch.empty(2)
        JITFunction.run(SimpleNamespace(), x, y, x, 3, grid=(1,), warmup=False, BLOCK=4)
    assert JITFunction.run is run
    ((first, second),) = noted
    assert first is x and second is y


def test_the_command(tmp_path):
    file = tmp_path / "kernels.json"
    options = ["--presets", "vl_1b", "vl2_tiny", "--tokens", "512", "--gpus", "hopper", "--json", str(file)]
    page = benchmark("kernels", *options).stdout
    found = json.loads(file.read_text())
    (row,) = found["gpus"]
    assert row["gpu"] == "H100" and any(line.startswith("rms_norm: Triton") for line in row["implementations"])
    blocks = row["blocks"]
    assert [(block["model"], block["kind"]) for block in blocks] == [
        ("vl_1b", "dense"),
        ("vl2_tiny", "dense"),
        ("vl2_tiny", "experts"),
    ]
    totals = cells(page, "**block**")
    for block, shown in zip(blocks, totals, strict=True):
        measured, least = block["total"]["measured"], block["total"]["least"]
        assert shown[1:3] == [str(measured["launches"]), str(least["launches"])]
        assert shown[5] == f"{measured['bytes'] / least['bytes']:.2f}"
        for total, kind in ((measured, "measured"), (least, "least")):
            for what in ("launches", "bytes"):
                assert sum(both_passes(row, kind, what) for row in block["operators"]) == total[what]
        assert f"| {block['operators'][0]['operator']} |" in page
    products = {row["operator"]: row for row in blocks[0]["operators"]}
    width, tokens = 2048, 512
    # x [T, D], W [D, D] and y [T, D] in bf16, each once.
    exact = {"launches": 1, "bytes": 2 * (2 * tokens * width + width * width)}
    assert products["attn.o_proj"]["forward"] == {"measured": exact, "least": exact}
    assert products["attn.o_proj"]["backward"]["measured"]["launches"] == 2
    assert products["attention"]["forward"]["measured"]["launches"] == 1


def without_labels(ops: Ops, gpu) -> tuple[int, int]:
    from benchmarks.attribution import Attribution
    from benchmarks.flat import lay_flat
    from benchmarks.kernels import Tally

    decoder = PRESETS["vl2_tiny"].decoder
    torch.set_default_dtype(torch.bfloat16)
    try:
        with FakeTensorMode():
            block = Block(decoder, 1, TensorAxis(), ExpertAxis(), ops)
            lay_flat(block)
            tables = [torch.empty(64, 1, decoder.head_width // 2, dtype=torch.float32) for _ in range(2)]
            layout = PackLayout(torch.arange(3, dtype=torch.int32), (32, 32), 1, *tables)
            hidden = torch.empty(64, decoder.width, requires_grad=True)
            with Tally(Attribution(), gpu) as tally:
                out = block(hidden, layout)
                out.backward(torch.empty_like(out))
    finally:
        torch.set_default_dtype(torch.float32)
    return sum(work.launches for work in tally.work.values()), sum(work.bytes for work in tally.work.values())


@pytest.mark.parametrize("triton", [True, False], ids=["triton", "torch"])
def test_labels_add_no_launches(triton):
    """What a block launches in all is what it launches without labels."""
    from benchmarks.kernels import count_block

    from megavl.rehearsal.gpus import GPUS, gpu_ops

    gpu = GPUS["hopper"]
    ops = gpu_ops(gpu, triton)
    measured, _ = count_block(PRESETS["vl2_tiny"].decoder, 1, 64, 2, gpu, ops)
    launches, size = without_labels(ops, gpu)
    assert sum(work.launches for work in measured.values()) == launches > 80
    assert sum(work.bytes for work in measured.values()) == size


def test_what_cannot_be_counted_is_refused(monkeypatch):
    from benchmark import kernels_parser
    from benchmarks import kernels

    with pytest.raises(SystemExit, match="choose --gpus hopper"):
        kernels.run(kernels_parser().parse_args(["--ops", "torch"]))
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="Triton is not installed"):
        kernels.run(kernels_parser().parse_args([]))
