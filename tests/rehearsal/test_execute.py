"""A rank on fake tensors does what the same rank does in a real process: messages, kernels, and peak memory."""

import pytest
import torch.distributed as dist

from megavl.config.load import load_run
from megavl.config.run import RunConfig
from megavl.plan.cost import Count, encoder_parameters, item_parameters
from megavl.plan.mix import expected_steps
from megavl.plan.peak import StepMemory
from megavl.plan.split import split_model
from megavl.plan.state import state_bytes
from megavl.rehearsal.execute import Rehearsal, execute
from megavl.rehearsal.gpus import GPUS
from tests.models import changed
from tests.rehearsal.ranks import Observed, fake, real
from tests.runtime.cases import MODEL, VL2, run_config

KINDS = ["text", "multimodal"]
BF16, FP32 = ({"precision": precision, "global_batch": 4} for precision in ("bf16", "fp32"))
RECOMPUTED = {"recompute": "block", "recompute_towers": True}
LONG = ("one rank", "tp 2, tiles sharded", "tp 2 with sequence, fp32", "ZeRO-1, recomputed, fp32")
COPIED = ("reduce-scatter", "all-gather")
SHALLOW = changed(MODEL, decoder={"layers": 4})
# name: (ranks, configuration)
CASES = {
    "one rank": (1, {"train": BF16}),
    "dp 2 x pp 2": (4, {"train": BF16, "parallel": {"pipeline": 2}}),
    "tp 2 with sequence, fp32": (2, {"train": FP32, "parallel": {"tensor": 2, "sequence": True, "zero": 0}}),
    "tp 2, tiles sharded": (2, {"train": BF16, "parallel": {"tensor": 2, "vision": "sharded"}}),
    "expert 2": (2, {"train": BF16, "parallel": {"expert": 2}, "model": VL2["small"]}),
    "ZeRO-1, recomputed, fp32": (2, {"train": FP32 | RECOMPUTED, "parallel": {"zero": 1}}),
}


def _param(name: str):
    return pytest.param(name, marks=pytest.mark.long if name in LONG else ())


@pytest.fixture(scope="module", params=map(_param, CASES))
def ranks(request, pool) -> list[tuple[Observed, Observed]]:
    """The first and the last rank, each in a real process and on fake tensors."""
    world, changes = CASES[request.param]
    config = run_config(world, **({"model": SHALLOW} | changes))
    processes = pool.run(world, real, config, KINDS)
    return [
        (processes[rank], *pool.run(1, fake, config, KINDS, world, rank, processes[rank].reads))
        for rank in sorted({0, world - 1})
    ]


def test_the_same_numbers_are_read(ranks):
    for process, rehearsed in ranks:
        assert process.reads and not rehearsed.reads


def test_the_same_messages_are_sent(ranks):
    for process, rehearsed in ranks:
        for theirs, ours in zip(sum(process.steps, ()), sum(rehearsed.steps, ()), strict=True):
            assert ours.messages == theirs.messages


def test_the_same_kernels_are_launched(ranks):
    """All but copies are equal. A process may have more copies than fake tensors have, and how many differs from run to
    run: in backward passes they have the shapes of gradients that were just reduced over gloo."""
    for process, rehearsed in ranks:
        for theirs, their_copies, ours, our_copies in zip(
            sum(process.steps, ()), process.copies, sum(rehearsed.steps, ()), rehearsed.copies, strict=True
        ):
            assert ours.kernels - our_copies == theirs.kernels - their_copies
            assert our_copies <= their_copies
            if our_copies == their_copies:
                assert ours.bytes == theirs.bytes
            else:
                assert ours.messages


def test_the_same_memory_is_in_use(ranks):
    """Peaks of every phase, and the state by kind. Five runs of "expert 2" were equal in 49 of 50 phases and 0.4 % off
    in one; another run was more than 1 % off. What a process holds beyond that differs from run to run."""
    for process, rehearsed in ranks:
        for theirs, ours in zip(process.peaks, rehearsed.peaks, strict=True):
            total = ours.total - ours.bytes["inputs"]  # a real process has its inputs in host memory already
            assert total == pytest.approx(theirs.total, rel=0.05)
            for kind in ("weights", "masters", "gradients", "moments"):
                assert ours.bytes[kind] == theirs.bytes[kind]


def test_the_allocator_of_a_process_agrees(ranks):
    """Peaks by torch's own record, which includes what kernels allocate within. The largest error was 2 %."""
    for process, rehearsed in ranks:
        messages = [{}, *(counts.messages for step in rehearsed.steps for counts in step)]
        for allocated, ours, sent in zip(process.allocated, rehearsed.peaks, messages, strict=True):
            # Not compared: the process allocates more there, which is outside of what the rank itself does.
            if not {name for _, name in sent} & {*COPIED, "all-to-all"}:
                total = ours.total - ours.bytes["inputs"]
                assert total == pytest.approx(allocated, rel=0.05)


def _rehearse(config: RunConfig, world: int, rank: int) -> Rehearsal:
    dist.destroy_process_group()  # that of the pool
    return execute(config, world, rank, GPUS["hopper"])


@pytest.mark.long
def test_a_rank_of_a_full_size_run(pool):
    """Rank 192 of 512 of DeepSeek-VL-7B: 144 micro-batches, 26 to 41 s of processor time."""
    config = load_run("launch/recipes/vl_7b_stage2.yaml", [])
    [done] = pool.run(1, _rehearse, config, 512, 192)
    stage = split_model(config, 512)[3]
    held = sum((item_parameters(config)[item] for item in stage), start=Count())
    expected = state_bytes(config, held, 32)
    # bf16; this rank encodes images with a copy of the encoder.
    weights = expected.weights + 2 * encoder_parameters(config).total
    for peak in done.peaks:
        assert peak.bytes["weights"] == pytest.approx(weights, rel=1e-4)  # spacers and anchors
        assert peak.bytes["gradients"] == pytest.approx(expected.gradients, rel=1e-4)
        assert peak.bytes["masters"] + peak.bytes["moments"] == pytest.approx(expected.optimizer, rel=1e-4)
    for step, most in zip(expected_steps(config), done.peaks[1::2], strict=True):
        planned = StepMemory(config, 512, step).peak(3, split_model(config, 512)).total
        print(step.name, f"{planned / most.total - 1:+.1%}")
        assert planned == pytest.approx(most.total, rel=0.05)  # measured 1.5 %
    for step in done.steps:
        sent = step.passes.messages["pipeline", "send"]
        assert (sent.count, sent.bytes) == (2 * 72, 2 * 72 * 2048 * 4096 * 2)  # [T / tp, D] in bf16, both ways
