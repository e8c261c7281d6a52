"""How one parameter of megavl is called and cut in another layout."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, cat

from megavl.config.parameters import Parameter

Shape = tuple[int, ...]
# A name of megavl -> its name there, or the names of its equal slices along dim 0. "#" stands for the index of a block,
# "@" for weight or bias.
Names = Mapping[str, str | tuple[str, ...]]


@dataclass(frozen=True)
class Rule:
    """A parameter here and its one or more tensors there.

    theirs: names; where there are several, tensor i is slice i of as many equal slices along dim 0
    flat:   theirs lacks the leading dim of size 1
    shape:  of the parameter here
    """

    ours: str
    theirs: tuple[str, ...]
    flat: bool
    shape: Shape

    @property
    def their_shape(self) -> Shape:
        """Shape of each of their tensors."""
        shape = self.shape[1:] if self.flat else self.shape
        return (shape[0] // len(self.theirs), *shape[1:])

    def export(self, parameter: Tensor) -> dict[str, Tensor]:
        """Their tensors, as views."""
        whole = parameter.squeeze(0) if self.flat else parameter
        return dict(zip(self.theirs, whole.chunk(len(self.theirs)), strict=True))

    def restore(self, tensors: list[Tensor]) -> Tensor:
        """The parameter from their tensors, in the order of `theirs`."""
        whole = tensors[0] if len(tensors) == 1 else cat(tensors)
        return whole.unsqueeze(0) if self.flat else whole


def rules(parameters: Iterable[Parameter], names: Names, flat: frozenset[str] = frozenset()) -> list[Rule]:
    """One rule for each parameter, in their order. `flat`: names of megavl whose tensors lack the leading dim there."""
    return [_rule(parameter, names, parameter.name in flat) for parameter in parameters]


def _rule(parameter: Parameter, names: Names, flat: bool) -> Rule:
    block = re.search(r"\bblocks\.(\d+)\.", parameter.name)
    ending = re.search(r"\.(weight|bias)$", parameter.name)
    pattern = re.sub(r"\bblocks\.\d+\.", "blocks.#.", parameter.name)
    if ending:
        pattern = pattern.removesuffix(ending[1]) + "@"
    theirs = names[pattern]
    filled = tuple(
        name.replace("#", block[1] if block else "").replace("@", ending[1] if ending else "")
        for name in ((theirs,) if isinstance(theirs, str) else theirs)
    )
    return Rule(parameter.name, filled, flat, parameter.shape)
