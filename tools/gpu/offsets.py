"""Alignment of the parameters, gradients, masters and moments in DeepSpeed's flat buffers.

cuBLAS has its fast Hopper kernels for operands that begin on 16 bytes, and grouped_mm refuses others. 128 bytes are a
whole memory transaction.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from gpu.results import Finding, Results, Setting
from gpu.run import MODELS, Run, build, start, tiny

from megavl.runtime.deepspeed.state import MOMENTS

ALIGNMENT_BYTES = 128
# One of each family.
_REHEARSED = ("vl_7b", "vl2_small")


@dataclass(frozen=True)
class Place:
    """Where the values of one parameter begin: `start_bytes` into their flat buffer, at `address`."""

    kind: str
    name: str
    start_bytes: int
    address: int


def run(setting: Setting, results: Results, subject: str) -> None:
    """Measure the engines of tiny models, each with the optimizer groups of its recipe: bf16, ZeRO-1."""
    env = start()
    for model in _REHEARSED if setting.rehearse else MODELS:
        results.measure(model, lambda model=model: finding(build(tiny(model), env), setting))


def finding(run: Run, setting: Setting) -> Finding:
    """How many of each kind are misaligned, with the first of them."""
    # A CPU's allocator aligns less than a buffer needs on a GPU, so only the offsets count there.
    return judge(list(places(run)), addresses=not setting.rehearse)


def judge(found: list[Place], addresses: bool) -> Finding:
    """The verdict over all places; with `addresses`, those must be aligned too."""
    counts = Counter(place.kind for place in found)
    off = [
        place
        for place in found
        if place.start_bytes % ALIGNMENT_BYTES or (addresses and place.address % ALIGNMENT_BYTES)
    ]
    failures = []
    for kind, count in Counter(place.kind for place in off).items():
        first = next(place for place in off if place.kind == kind)
        failures.append(
            f"{count} of {counts[kind]} {kind} do not begin on {ALIGNMENT_BYTES} bytes, first {first.name} "
            f"at byte {first.start_bytes} of its buffer, address {first.address:#x}"
        )
    line = f"{', '.join(f'{count} {kind}' for kind, count in counts.items())}"
    return Finding(line if addresses else f"{line}; offsets only, on a CPU", dict(counts), failures=failures)


def places(run: Run) -> Iterator[Place]:
    """Where every trainable parameter, fp32 gradient, master and moment begins in DeepSpeed's BF16_Optimizer."""
    optimizer = run.replica.engine.optimizer
    names = {parameter: name for stage in run.replica.stages for name, parameter in stage.vlm.named_parameters()}
    for number, group in enumerate(optimizer.bf16_groups):
        bf16, masters = optimizer.bf16_groups_flat[number], optimizer.fp32_groups_flat_partition[number]
        gradients = optimizer.fp32_groups_gradients_flat[number]
        for parameter, gradient in zip(group, optimizer.fp32_groups_gradients[number], strict=True):
            name = names.get(parameter)
            if name is None:  # an anchor or a spacer
                continue
            yield Place("parameters", name, parameter.data_ptr() - bf16.data_ptr(), parameter.data_ptr())
            yield Place("gradients", name, gradient.data_ptr() - gradients.data_ptr(), gradient.data_ptr())
            if parameter._hp_mapping is not None:
                start_bytes = parameter._hp_mapping.hp_fragment_address.start * masters.element_size()
                yield Place("masters", name, start_bytes, masters.data_ptr() + start_bytes)
    for fragment in run.replica.fragments():
        if fragment.kind in MOMENTS:
            values = fragment.values
            yield Place("moments", fragment.name, values.storage_offset() * values.element_size(), values.data_ptr())
