"""Floating-point operations by what they are for."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """FLOPs over a step, whatever the number of ranks that share them. Works add up field by field.

    `overhead` is what the method does not ask for but the implementation computes: blocks again in the backward pass,
    the channels beside each head in which SAM's attention carries relative positions, and the sums over packs that the
    auxiliary loss is made of, which are products too. `repeated` is the part of all this that every tensor rank
    computes for itself instead of sharing it with the others: vision, unless they share the tiles; and, without
    sequence parallelism, products of tokens with weights that every rank has whole (the latent of keys and values, the
    router's scores).
    """

    forward: int = 0
    input_grad: int = 0
    weight_grad: int = 0
    overhead: int = 0
    repeated: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.forward + other.forward,
            self.input_grad + other.input_grad,
            self.weight_grad + other.weight_grad,
            self.overhead + other.overhead,
            self.repeated + other.repeated,
        )

    @property
    def model(self) -> int:
        """What training needs."""
        return self.forward + self.input_grad + self.weight_grad

    @property
    def hardware(self) -> int:
        """What is computed, once."""
        return self.model + self.overhead

    def on_tensor_ranks(self, tensor: int) -> int:
        """What `tensor` ranks compute together."""
        return self.hardware + (tensor - 1) * self.repeated

    def as_overhead(self) -> "Work":
        """The same FLOPs, none of which training needs."""
        return Work(overhead=self.hardware, repeated=self.repeated)

    def repeated_if(self, repeated: bool) -> "Work":
        """The same FLOPs, which every tensor rank computes for itself, or else shares with the others."""
        everywhere = self.hardware if repeated else 0
        return Work(self.forward, self.input_grad, self.weight_grad, self.overhead, everywhere)
