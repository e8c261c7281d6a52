"""How one parameter of megavl is called and cut in another layout."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, cat, stack

from megavl.checkpoint.error import CheckpointError
from megavl.config.dataflow import Parameter

Shape = tuple[int, ...]
# A name of megavl -> its name there, or the names of its equal slices along dim 0. "#" stands for the index of a block,
# "@" for weight or bias, "*" for an index of dim 0 (there each index has its own tensor). A name that ends with a dot
# is a prefix: names that are not listed themselves go on there as here.
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
    theirs = _their_names(parameter.name, names)
    each = "*" in theirs[0]
    if each:
        theirs = tuple(theirs[0].replace("*", str(index)) for index in range(parameter.shape[0]))
    return Rule(parameter.name, theirs, flat or each, parameter.shape)


def _their_names(name: str, names: Names) -> tuple[str, ...]:
    """The entry of `names` for a parameter, with its block and its ending filled in."""
    block, ending = re.search(r"\bblocks\.(\d+)\.", name), re.search(r"\.(weight|bias)$", name)
    pattern = re.sub(r"\bblocks\.\d+\.", "blocks.#.", name)
    if ending and pattern not in names:
        pattern = pattern.removesuffix(ending[1]) + "@"
    theirs = names.get(pattern) or _under_prefix(name, names)
    theirs = (theirs,) if isinstance(theirs, str) else theirs
    return tuple(
        there.replace("#", block[1] if block else "").replace("@", ending[1] if ending else "") for there in theirs
    )


def _under_prefix(name: str, names: Names) -> str:
    for prefix in names:
        if prefix.endswith(".") and name.startswith(prefix):
            return f"{names[prefix]}{name.removeprefix(prefix)}"
    raise CheckpointError(
        f"this layout has no name for {name}: whoever reads it computes no such layer. Nothing was converted"
    )
