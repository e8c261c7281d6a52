"""The start-time trial, with stand-ins for kernels and clock: what is wrong, slow or broken is found, and results are
kept."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F

from megavl.ops.activation import swiglu
from megavl.ops.attention import reference_attention
from megavl.ops.candidates import REFERENCE
from megavl.ops.cases import (
    attention_case,
    cross_entropy_case,
    expert_mlp_case,
    grouped_linear_case,
    latent_rotary_case,
    norm_case,
    permutation_case,
    rotary_case,
    router_case,
    swiglu_case,
)
from megavl.ops.cross_entropy import REFERENCE_CROSS_ENTROPY, CrossEntropy
from megavl.ops.expert_mlp import ComposedExpertMlp
from megavl.ops.grouped import reference_grouped_linear
from megavl.ops.norm import REFERENCE_NORMS, Norms, add_rms_norm, rms_norm
from megavl.ops.permutation import REFERENCE_PERMUTATION, combine, permute, sort_by_expert
from megavl.ops.rope import REFERENCE_ROTARY, Rotary, rotate_halves, rotate_latent
from megavl.ops.router import reference_router_logits, wide_router_logits
from megavl.ops.trial import Result, Trial, compare

CPU = torch.device("cpu")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


class Clock:
    """Runs what it times, and gives the times that it was made with, in turn."""

    def __init__(self, *times: float):
        self.times, self.calls = list(times), 0

    def __call__(self, call) -> float:
        call()
        self.calls += 1
        return self.times.pop(0) if self.times else 1.0


def wide_swiglu(gate, up):
    """Rounds once, where the reference rounds twice."""
    return (F.silu(gate.float()) * up.float()).to(gate.dtype)


def wide_norm(x, weight, eps):
    return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)


def wide_add_norm(h, delta, weight, eps):
    return h + delta, wide_norm(h + delta, weight, eps)


def stale_gradient(logits, columns, log_normaliser):
    REFERENCE_CROSS_ENTROPY.write_gradient(logits, columns.roll(1), log_normaliser)


def detached_norm(h, delta, weight, eps):
    """Right forward; its gradient misses the residual stream's own."""
    total, normed = add_rms_norm(h, delta, weight, eps)
    return total.detach() + 0 * h, normed


def wide_grouped_linear(x, weight, groups):
    """Rounds once, as a fused kernel does."""
    return reference_grouped_linear(x.float(), weight.float(), groups).to(x.dtype)


def one_expert(x, weight, groups):
    """All rows with the first matrix."""
    return F.linear(x, weight[0]) + 0 * weight.sum()


def without_weight_gradient(x, weight, groups):
    return wide_grouped_linear(x, weight.detach(), groups) + 0 * weight.sum()


def unstable_sort(experts, total):
    """Equal experts in the opposite order."""
    order, inverse, counts = sort_by_expert(experts.flip(0), total)
    return len(experts) - 1 - order, inverse.flip(0), counts


def wide_attention(q, k, v, cu_seqlens, lengths):
    """Rounds once, as a fused kernel does."""
    return reference_attention(q.float(), k.float(), v.float(), cu_seqlens, lengths).to(q.dtype)


def backwards(q, kv, k_rope, cos, sin):
    """Rotates by the negative angle."""
    return rotate_latent(q, kv, k_rope, cos, -sin)


def without_a_head(q, kv, k_rope, *tables):
    """Right forward; the gradient of the shared channels misses one head."""
    q, k, v = rotate_latent(q, kv, k_rope, *tables)
    alone = rotate_latent(q.detach(), kv, k_rope.detach(), *tables)[1]  # [T, H, nope + rope]
    return q, torch.cat((alone[:, :1], k[:, 1:]), 1), v


CASES = {
    "attention": (attention_case, ((20, 11, 9), 4, 2, 16, 8), reference_attention, wide_attention),
    "rms_norm": (norm_case, (40, 48, 1e-6), REFERENCE_NORMS, Norms(wide_norm, wide_add_norm)),
    "swiglu": (swiglu_case, (40, 48), swiglu, wide_swiglu),
    "halves": (rotary_case, (40, 4, 2, 16), REFERENCE_ROTARY, Rotary(rotate_halves, rotate_latent)),
    "latent": (latent_rotary_case, (40, 4, 10, 6, 8), REFERENCE_ROTARY, Rotary(rotate_halves, rotate_latent)),
    "cross_entropy": (cross_entropy_case, (40, 300), REFERENCE_CROSS_ENTROPY, REFERENCE_CROSS_ENTROPY),
    "router": (
        router_case,
        (40, 12, 48),
        reference_router_logits,
        wide_router_logits(lambda left, right: left.float() @ right.float()),
    ),
    "permutation": (permutation_case, (40, 3, 8, 16), REFERENCE_PERMUTATION, REFERENCE_PERMUTATION),
    "grouped_linear": (grouped_linear_case, (50, 4, 16, 24), reference_grouped_linear, wide_grouped_linear),
    "expert_mlp": (
        expert_mlp_case,
        (50, 4, 16, 24),
        ComposedExpertMlp(reference_grouped_linear, swiglu),
        ComposedExpertMlp(wide_grouped_linear, wide_swiglu),
    ),
}
WRONG = {
    "attention": [
        lambda q, k, v, cu_seqlens, lengths: reference_attention(q, k, v, cu_seqlens, [sum(lengths)]),
        lambda q, k, v, cu_seqlens, lengths: wide_attention(1.1 * q, k, v, cu_seqlens, lengths),
        lambda q, k, v, cu_seqlens, lengths: wide_attention(q, k.detach(), v, cu_seqlens, lengths) + 0 * k.sum(),
    ],
    "rms_norm": [
        Norms(lambda x, weight, eps: rms_norm(x, weight, eps) * 1.01, add_rms_norm),
        Norms(rms_norm, detached_norm),
        Norms(lambda x, weight, eps: rms_norm(x, weight, eps).detach() + 0 * x + 0 * weight, add_rms_norm),
        Norms(lambda x, weight, eps: rms_norm(x, weight, eps).double(), add_rms_norm),
    ],
    "swiglu": [
        lambda gate, up: F.gelu(gate) * up,
        lambda gate, up: swiglu(gate, up).where(torch.arange(gate.shape[1]) < 47, torch.nan),
        lambda gate, up: swiglu(gate.detach(), up) + 0 * gate,
    ],
    "halves": [
        Rotary(lambda q, k, cos, sin: rotate_halves(q, k, cos, -sin), rotate_latent),
        Rotary(lambda q, k, *tables: (q * 1, k * 1), rotate_latent),
    ],
    "latent": [Rotary(rotate_halves, backwards), Rotary(rotate_halves, without_a_head)],
    "cross_entropy": [
        CrossEntropy(REFERENCE_CROSS_ENTROPY.statistics, lambda *_: None),
        CrossEntropy(REFERENCE_CROSS_ENTROPY.statistics, stale_gradient),
    ],
    "router": [
        lambda h, weight: F.linear(h.bfloat16(), weight.bfloat16()).float(),
        lambda h, weight: reference_router_logits(h, weight.detach()) + 0 * weight.sum(),
    ],
    "permutation": [
        dataclasses.replace(
            REFERENCE_PERMUTATION, combine=lambda rows, weights, *places: combine(rows, 2 * weights, *places)
        ),
        dataclasses.replace(REFERENCE_PERMUTATION, permute=lambda rows, order, inverse: permute(rows, inverse, order)),
        dataclasses.replace(REFERENCE_PERMUTATION, sort_by_expert=unstable_sort),
    ],
    "grouped_linear": [
        one_expert,
        lambda x, weight, groups: wide_grouped_linear(x, weight.detach(), groups) + 0 * weight.sum(),
    ],
    "expert_mlp": [ComposedExpertMlp(reference_grouped_linear, lambda gate, up: F.gelu(gate) * up)],
}


@DTYPES
@pytest.mark.parametrize("name", CASES)
def test_what_is_right_passes(name, dtype):
    case, sizes, reference, right = CASES[name]
    results = compare(case(*sizes, dtype=dtype), {"fused": right, REFERENCE: reference}, CPU, Clock(0.1, 0.2))
    assert results == [Result("fused", 0.1), Result(REFERENCE, 0.2)]


@DTYPES
@pytest.mark.parametrize(
    ("name", "index"), [(name, index) for name, wrong in WRONG.items() for index in range(len(wrong))]
)
def test_what_is_wrong_has_a_fault(name, index, dtype):
    case, sizes, reference, _ = CASES[name]
    implementations = {"fused": WRONG[name][index], REFERENCE: reference}
    fused, torchs = compare(case(*sizes, dtype=dtype), implementations, CPU, Clock(0.1, 0.2))
    assert fused.fault.startswith("result ") and fused.seconds == 0.1
    assert torchs == Result(REFERENCE, 0.2)


def broken(*_):
    raise RuntimeError("no C compiler\nand a long story")


def test_what_raises_has_a_fault():
    case = swiglu_case(4, 8, torch.float32)
    assert compare(case, {"fused": broken, REFERENCE: swiglu}, CPU, Clock()) == [
        Result("fused", None, "RuntimeError: no C compiler"),
        Result(REFERENCE, 1.0),
    ]
    fused, torchs = compare(case, {"fused": swiglu, REFERENCE: broken}, CPU, Clock())
    assert fused.fault == torchs.fault == "the reference cannot be tried: RuntimeError: no C compiler"


def trial(folder, clock, **changes) -> Trial:
    cases = {"swiglu": swiglu_case(4, 8, torch.float32)}
    return dataclasses.replace(Trial(cases, CPU, "a device", folder, clock), **changes)


IMPLEMENTATIONS = {"swiglu": {"fused": wide_swiglu, REFERENCE: swiglu}, "attention": {REFERENCE: None}}


def test_results_are_kept(tmp_path):
    folder, clock = tmp_path / "new" / "folder", Clock(0.1, 0.2)
    first = trial(folder, clock)(IMPLEMENTATIONS)
    assert first == {"swiglu": [Result("fused", 0.1), Result(REFERENCE, 0.2)]} and clock.calls == 2
    assert trial(folder, clock)(IMPLEMENTATIONS) == first and clock.calls == 2
    assert len(list(folder.iterdir())) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"machine": "another device"},
        {"cases": {"swiglu": swiglu_case(4, 16, torch.float32)}},
        {"cases": {"swiglu": swiglu_case(4, 8, torch.bfloat16)}},
    ],
    ids=["machine", "shapes", "dtype"],
)
def test_other_circumstances_are_measured_again(tmp_path, changes):
    clock = Clock()
    trial(tmp_path, clock)(IMPLEMENTATIONS)
    trial(tmp_path, clock, **changes)(IMPLEMENTATIONS)
    assert clock.calls == 4


def test_other_candidates_parts_and_sources_are_measured_again(tmp_path, monkeypatch):
    clock = Clock()
    trial(tmp_path, clock)(IMPLEMENTATIONS)
    trial(tmp_path, clock)({"swiglu": {"other": wide_swiglu, REFERENCE: swiglu}})
    trial(tmp_path, clock)(IMPLEMENTATIONS, ["grouped_mm"])
    monkeypatch.setattr("megavl.ops.trial._sources", lambda: "a changed kernel")
    trial(tmp_path, clock)(IMPLEMENTATIONS)
    assert clock.calls == 8


@pytest.mark.parametrize("damage", ["", "[]", '{"results": []}', '{"key": 0, "results": [{"nme": 1}]}'])
def test_a_damaged_file_is_measured_again(tmp_path, damage):
    clock = Clock()
    trial(tmp_path, clock)(IMPLEMENTATIONS)
    (path,) = tmp_path.iterdir()
    path.write_text(damage)
    assert trial(tmp_path, clock)(IMPLEMENTATIONS)["swiglu"][0].name == "fused" and clock.calls == 4
    assert json.loads(path.read_text())["results"]


def test_what_raised_is_tried_again(tmp_path):
    clock = Clock()
    for _ in range(2):
        trial(tmp_path, clock)({"swiglu": {"fused": broken, REFERENCE: swiglu}})
    assert clock.calls == 2 and not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (None, tmp_path / "file" / "folder"):
        assert trial(folder, Clock())(IMPLEMENTATIONS)["swiglu"][0] == Result("fused", 1.0)


def test_one_process_measures_for_the_others(tmp_path):
    """The others time nothing, read no file, and take what is shared."""
    clock, shared = Clock(), []
    trial(tmp_path, clock, share=lambda mine: shared.append(mine) or mine)(IMPLEMENTATIONS)
    other = trial(tmp_path, clock, measures=False, share=lambda mine: shared.append(mine) or shared[0])
    assert other(IMPLEMENTATIONS) == shared[0] and shared[1] is None and clock.calls == 2


def test_nothing_is_timed_where_only_the_reference_is():
    clock = Clock()
    assert trial(None, clock)({"swiglu": {REFERENCE: swiglu}}) == {"swiglu": [Result(REFERENCE, None)]}
    assert clock.calls == 0
