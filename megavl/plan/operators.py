"""What each operator keeps for its backward pass, as `megavl.ops` has them on a GPU with torch and Triton.

The rows of an activation are its tokens (or patches); a width is the number of channels of a row.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Literal

from megavl.config.run import RunConfig
from megavl.plan.message import Kind, Message
from megavl.plan.tape import Activation, Storage, Tape, kept, sent_forward

FP32_BYTES, INDEX_BYTES = 4, 8
# Weights begin at multiples of this in their buffers (`megavl.runtime.deepspeed.alignment`).
UNIT_ELEMENTS = 64


@dataclass
class Recorder:
    """Records the operators of a rank over one micro-batch.

    tokens: of the micro-batch; tensor ranks have the same ones
    """

    config: RunConfig
    tokens: int
    tape: Tape = field(default_factory=Tape)
    selective: bool = False

    def __post_init__(self) -> None:
        self.tensor, self.sequence = self.config.parallel.tensor, self.config.parallel.sequence
        self.sequence = self.sequence and self.tensor > 1
        self.element = self.config.train.element_bytes
        # Rows of the residual stream.
        self.stream = self.tokens // self.tensor if self.sequence else self.tokens
        self.trains = cache(lambda name: self.config.optim.lr_multiplier(name) > 0)

    def size(self, rows: int, width: int) -> int:
        """Bytes in the precision of the run."""
        return rows * width * self.element

    def weights(self, *named: tuple[str, int]) -> list[int]:
        """Bytes of the gradients of those among (name, elements) that are trained."""
        return [elements * self.element for name, elements in named if self.trains(name)]

    def message(self, kind: Kind, size: int, axis: Literal["tensor", "expert"] = "tensor") -> list[Message]:
        """A collective; none over an axis of one rank."""
        ranks = self.tensor if axis == "tensor" else self.config.parallel.expert
        return [Message(axis, kind, size, ranks)] if ranks > 1 else []

    def derive(self, output: Activation, *inputs: Activation | Storage, messages: Sequence[Message] = ()) -> None:
        """Under selective recomputation the backward pass computes `output` again, from `inputs`."""
        if self.selective and output.live:
            output.storage.sources = tuple(x.storage if isinstance(x, Activation) else x for x in inputs)
            output.storage.messages = tuple(messages)

    def recomputed(self, x: Activation, block: Callable[[Activation], Activation], *constants: Storage) -> Activation:
        """A block that keeps its input and `constants`, and is computed again in the backward pass."""
        outer, self.tape = self.tape, Tape(self.tape.item)
        out, inner = block(x), self.tape.operations
        self.tape = outer
        (out,) = self.tape.apply(
            [x],
            [out.bytes],
            saves=[x, *constants] if kept(inner) else [],
            weights=[0] * out.live,
            sends=list(sent_forward(inner)),
            inner=inner,
        )
        return out

    # -- Elementwise operators and norms

    def add(self, *terms: Activation) -> Activation:
        (out,) = self.tape.apply(terms, [terms[0].bytes], passes=True)
        return out

    def shared_weight(self, name: str, elements: int) -> tuple[list[int], list[Message]]:
        """Gradient of a weight that is whole on every rank, and its sum over the ranks under sequence parallelism."""
        weights = self.weights((name, elements))
        return weights, [message for size in weights if self.sequence for message in self.message("all_reduce", size)]

    def rms_norm(self, x: Activation, name: str, rows: int, width: int) -> Activation:
        weights, replies = self.shared_weight(name, width)
        (out,) = self.tape.apply(
            [x], [self.size(rows, width)], saves=[x, rows * FP32_BYTES], weights=weights, replies=replies
        )
        self.derive(out, x)
        return out

    def add_rms_norm(self, h: Activation, delta: Activation, name: str, width: int) -> tuple[Activation, Activation]:
        """The sum, which it keeps, and its normalised values."""
        total = self.add(h, delta)
        return total, self.rms_norm(total, name, self.stream, width)

    def swiglu(self, gate_up: Sequence[Activation], rows: int, width: int) -> Activation:
        (out,) = self.tape.apply(gate_up, [self.size(rows, width)], saves=gate_up)
        self.derive(out, *gate_up)
        return out

    # -- Linear layers

    def linear(self, x: Activation, name: str, rows: int, d_in: int, d_out: int) -> Activation:
        """It keeps its input for the gradient of its weight."""
        weights = self.weights((name, d_in * d_out))
        (out,) = self.tape.apply([x], [self.size(rows, d_out)], saves=[x] if weights else [], weights=weights)
        return out

    def enter(self, x: Activation, width: int, element: int | None = None) -> Activation:
        """Into a parallel region: [T / tp, width] or [T, width] -> [T, width]."""
        size = self.tokens * width * (element or self.element)
        if not self.sequence:
            if self.tensor == 1:
                return x
            (out,) = self.tape.apply([x], [x], replies=self.message("all_reduce", size))
            return out
        gathers = self.message("all_gather", size)
        (out,) = self.tape.apply([x], [size], sends=gathers, replies=self.message("reduce_scatter", size))
        self.derive(out, x, messages=gathers)
        return out

    def leave(self, x: Activation, width: int) -> Activation:
        """Out of a parallel region: partial sums [T, width] -> [T / tp, width] or [T, width]."""
        if self.tensor == 1:
            return x
        whole = self.size(self.tokens, width)
        if not self.sequence:
            (out,) = self.tape.apply([x], [whole], passes=True, sends=self.message("all_reduce", whole))
            return out
        (out,) = self.tape.apply(
            [x],
            [self.size(self.stream, width)],
            sends=self.message("reduce_scatter", whole),
            replies=self.message("all_gather", whole),
        )
        return out

    def column_linears(self, x: Activation, path: str, widths: Mapping[str, int], d_in: int) -> list[Activation]:
        """Products of one input with several weights, of `widths` columns over all ranks; views of one tensor where the
        weights are multiplied as one."""
        x, rows = self.enter(x, d_in), self.tokens
        names = {f"{path}.{name}.weight": width // self.tensor for name, width in widths.items()}
        if not self.are_adjacent({name: width * d_in for name, width in names.items()}):
            return [self.linear(x, name, rows, d_in, width) for name, width in names.items()]
        total = sum(names.values())
        (joint,) = self.tape.apply(
            [x],
            [self.size(rows, total)],
            saves=[x],
            weights=self.weights(*((name, width * d_in) for name, width in names.items())),
        )
        columns = [Activation(joint.storage, self.size(rows, width), joint.live) for width in names.values()]
        return list(self.tape.apply([joint], columns))

    def are_adjacent(self, weights: Mapping[str, int]) -> bool:
        """Whether weights of a layer, by name and with their elements, lie end to end in one buffer of DeepSpeed's:
        they are of one optimizer group, without a spacer between them. Over several ranks; ZeRO-1 in fp32 over one has
        no buffer."""
        *before, _ = weights.values()
        rates = {self.config.optim.lr_multiplier(name) for name in weights}
        aligned = not any(elements % UNIT_ELEMENTS for elements in before)
        return self.config.parallel.zero in (1, 2) and len(rates) == 1 and rates != {0.0} and aligned
