"""tools/gpu_check.py: the stages at tiny size on a CPU, and each rule by which a stage fails on made-up input."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

ROOT = Path(__file__).parents[2]
GIB = 1 << 30
AMPERE_KERNEL = "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_bf16_128x256_64x3_nt_align2>(Params)"
HOPPER_KERNEL = "nvjet_sm90_tst_128x256_64x4_2x1_v_bz_coopA_NTN"


@pytest.fixture(autouse=True)
def tools(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")


def command(*options: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "tools/gpu_check.py", *options],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=1200,
    )


def test_a_rehearsal_runs_every_stage(tmp_path):
    from gpu.stage import STAGES

    done = command("--rehearse", "--minutes", "15", "--output", str(tmp_path))
    report = json.loads((tmp_path / "report.json").read_text())
    page = (tmp_path / "report.md").read_text()
    stages = {stage["name"]: stage for stage in report["stages"]}
    assert list(stages) == [stage.name for stage in STAGES], done.stdout + done.stderr
    found = {(stage, each["name"]): each for stage in stages for each in stages[stage]["measurements"]}
    assert [(key, each["line"]) for key, each in found.items() if each["status"] == "failed"] == [], done.stdout
    assert done.returncode == 0
    for name, stage in stages.items():
        expected = "skipped" if name == "tests" else "passed"  # all tests marked gpu are skipped on a CPU
        assert (name, stage["status"], stage["line"]) == (name, expected, ""), page
        assert f"| **{name}** |  | **{expected}** |" in page
    for key, each in found.items():
        assert f"| {key[0]} | {key[1]} | {each['status']} |" in page
    assert "A rehearsal on a CPU" in page
    assert found["environment", "card"]["line"] == "not on a CPU"
    for kind in ("text", "multimodal"):
        assert found["slices.vl2_small", kind]["values"]["tokens_per_s"] > 0
        assert found["slices.vl2_small", f"{kind}: kernels"]["values"]["bytes"] > 1e6
        assert found["slices.vl2_small", f"{kind}: products"]["values"]["worst_share"] > 0
        assert len(found["slices.vl2_small", f"{kind}: kernels"]["tables"][0]["rows"]) == 10
        assert found["peers", f"{kind}: ratio"]["values"]["ratio"] > 0
    assert found["slices.vl_7b", "text, one document"]["values"]["documents"] == 1
    assert sum(stage == "agreement" for stage, _ in found) == 20
    assert found["agreement", "VL hybrid, multimodal, bfloat16"]["values"]["gradient_error"] > 0
    assert "debug_runs.vl2" in (tmp_path / "output.txt").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_device_it_says_so(tmp_path):
    done = command("--output", str(tmp_path / "out"))
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["error: there is no CUDA device here; --rehearse runs the same stages on a CPU"]
    assert not (tmp_path / "out").exists()


def test_an_unknown_stage_is_refused():
    done = command("--rehearse", "--only", "slice")
    assert done.returncode == 2
    assert "--only slice: no such stage; choose from agreement, ceilings, debug_runs, debug_runs.vl," in done.stderr


def test_a_group_and_what_is_compared_with_are_selected():
    from gpu.stage import select

    assert [stage.name for stage in select(["debug_runs"])] == ["debug_runs.vl", "debug_runs.vl2"]
    assert [stage.name for stage in select(["peers"])] == ["slices.vl_7b", "peers"]


def test_the_remaining_time_is_shared():
    from gpu.stage import Stage, limit_s

    one, other = Stage("one", "", "", 30), Stage("other", "", "", 70)
    assert limit_s(one, [other], 200) == 150  # 2.5 times its share
    assert limit_s(one, [other], 50) == 40  # the least that a stage gets
    assert limit_s(other, [], 30) == 30


HANG = "print('waiting for a peer', flush=True); import time; time.sleep(60)"
CRASH = "print('CUDA error: an illegal memory access', flush=True); raise SystemExit(3)"
# One measurement is recorded, the second kills the process; started again, it goes on with the third.
KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tools!r})
from gpu.results import Finding, Results
results = Results(Path({path!r}))
results.measure("first", lambda: Finding("1"))
results.measure("second", lambda: os.kill(os.getpid(), signal.SIGKILL))
results.measure("third", lambda: Finding("3"))
"""


@pytest.fixture
def made_up(monkeypatch, tmp_path):
    """Run stages that are Python texts by name; the report and the exit code."""

    def run(texts: dict[str, str], stop_s: float = 3) -> tuple[dict, str, int]:
        from gpu import runner
        from gpu.files import results_path
        from gpu.stage import Stage

        monkeypatch.setattr(runner, "limit_s", lambda *_: stop_s)

        def command(name, work):
            path = str(results_path(work, name))
            return [sys.executable, "-c", texts[name].format(tools=str(ROOT / "tools"), path=path)]

        stages = [Stage(name, "", "", 1) for name in texts]
        code = runner.run_stages(stages, command, 300, tmp_path, {"date": "", "command": "", "rehearsal": False})
        return json.loads((tmp_path / "report.json").read_text()), (tmp_path / "report.md").read_text(), code

    return run


PASSED = KILLED.replace("os.kill(os.getpid(), signal.SIGKILL)", "Finding('2')")


def test_a_hang_and_a_crash_cost_one_stage_each(made_up):
    report, page, code = made_up({"hang": HANG, "crash": CRASH, "passed": PASSED})
    hang, crash, passed = report["stages"]
    assert code == 1
    assert hang["status"] == "failed"
    assert hang["line"] == "cut at its limit of 3 s; last line: waiting for a peer"
    assert 3 <= hang["seconds"] < 30
    assert crash["line"] == "ended with exit code 3; last line: CUDA error: an illegal memory access"
    assert passed["status"] == "passed"
    assert [each["line"] for each in passed["measurements"]] == ["1", "2", "3"]
    assert hang["line"] in page and crash["line"] in page and "| passed | third | passed | 3 |" in page


def test_a_crash_costs_one_measurement(made_up):
    report, _, code = made_up({"killed": KILLED}, stop_s=30)
    (killed,) = report["stages"]
    assert code == 1
    assert [(each["name"], each["status"]) for each in killed["measurements"]] == [
        ("first", "passed"),
        ("second", "failed"),
        ("third", "passed"),
    ]
    assert killed["measurements"][1]["line"] == "ended with signal SIGKILL; last line: first: passed: 1"


def test_a_stage_that_is_cut_keeps_what_it_measured(made_up):
    slow = KILLED.replace("os.kill(os.getpid(), signal.SIGKILL)", "__import__('time').sleep(60)")
    report, _, _ = made_up({"slow": slow})
    (row,) = report["stages"]
    assert row["line"] == "cut at its limit of 3 s during second; last line: first: passed: 1"
    assert [each["status"] for each in row["measurements"]] == ["passed", "failed"]


def test_no_time_is_left(tmp_path):
    from gpu.runner import run_stages
    from gpu.stage import STAGES

    code = run_stages(STAGES[:2], None, 10, tmp_path, {"date": "", "command": "", "rehearsal": False})
    rows = json.loads((tmp_path / "report.json").read_text())["stages"]
    assert code == 3
    assert [row["status"] for row in rows] == ["not run", "not run"]
    assert rows[0]["line"] == "10 s of 10 were left, and a stage needs 15"


def test_an_error_that_breaks_the_device_ends_the_process(tmp_path):
    """It is started again for the rest; what is in the file is not measured again."""
    from gpu.results import RESTART, Finding, Results

    def breaks():
        raise RuntimeError("CUDA error: misaligned address\nCUDA kernel errors might be reported later")

    with pytest.raises(SystemExit) as end:
        Results(tmp_path / "r.json", broken=lambda: True).measure("first", breaks)
    assert end.value.code == RESTART
    again = Results(tmp_path / "r.json", broken=lambda: True)
    again.measure("first", breaks)
    again.measure("second", lambda: Finding("fine"))
    assert [each["status"] for each in again.measurements] == ["failed", "passed"]
    assert again.measurements[0]["line"].startswith("RuntimeError: CUDA error: misaligned address (test_gpu_check.py:")


def event(name: str, kernels: list[tuple[str, float]], shapes: list[list[int]]) -> SimpleNamespace:
    """An operation as torch's profiler gives it."""
    return SimpleNamespace(
        name=name,
        device_type=DeviceType.CPU,
        kernels=[SimpleNamespace(name=each, duration=duration) for each, duration in kernels],
        input_shapes=shapes,
    )


def on_device(name: str, microseconds: float) -> SimpleNamespace:
    """A kernel as torch's profiler gives it."""
    return SimpleNamespace(
        name=name,
        device_type=DeviceType.CUDA,
        is_user_annotation=False,
        time_range=SimpleNamespace(elapsed_us=lambda: microseconds),
    )


def traffic(dtype: torch.dtype, shapes=((4096, 4096), (4096, 11008)), alignment: int = 2):
    from gpu.kernels import Operand, Traffic

    found = Traffic()
    key = "mm", shapes
    found.operands[key].add(tuple(Operand(shape, (shape[1], 1), dtype) for shape in shapes))
    found.alignments[key] = alignment
    return found


@pytest.mark.parametrize(
    ("kernel", "microseconds", "dtype", "major", "failure"),
    [
        (HOPPER_KERNEL, 480, torch.bfloat16, 9, None),  # 770 TFLOP/s
        (HOPPER_KERNEL, 800, torch.bfloat16, 9, "reaches 462 TFLOP/s, 59% of its ceiling of 780"),
        (AMPERE_KERNEL, 480, torch.bfloat16, 9, f"runs as {AMPERE_KERNEL}, operands on 2 bytes, at 770 TFLOP/s"),
        ("gemm_bf16_align1", 480, torch.bfloat16, 9, "runs as gemm_bf16_align1"),
        ("gemm_bf16_align8", 480, torch.bfloat16, 9, None),
        ("gemm_bf16_align16", 480, torch.bfloat16, 9, None),
        (AMPERE_KERNEL, 2000, torch.bfloat16, 8, None),  # an A100 has no others
        ("cutlass_80_simt_sgemm_128x64_8x5_nt_align1", 9000, torch.float32, 9, None),
    ],
)
def test_products_of_hopper(kernel, microseconds, dtype, major, failure):
    from gpu.kernels import read_events
    from gpu.products import failures, gather

    shapes = ((4096, 4096), (4096, 11008))
    events = [
        event("aten::linear", [], [[4096, 4096], [11008, 4096]]),
        event("aten::mm", [(kernel, microseconds)], [*map(list, shapes), []]),
        on_device(kernel, microseconds),
        on_device("Memset (Device)", 3.0),
    ]
    profile = read_events(events, on_cuda=True)
    assert profile.seconds == pytest.approx((microseconds + 3) / 1e6)
    assert profile.dearest()[0][:2] == (kernel, 1)
    (product,) = gather(profile.products, traffic(dtype), {("mm", shapes): 780e12})
    assert product.flops == 2 * 4096 * 4096 * 11008
    found = failures([product], major)
    assert len(found) == (failure is not None)
    assert failure is None or failure in found[0]


def test_small_products_are_judged_by_their_kernel_alone():
    from gpu.kernels import Launch
    from gpu.products import failures, gather

    shapes = ((4096, 2048), (2048, 64))  # 1 GFLOP
    launches = [Launch("mm", shapes, (name,), 100.0) for name in (HOPPER_KERNEL, AMPERE_KERNEL)]
    found = failures(gather(launches, traffic(torch.bfloat16, shapes), {("mm", shapes): 780e12}), 9)
    assert len(found) == 1 and AMPERE_KERNEL in found[0]


def test_calls_of_other_kernels_are_other_products():
    from gpu.kernels import Launch
    from gpu.products import gather

    shapes = ((4096, 4096), (4096, 11008))
    launches = [Launch("mm", shapes, (HOPPER_KERNEL,), time) for time in (480.0, 500.0)]
    launches.append(Launch("mm", shapes, (AMPERE_KERNEL,), 1100.0))
    launches.append(Launch("mm", ((0, 32), (32, 64)), (HOPPER_KERNEL,), 2.0))
    slow, fast = gather(launches, traffic(torch.bfloat16), {})
    assert (slow.kernels, slow.calls, fast.calls) == ((AMPERE_KERNEL,), 1, 2)
    assert fast.seconds == pytest.approx(490e-6)


def test_traffic_counts_what_is_read_and_written():
    from gpu.kernels import Traffic

    x, weight = torch.ones(8, 4), torch.ones(6, 4, requires_grad=True)
    with Traffic() as found:
        (x @ weight.t()).sum().backward()
    ((_, shapes),) = [key for key in found.operands if key[1][0] == (8, 4)]
    assert shapes == ((8, 4), (4, 6))
    assert len(found.operands) == 2  # forward, and the gradient of the weight
    assert found.bytes >= 4 * (8 * 4 + 6 * 4 + 8 * 6)


def test_operands_of_a_ceiling_have_the_layout():
    from gpu.kernels import Operand
    from gpu.products import product_of

    layout = (Operand((8, 4), (4, 1), torch.float32), Operand((4, 6), (1, 4), torch.float32))
    assert product_of("mm", layout, torch.device("cpu"))().shape == (8, 6)
    stacks = (Operand((2, 3, 4), (12, 4, 1), torch.float32), Operand((2, 4, 5), (20, 1, 4), torch.float32))
    assert product_of("bmm", stacks, torch.device("cpu"))().shape == (2, 3, 5)


def test_waits_are_counted_by_line():
    from gpu.waits import places

    caught = [
        SimpleNamespace(message=UserWarning(text), filename="/x/megavl/model/stem.py", lineno=line)
        for text, line in (
            ("called a synchronizing CUDA operation (Triggered internally at ...)", 7),
            ("called a synchronizing CUDA operation", 7),
            ("a deprecated name", 8),
        )
    ]
    assert places(caught) == {"megavl/model/stem.py:7": 2}


def test_misaligned_places_fail():
    from gpu.offsets import Place, judge

    places = [Place("parameters", "a", 0, 0x1000), Place("parameters", "b", 258, 0x1102), Place("masters", "a", 0, 64)]
    finding = judge(places, addresses=True)
    assert finding.failures == [
        "1 of 2 parameters do not begin on 128 bytes, first b at byte 258 of its buffer, address 0x1102",
        "1 of 1 masters do not begin on 128 bytes, first a at byte 0 of its buffer, address 0x40",
    ]
    assert len(judge(places, addresses=False).failures) == 1


@pytest.mark.parametrize(
    ("theirs", "loss_error", "failed"),
    [
        (torch.tensor([1.0, 2.0]), 0.0, 0),
        (torch.tensor([1.0, 2.5]), 0.0, 1),
        (torch.tensor([math.nan, 2.0]), 0.0, 1),
        (torch.tensor([1.0, 2.0]), math.nan, 1),
        (None, 0.0, 1),
    ],
)
def test_gradients_that_differ_fail(theirs, loss_error, failed):
    from gpu.agreement import judge

    expected = {"a": torch.tensor([1.0, 2.0]), "tower": None}
    finding = judge({"a": theirs, "tower": torch.zeros(2)}, expected, loss_error, 1e-4, 1e-3)
    assert len(finding.failures) == failed


def test_as_many_blocks_as_fit():
    """The slices that were measured took 48.7 and 55.5 GiB, with images 48.9 and 59.6 (docs/benchmarks/gpu.md)."""
    from gpu.capacity import capacity
    from gpu.run import full_width

    dense, routed = capacity(full_width("vl_7b")), capacity(full_width("vl2_small"))
    assert dense.blocks(int(48.9 * GIB)) < 6 <= dense.blocks(56 * GIB)
    assert routed.blocks(int(59.6 * GIB)) < 4 <= routed.blocks(62 * GIB)
    assert dense.blocks(GIB) == 0


@pytest.mark.parametrize(
    ("kind", "tokens", "judged", "failure"),
    [
        ("text", 126.0, True, None),
        ("text", 124.0, True, "1.24 is below the bar of 1.25"),
        ("text", math.nan, True, "nan is below the bar of 1.25"),
        ("text", 124.0, False, None),
        ("multimodal", 126.0, True, "1.26 is below the bar of 1.40"),
    ],
)
def test_the_ratio_to_transformers_has_a_bar(kind, tokens, judged, failure):
    from gpu.peers import ratio

    finding = ratio({f"{kind}, one document": {"tokens_per_s": tokens}}, {"tokens_per_s": 100.0}, kind, judged)
    assert list(finding.failures) == ([] if failure is None else [failure])
    assert ("missed" in finding.line) == bool(failure) and ("; bar" in finding.line) == judged


def test_a_value_below_its_bar_fails():
    from gpu.bars import Bar, judge

    bars = [Bar("mfu", 0.55, "{:.1%} MFU"), Bar("tokens_per_s", 75_000, "{:,.0f} tokens/s")]
    assert judge(bars, {"mfu": 0.56, "tokens_per_s": 74_000}) == (
        "; bar 55.0% MFU: met; bar 75,000 tokens/s: missed",
        ["74,000 tokens/s is below the bar of 75,000 tokens/s"],
    )
    assert judge(bars, {"mfu": None}) == ("", [])  # a card without a data sheet


def test_a_ratio_needs_both_sides():
    from gpu.peers import ratio
    from gpu.results import Skipped

    with pytest.raises(Skipped):
        ratio({}, {"tokens_per_s": 100.0}, "text", judged=True)


@pytest.mark.parametrize(
    ("losses", "resumed", "failure"),
    [
        ([6.0, 5.8, 5.5, 5.2], False, None),
        ([6.0, 6.0, 5.9, 5.9], False, "did not fall"),
        ([6.0, 5.0, math.nan, 5.0], False, "not finite"),
        ([6.0, 5.8, 5.5], False, "not 1 to 4"),
        ([6.0, 5.8, 5.5, 7.0], True, "jumped by 1.500"),
        ([6.0, 5.8, 5.5, 5.6], True, None),
    ],
)
def test_losses_of_a_debug_run(losses, resumed, failure):
    from gpu.debug_runs import Leg, judge

    rows = [{"step": step, "loss": loss, "kind": "text"} for step, loss in enumerate(losses, start=1)]
    found = judge(rows, Leg("leg", "cuda", 4), resumed, must_fall=True).failures
    assert (found == []) if failure is None else (failure in found[0])


def test_what_pytest_says():
    from gpu.results import Skipped
    from gpu.tests import judge, marked_files

    failed = ["FAILED tests/ops/test_grouped.py::test - AssertionError", "1 failed, 3 passed in 2.10s"]
    assert judge(failed, 1).failures == [failed[0]]
    assert judge(["4 passed in 2.10s"], 0).failures == []
    with pytest.raises(Skipped, match="4 skipped"):
        judge(["4 skipped in 2.10s"], 0)
    with pytest.raises(Skipped, match="gigatoken is not installed"):
        judge(["E   ModuleNotFoundError: No module named 'gigatoken'", "1 error in 0.2s"], 2)
    files = marked_files(ROOT)
    assert files[0].startswith("tests/ops/") and "tests/launch/test_gpu.py" in files


def test_a_report_of_any_text_is_a_table():
    from gpu.report import markdown

    stage = {"name": "s", "status": "failed", "seconds": 3.2, "limit_s": 40, "line": "a | b", "last_lines": ["end"]}
    each = {"name": "m", "status": "failed", "line": "|q|", "tables": [{"title": "t", "columns": ["c"], "rows": [[1]]}]}
    page = markdown({"date": "d", "command": "c", "rehearsal": False, "stages": [stage | {"measurements": [each]}]})
    assert "| **s** |  | **failed** | 3 s of 40; a &#124; b |" in page
    assert "| s | m | failed | &#124;q&#124; |" in page
    assert "### s, m: t\n\n| c |\n|---|\n| 1 |" in page
    assert "```\nend\n```" in page


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--minutes", "0.1"], "--minutes 0.1: a stage needs 15 s"),
        (["--minutes", "nan"], "--minutes nan"),
        (["--output", "/proc/absent/report"], "/proc/absent/report cannot be written to"),
    ],
)
def test_options_that_leave_no_report_are_refused(options, words):
    done = command("--rehearse", *options)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
