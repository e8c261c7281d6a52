"""A forward pass as a list of operations: what autograd keeps of each, what its backward pass needs, what is sent.

Nothing is computed; a tensor is a number of bytes. The rules are those of autograd: an operation has a node in the
graph if one of its inputs or of its own weights requires a gradient, and only then it keeps anything.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from megavl.plan.message import Message


@dataclass(eq=False)
class Storage:
    """Memory of one or more tensors.

    item:     of the model list, which allocates it; None: all blocks of a stage share it
    sources:  what selective recomputation keeps in its place; None: it is kept itself
    messages: of that recomputation
    """

    bytes: int
    item: int | None
    sources: tuple["Storage", ...] | None = None
    messages: tuple[Message, ...] = ()

    def kept(self) -> Iterator["Storage"]:
        """What is kept of it: itself, or what it is recomputed from."""
        if self.sources is None:
            yield self
        for source in self.sources or ():
            yield from source.kept()

    def recomputed(self) -> Iterator["Storage"]:
        """What the backward pass recomputes when it needs this."""
        if self.sources is not None:
            yield self
            for source in self.sources:
                yield from source.recomputed()


@dataclass(frozen=True, eq=False)
class Activation:
    """A tensor. bytes: its own, and those of its gradient; its storage may have more. live: it requires a gradient."""

    storage: Storage
    bytes: int
    live: bool


@dataclass(frozen=True)
class Operation:
    """One step of the forward pass.

    live:      it has a node in the graph, and so a backward pass
    saved:     storages that the node reads
    weights:   bytes of the gradients of its weights
    passes:    its inputs get the gradient of the output itself, as those of a sum do
    prepared:  the forward pass has computed the gradients of its inputs and weights, and saved them
    temporary: bytes that the forward pass needs for itself
    sends:     messages of the forward pass
    replies:   messages of the backward pass
    inner:     what the backward pass computes again; empty unless it is a block that is recomputed
    """

    inputs: tuple[Activation, ...]
    outputs: tuple[Activation, ...]
    live: bool
    saved: tuple[Storage, ...] = ()
    weights: int = 0
    passes: bool = False
    prepared: bool = False
    temporary: int = 0
    sends: tuple[Message, ...] = ()
    replies: tuple[Message, ...] = ()
    inner: tuple["Operation", ...] = ()


@dataclass
class Tape:
    """Records operations in their order. item: of the model list, to which what is allocated next belongs."""

    item: int = 0
    operations: list[Operation] = field(default_factory=list)

    def apply(
        self,
        inputs: Sequence[Activation],
        outputs: Iterable[int | Activation],
        *,
        saves: Iterable[Activation | Storage | int] = (),
        saves_outputs: bool = False,
        weights: Sequence[int] = (),
        passes: bool = False,
        prepared: bool = False,
        temporary: int = 0,
        sends: Iterable[Message] = (),
        replies: Iterable[Message] = (),
        inner: Iterable[Operation] = (),
    ) -> tuple[Activation, ...]:
        """Record an operation and return its outputs.

        Args:
            outputs: of a new tensor its bytes; of a view the tensor that it shares its storage with
            saves: of a tensor that is allocated to be saved its bytes
            saves_outputs: it saves its outputs too
            weights: bytes of the gradient of each weight that is trained
        """
        live = any(x.live for x in inputs) or bool(weights)
        made = tuple(
            Activation(Storage(out, self.item), out, live)
            if isinstance(out, int)
            else Activation(out.storage, out.bytes, live)
            for out in outputs
        )
        saved = tuple(self._storage(each) for each in saves) + tuple(out.storage for out in made if saves_outputs)
        self.operations.append(
            Operation(
                tuple(inputs),
                made,
                live,
                saved,
                sum(weights),
                passes,
                prepared,
                temporary,
                tuple(sends),
                tuple(replies),
                tuple(inner),
            )
        )
        return made

    def _storage(self, saved: Activation | Storage | int) -> Storage:
        match saved:
            case Activation(storage=storage):
                return storage
            case int(size):
                return Storage(size, self.item)
        return saved


def kept(operations: Iterable[Operation]) -> set[Storage]:
    """What autograd keeps from the forward to the backward pass of these operations."""
    return {part for each in operations if each.live for storage in each.saved for part in storage.kept()}


def sent_forward(operations: Iterable[Operation]) -> Iterator[Message]:
    """Messages of the forward pass, in their order."""
    for each in operations:
        yield from each.sends


def sent_backward(operations: Sequence[Operation]) -> Iterator[Message]:
    """Messages of the backward pass, in no order; those of recomputation among them."""
    recomputed: set[Storage] = set()
    for each in operations:
        if not each.live:
            continue
        yield from each.replies
        recomputed.update(storage for saved in each.saved for storage in saved.recomputed())
        yield from sent_forward(until_last_saved(each.inner))
        yield from sent_backward(each.inner)
    for storage in recomputed:
        yield from storage.messages


def until_last_saved(operations: Sequence[Operation]) -> Sequence[Operation]:
    """What a checkpoint computes again: it stops when it has the last tensor that the backward pass needs."""
    count = max((number for number, each in enumerate(operations, 1) if each.live and each.saved), default=0)
    return operations[:count]


def backward_peak(operations: Sequence[Operation], *, holds_gradient: bool = True) -> int:
    """Most bytes in use during the backward pass of these operations, the gradient of the last output and all that was
    kept included. The gradient of a weight is used up as soon as it is there.

    A node gets the gradients of its outputs, and frees them and what it saved when it is done.

    Args:
        holds_gradient: the caller holds the gradient of the last output to the end
    """
    live = [each for each in operations if each.live]
    readers = Counter(storage for each in live for storage in _reads(each))
    in_use = sum(storage.bytes for storage in kept(live))
    gradients = {out: out.bytes for out in live[-1].outputs} if live else {}
    if holds_gradient:
        in_use += sum(gradients.values())
        gradients = dict.fromkeys(gradients, 0)
    recomputed: set[Storage] = set()
    most = in_use + sum(gradients.values())
    for each in reversed(live):
        needed = {storage for saved in each.saved for storage in saved.recomputed()} - recomputed
        recomputed |= needed
        in_use += sum(storage.bytes for storage in needed)
        inputs = dict.fromkeys(x for x in each.inputs if x.live)
        if each.passes:
            first, *others = inputs
            gradients |= {first: sum(gradients.get(out, 0) for out in each.outputs)} | dict.fromkeys(others, 0)
        else:
            within = _inner_peak(each)
            new = 0 if each.prepared else sum(x.bytes for x in inputs) + each.weights
            most = max(most, in_use + sum(gradients.values()) + max(within, new))
            gradients |= {x: x.bytes for x in inputs}
        for out in each.outputs:
            gradients.pop(out, None)
        for storage in _reads(each):
            readers[storage] -= 1
            if not readers[storage]:
                in_use -= storage.bytes
    return most


def _inner_peak(operation: Operation) -> int:
    """Most bytes in use while a block is computed again and in its backward pass, beyond what it kept and the gradients
    of its outputs."""
    if not operation.inner:
        return 0
    beside = sum(storage.bytes for storage in kept([operation]))
    backward = backward_peak(operation.inner, holds_gradient=False) - sum(out.bytes for out in operation.outputs)
    return max(backward, forward_peak(until_last_saved(operation.inner))) - beside


def forward_peak(operations: Sequence[Operation], *, keeps: bool = True) -> int:
    """Most bytes in use during the forward pass of these operations, what is kept included.

    A tensor that is not kept is in use until the last operation that reads it, and one that will be recomputed until
    the end of the block, by which time all that need it have taken note of it.

    Args:
        keeps: autograd keeps what the operations save; it does not in a block that is recomputed
    """
    last_reader: dict[Storage, int] = {}
    for number, each in enumerate(operations):
        for x in (*each.inputs, *each.outputs):
            last_reader[x.storage] = number if x.storage.sources is None else len(operations)
    in_use: set[Storage] = set()
    held: set[Storage] = set()
    most = 0
    for number, each in enumerate(operations):
        beside = {x.storage for x in (*each.inputs, *each.outputs)}
        in_use |= beside
        if keeps:
            held |= kept([each])
        within = each.temporary
        if each.inner:
            within += forward_peak(each.inner, keeps=False) - sum(storage.bytes for storage in beside)
        most = max(most, sum(storage.bytes for storage in in_use | held) + within)
        in_use = {storage for storage in in_use if last_reader[storage] > number}
    return most


def _reads(operation: Operation) -> set[Storage]:
    """What the backward pass of an operation reads, and what that is recomputed from."""
    return {part for saved in operation.saved for part in (*saved.recomputed(), *saved.kept())}
