"""How one parameter of megavl is called and cut in another layout."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, cat, stack

from megavl.config.parameters import Parameter

Shape = tuple[int, ...]
# A name of megavl -> its name there, or the names of its equal slices along dim 0. "#" stands for the index of a block,
# "@" for weight or bias, "*" for an index of dim 0, of which each has a tensor there.
Names = Mapping[str, str | tuple[str, ...]]


@dataclass(frozen=True)
class Rule:
    """A parameter here and its one or more tensors there.

    theirs:  names; where there are several, tensor i is slice i of as many equal slices along dim 0
    stacked: each of theirs is one index of dim 0, and lacks that dim
    shape:   of the parameter here
    """

    ours: str
    theirs: tuple[str, ...]
    stacked: bool
    shape: Shape

    @property
    def their_shape(self) -> Shape:
        """Shape of each of their tensors."""
        return self.shape[1:] if self.stacked else (self.shape[0] // len(self.theirs), *self.shape[1:])

    def export(self, parameter: Tensor) -> dict[str, Tensor]:
        """Their tensors, as views."""
        parts = parameter.unbind() if self.stacked else parameter.chunk(len(self.theirs))
        return dict(zip(self.theirs, parts, strict=True))

    def restore(self, tensors: list[Tensor]) -> Tensor:
        """The parameter from their tensors, in the order of `theirs`."""
        if len(tensors) == 1:
            return tensors[0].unsqueeze(0) if self.stacked else tensors[0]
        return stack(tensors) if self.stacked else cat(tensors)


def rules(parameters: Iterable[Parameter], names: Names, flat: frozenset[str] = frozenset()) -> list[Rule]:
    """One rule for each parameter, in their order. `flat`: names of megavl whose tensors lack the leading dim there."""
    return [_rule(parameter, names, parameter.name in flat) for parameter in parameters]


def _rule(parameter: Parameter, names: Names, flat: bool) -> Rule:
    block = re.search(r"\bblocks\.(\d+)\.", parameter.name)
    ending = re.search(r"\.(weight|bias)$", parameter.name)
    pattern = re.sub(r"\bblocks\.\d+\.", "blocks.#.", parameter.name)
    if ending and pattern not in names:
        pattern = pattern.removesuffix(ending[1]) + "@"
    theirs = (names[pattern],) if isinstance(names[pattern], str) else names[pattern]
    each = "*" in theirs[0]
    if each:
        theirs = tuple(theirs[0].replace("*", str(index)) for index in range(parameter.shape[0]))
    filled = tuple(
        name.replace("#", block[1] if block else "").replace("@", ending[1] if ending else "") for name in theirs
    )
    return Rule(parameter.name, filled, flat or each, parameter.shape)
