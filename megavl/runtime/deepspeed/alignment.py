"""Alignment of an optimizer group's flat buffers.

DeepSpeed lays the parameters of a group end to end: in the precision of the model, and in fp32 their gradients, masters
and moments. One odd size would misalign all parameters after it, and a GEMM on a misaligned weight takes two to three
times as long, or fails. So a parameter whose size is not a multiple of 128 bytes (in bf16) is followed by a spacer up
to the next multiple: a parameter that nothing reads and that gets no gradient.
"""

from collections.abc import Iterable

from torch import nn

# A unit: 128 bytes in bf16, which is a cache line of a GPU; 256 bytes in fp32.
UNIT_ELEMENTS = 64


def spaced(parameters: Iterable[nn.Parameter], zero: int, ranks: int) -> list[nn.Parameter]:
    """Insert spacers into a group so that each parameter begins at a whole unit on every rank.

    Args:
        parameters: of the group, at least one
        zero: ZeRO stage, 1 to 3. Stages 1 and 2 lay whole parameters end to end and cut the buffer into equal parts,
            one for each rank. Stage 3 cuts each parameter into equal parts, and a rank lays its parts end to end.
        ranks: size of the data axis; the number of replicas of an expert divides it

    Returns:
        The parameters in their order, each followed by its spacer if it has one. Under stages 1 and 2 a last spacer
        makes the total divisible by `ranks` units.
    """
    parts = ranks if zero == 3 else 1
    result, total = [], 0
    for parameter in parameters:
        part = -(-parameter.numel() // parts)
        result += [parameter, *_spacer(parameter, -part % UNIT_ELEMENTS * parts)]
        total += part + -part % UNIT_ELEMENTS
    return result if zero == 3 else [*result, *_spacer(result[0], -total % (UNIT_ELEMENTS * ranks))]


def _spacer(like: nn.Parameter, elements: int) -> list[nn.Parameter]:
    """A list of one spacer, empty for no elements."""
    return [nn.Parameter(like.new_zeros(elements))] if elements else []
