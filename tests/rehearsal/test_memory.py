"""Bytes by phase and kind, of allocations whose sizes are known."""

import torch

from megavl.rehearsal.memory import KINDS, Memory


def observed() -> Memory:
    """100 bytes of weights; 40 kept and 20 let go in a pass; 70 in an update."""
    memory = Memory()
    memory.begin("build")
    with memory:
        weight = torch.empty(100, dtype=torch.uint8)
    memory.label([weight], "weights")
    memory.label_rest("workspace")
    memory.begin("pass")
    with memory:
        kept = torch.zeros(40, dtype=torch.uint8)
        torch.zeros(20, dtype=torch.uint8)
        view = kept[:10]
        weight.fill_(1)
    memory.label_rest("activations")
    del kept, view
    memory.begin("update")
    with memory:
        torch.zeros(70, dtype=torch.uint8)
    return memory


def test_peaks_by_kind():
    build, passes, update = observed().peaks()
    nothing = dict.fromkeys(KINDS, 0)
    assert (build.phase, build.bytes) == ("build", nothing | {"weights": 100})
    assert (passes.phase, passes.bytes) == ("pass", nothing | {"weights": 100, "activations": 40, "workspace": 20})
    assert (update.phase, update.bytes) == ("update", nothing | {"weights": 100, "workspace": 70})
    assert passes.total == 160


def test_a_phase_begins_with_what_is_there():
    memory = Memory()
    with memory:
        held = torch.empty(30, dtype=torch.uint8)
    memory.begin("nothing new")
    assert memory.peaks()[0].total == 30
    del held
    memory.begin("nothing left")
    assert [peak.total for peak in memory.peaks()] == [30, 0]


def test_tensors_without_memory_do_not_count():
    memory = Memory()
    memory.begin("all")
    with memory:
        held = torch.empty(30, device="meta")
    assert held.is_meta and memory.bytes == 0
