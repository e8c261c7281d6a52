"""Attribution of operations to the operators of a block, in forward and backward.

An operator is one call of `Ops`, of a module, or of a product with a weight. Identities around the call switch the
label in the backward pass: autograd reaches that of an output before the operator's own nodes, that of an input after
them.
"""

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from megavl.ops.dispatch import Ops

# What no operator encloses: residual additions, sums and concatenations of gradients.
REST = "rest"


@dataclass(frozen=True)
class Call:
    """The tensors at the border of one call of an operator; `inputs` include its parameters."""

    operator: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


@dataclass
class Attribution:
    """The operator that is running, and all calls so far."""

    current: str = REST
    calls: list[Call] = field(default_factory=list)

    def label(self, operator: str, function: Callable, parameters: Iterable[Tensor] = ()) -> Callable:
        """`function` under the label `operator`, unless it is called within another one.

        Args:
            parameters: tensors that it reads besides its arguments
        """
        parameters = tuple(parameters)

        def labelled(*args, **kwargs):
            if self.current != REST:
                return function(*args, **kwargs)
            inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            tracked = _Tracked(self, sum(tensor.requires_grad for tensor in inputs))
            args, kwargs = tree_map_only(Tensor, lambda tensor: _Input.apply(tensor, tracked), (args, kwargs))
            self.current = operator
            out = function(*args, **kwargs)
            self.current = REST
            outputs = tuple(leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
            self.calls.append(Call(operator, (*inputs, *parameters), outputs))
            return tree_map_only(Tensor, lambda tensor: _Output.apply(tensor, self, operator), out)

        return labelled

    def label_ops(self, ops: Ops) -> Ops:
        """`ops` with a label on every operator; one that is composed of others has labels on those."""
        return self._label_fields(ops, "")

    def _label_fields(self, group: Any, prefix: str) -> Any:
        changes = {}
        for each in dataclasses.fields(group):
            value, name = getattr(group, each.name), f"{prefix}{each.name}"
            if dataclasses.is_dataclass(value):
                changes[each.name] = self._label_fields(value, f"{name}.")
            elif callable(value):
                changes[each.name] = self.label(name, value)
        return dataclasses.replace(group, **changes)


@dataclass
class _Tracked:
    """Gradients of inputs that a call still has to give; after the last one the label is `REST` again."""

    attribution: Attribution
    pending: int

    def gave(self) -> None:
        self.pending -= 1
        if not self.pending:
            self.attribution.current = REST


class _Input(Function):
    @staticmethod
    def forward(ctx, x: Tensor, tracked: _Tracked) -> Tensor:
        ctx.tracked = tracked
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        ctx.tracked.gave()
        return grad, None


class _Output(Function):
    @staticmethod
    def forward(ctx, x: Tensor, attribution: Attribution, operator: str) -> Tensor:
        ctx.attribution, ctx.operator = attribution, operator
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        ctx.attribution.current = ctx.operator
        return grad, None, None


class Products(TorchFunctionMode):
    """While entered, each product with a weight is an operator of its own.

    Args:
        name_of: name of a weight
    """

    def __init__(self, attribution: Attribution, name_of: Callable[[Tensor], str]):
        super().__init__()
        self._attribution, self._name_of = attribution, name_of

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        # Within another operator a product is that operator's, whatever it multiplies.
        if function is F.linear and self._attribution.current == REST:
            function = self._attribution.label(self._name_of(args[1]), function)
        return function(*args, **(kwargs or {}))
